"""Tiny models and data, made once a session; healthy runs to copy from."""

import pytest
from tiny_runs import SHORT_DEMO, data, in_tmp_path, models

from classic import cli as classic
from ppo_rlhf.cli import main

__all__ = ["data", "in_tmp_path", "models"]


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The whole pipeline on the embedded task, small: → its folder."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    assert main(["demo", "--output-dir", str(folder), *SHORT_DEMO.split()]) == 0
    return folder


@pytest.fixture(scope="session")
def control(tmp_path_factory):
    """A healthy run of each control task: → their folders by name."""
    folder = tmp_path_factory.mktemp("control")
    for env_id in ("CartPole-v1", "Pendulum-v1"):
        words = ["train", env_id, "--num-steps", "40000", "--log-with", "[]", "--output-dir", str(folder / env_id)]
        assert classic.main(words) == 0
    return folder
