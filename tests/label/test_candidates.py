"""What people are to judge, sampled of runs; and the order of the least sure first."""

import json
from pathlib import Path

import pytest
import yaml
from tiny_runs import reward_model_on

from ppo_rlhf.candidates import samples_of_one, samples_of_two, uncertainty_order
from ppo_rlhf.cli import main
from ppo_rlhf.errors import UserError
from ppo_rlhf.preferences import Pair
from ppo_rlhf.rewards import RewardModel
from ppo_rlhf.saved_runs import prompt_rows, sampling_settings


def test_samples_of_one_policy_are_its_own_and_follow_from_the_seed(models, data):
    drawn = [samples_of_one(models["gpt2"], prompts=data["prompts"], count=6, responses=3, seed=s) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    known = {json.loads(line)["prompt"] for line in Path(data["prompts"]).read_text().splitlines()}
    for pair in drawn[0]:
        assert pair.prompt in known
        assert pair.sources == [models["gpt2"]] * 3
        assert len(set(pair.responses)) > 1


def test_samples_of_two_policies_stand_side_by_side(models, data):
    pairs = samples_of_two(models["gpt2"], models["llama"], prompts=data["prompts"], count=99, seed=0)
    assert len({pair.prompt for pair in pairs}) == len(pairs) == 40
    assert all(pair.sources == [models["gpt2"], models["llama"]] for pair in pairs)


@pytest.fixture
def run(models, data, tmp_path):
    """A finished PPO run of a pipeline."""
    words = f"ppo --policy {models['gpt2']} --prompts {data['prompts']} --reward user.py:length --batch-size 4"
    more = "--num-steps 1 --sampling.max-new-tokens 5 --sampling.temperature 0.7 --eval-fraction 0.2 --log_with []"
    assert main([*words.split(), *more.split(), "--output-dir", "pipeline/ppo"]) == 0
    return "pipeline"


def test_a_run_samples_for_its_own_held_out_prompts_as_it_did(run, models, data):
    assert sampling_settings(Path(run) / "ppo").max_new_tokens == 5
    assert sampling_settings(Path(run) / "ppo").temperature == 0.7
    assert len(prompt_rows(run, None)) == 40
    pairs = samples_of_two(run, models["gpt2"], prompts=None, count=99, seed=0)
    held_out = {json.loads(line)["prompt"] for line in Path("pipeline/ppo/samples.jsonl").read_text().splitlines()
                if json.loads(line)["kind"] == "held-out"}  # fmt: skip
    assert {pair.prompt for pair in pairs} == held_out
    assert yaml.safe_load(Path("pipeline/ppo/config.yaml").read_text())["eval_fraction"] == 0.2


def test_a_run_without_prompts_needs_some(models):
    with pytest.raises(UserError, match="--prompts"):
        prompt_rows(models["gpt2"], None)


def test_the_least_sure_pair_comes_first(models, tmp_path, monkeypatch):
    monkeypatch.setattr(RewardModel, "__call__", lambda self, prompts, responses: torch_of(responses))
    pairs = {7: Pair("p", ["1", "5"]), 8: Pair("p", ["3.5", "3"]), 9: Pair("p", ["0", "4", "2"])}
    assert uncertainty_order(pairs, reward_model_on(models["gpt2"], tmp_path / "reward_model")) == {
        7: 4.0,
        8: 0.5,
        9: 2.0,
    }


def torch_of(responses):
    import torch

    return torch.tensor([float(text) for text in responses])
