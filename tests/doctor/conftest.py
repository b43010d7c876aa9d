"""Tiny models and data, made once a session; healthy runs to copy from."""

import pytest
from tiny_runs import data, in_tmp_path, models

from classic import cli as classic
from ppo_rlhf.cli import main

__all__ = ["data", "in_tmp_path", "models"]

TOY = (
    "--sft.num-epochs 0.1 --sft.eval-every 0 --sft.save-every 0 --comparisons.num-prompts 300 --reward.num-epochs 2 "
    "--reward.save-every 0 --reward.eval-every 0 --reward.normalization-prompts 32 --ppo.num-steps 12 "
    "--ppo.batch-size 16 --ppo.eval-every 0 --ppo.save-every 0 --ppo.max-eval-prompts 64"
)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The whole pipeline on the embedded task, small: → its folder."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    assert main(["demo", "--output-dir", str(folder), *TOY.split()]) == 0
    return folder


@pytest.fixture(scope="session")
def control(tmp_path_factory):
    """A healthy run of each control task: → their folders by name."""
    folder = tmp_path_factory.mktemp("control")
    for env_id in ("CartPole-v1", "Pendulum-v1"):
        words = ["train", env_id, "--num-steps", "40000", "--log-with", "[]", "--output-dir", str(folder / env_id)]
        assert classic.main(words) == 0
    return folder
