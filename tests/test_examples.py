"""The examples say what the package accepts, and the real-text task keeps its splits apart."""

import importlib.util
import os
from pathlib import Path

import pytest
import yaml

from ppo_rlhf import cli
from ppo_rlhf.arguments import read
from ppo_rlhf.config import PipelineConfig

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*/pipeline.yaml"))
DATA = Path(os.environ.get("PPO_RLHF_DATA", ROOT / ".." / "shared" / "data"))


@pytest.fixture
def task(monkeypatch):
    if not (DATA / "rt-polarity").is_dir():
        pytest.skip(f"the review sentences are not in {DATA}; set PPO_RLHF_DATA to the folder that has rt-polarity/")
    monkeypatch.setenv("PPO_RLHF_DATA", str(DATA))
    path = ROOT / "examples" / "configs" / "rt_polarity" / "task.py"
    spec = importlib.util.spec_from_file_location("rt_polarity_task", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_examples_for_the_toy_task_real_sentences_and_gpt2():
    assert {path.parent.name for path in CONFIGS} >= {"toy", "rt_polarity", "gpt2"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_every_setting_of_an_example_is_known_and_valid(path):
    given = read(cli.COMMAND_LINE, ["pipeline", "--config", str(path)])["pipeline"]
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert given["ppo"].num_steps == written["ppo"]["num_steps"]
    assert (
        PipelineConfig(sft=given["sft"], reward=given["reward"], ppo=given["ppo"]).ppo.kl_coef
        == written["ppo"]["kl_coef"]
    )


def test_the_example_of_the_toy_task_is_the_demo_s_own_configuration():
    assert (ROOT / "examples/configs/toy/pipeline.yaml").read_text() == cli.TOY_CONFIG.read_text()


def test_gpt2_is_one_line_in_its_example():
    path = ROOT / "examples/configs/gpt2/pipeline.yaml"
    assert yaml.safe_load(path.read_text())["sft"]["policy"] == "gpt2"


def test_no_sentence_of_the_real_task_is_in_two_splits(task):
    for polarity in ("pos", "neg"):
        splits = [task.sentences(polarity, name) for name in task.SHARES]
        assert sum(map(len, splits)) > 5000
        assert [round(len(split) / sum(map(len, splits)), 1) for split in splits] == [0.7, 0.1, 0.2]
    learnt = {row["text"] for row in task.demonstrations()}
    held_out = {row["text"] for row in task.held_out_demonstrations()}
    judged = set(task.both("judge"))
    assert len(learnt & judged) + len(held_out & judged) + len(learnt & held_out) <= 5  # a few stand twice in the data


def test_the_real_task_ranks_positive_sentences_first(task):
    positive, negative = set(task.sentences("pos", "train")), set(task.sentences("neg", "train"))
    for row in task.comparisons():
        assert row["ranks"] == [1, 1, 2, 2]
        assert set(row["responses"][:2]) <= positive
        assert set(row["responses"][2:]) <= negative


def test_the_judge_tells_held_out_sentences_better_than_chance(task):
    positive, negative = task.sentences("pos", "held_out"), task.sentences("neg", "held_out")
    right = sum(task.judge([""] * len(positive), positive)) + sum(
        1 - x for x in task.judge([""] * len(negative), negative)
    )
    assert right / (len(positive) + len(negative)) > 0.65
