"""Tiny runs of the control side's commands, and what the tests of all commands ask of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from refusals import refusal

from classic.cli import main

# Two updates of sixteen-unit networks, and nothing but what is asked for.
TINY = "--num-envs 4 --horizon 16 --num-steps 128 --network.hidden-sizes [16] --ppo.num-epochs 1 --eval-episodes 2"
TINY_WORDS = [*TINY.split(), "--log-with", "[]"]


def train(env_id, folder, *words):
    """`train` of a tiny run, which must succeed."""
    assert main(["train", env_id, *TINY_WORDS, "--output-dir", str(folder), *map(str, words)]) == 0
    return Path(folder)


def answer(capfd, *words):
    """What a command prints with --json: one object on one line, last on stdout."""
    capfd.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capfd.readouterr().out.splitlines()[-1])


def refused(capfd, *words):
    """The one line by which a command refuses."""
    return refusal(main, words, capfd)


def metrics_of(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def without_times(rows):
    return [{name: value for name, value in row.items() if name != "steps_per_second"} for row in rows]


def same_policy(one, other):
    from safetensors.torch import load_file

    one, other = (load_file(Path(folder) / "policy" / "policy.safetensors") for folder in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory):
    """Finished tiny runs by environment; not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    return {env_id: train(env_id, folder / env_id) for env_id in ("CartPole-v1", "Pendulum-v1")}


@pytest.fixture
def cartpole(finished_runs, tmp_path):
    """A finished run on CartPole of the test's own."""
    return shutil.copytree(finished_runs["CartPole-v1"], tmp_path / "cartpole")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Every test runs in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
