"""Two steps of each algorithm beside PPO, as a run: what it leaves behind, and that it goes on where it was."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_reward_configuration import config_of
from tiny_runs import jsonl, metrics_in_one_go_and_in_two, metrics_of, same_weights, weights_of

from ppo_rlhf.config import MissingEOS, PPOConfig, PretrainingSettings
from ppo_rlhf.errors import UserError
from ppo_rlhf.settings import PPOSettings
from ppo_rlhf.train import ppo


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_a_group_baseline_needs_no_values_and_compares_responses_to_one_prompt(models, data, advantage):
    config = config_of(models, data, advantage=advantage, responses_per_prompt=2, kl_coef=0.0, output_dir="out")
    ppo.train(config)
    rows = metrics_of("out")[1:]
    assert all(row["loss/value"] == 0 for row in rows)
    assert not any("value/explained_variance" in row for row in rows)
    one, other = [row for row in jsonl("out/samples.jsonl") if row["kind"] == "rollout" and row["step"] == 1]
    assert one["prompt"] == other["prompt"]
    assert one["response"] != other["response"]
    paid = [sum(row["rewards"]) for row in (one, other)]
    sign = (paid[0] > paid[1]) - (paid[0] < paid[1])
    expected = paid[0] - paid[1] if advantage == "rloo" else sign
    for row, advantage_of in ((one, expected), (other, -expected)):
        assert row["advantages"] == pytest.approx([advantage_of] * len(row["tokens"]), abs=1e-4)
    for row in [row for row in jsonl("out/samples.jsonl") if row["kind"] == "held-out"]:
        assert row["rewards"]
        assert not {"values", "advantages", "returns"} & row.keys()  # what they would be, a single response cannot tell


def test_kl_in_the_loss_leaves_the_rewards_to_the_score(models, data):
    config = config_of(models, data, kl_penalty="k3", kl_coef=0.5, output_dir="out", missing_eos=MissingEOS("none"))
    ppo.train(config)
    rows = metrics_of("out")[1:]
    for row in rows:
        assert row["objective/reward"] == pytest.approx(row["objective/score"], abs=1e-5)
        assert row["loss/reference_kl"] >= 0
    assert rows[1]["loss/reference_kl"] > 0


def test_ppo_ptx_lowers_the_loss_of_the_texts_beside_the_reward(models, data):
    pretraining = PretrainingSettings(data=data["demonstrations"], batch_size=8, coef=10.0)
    config = config_of(models, data, pretraining=pretraining, num_steps=4, ppo=PPOSettings(num_epochs=2))
    losses = []
    ppo.train(config, callbacks=[lambda step, metrics: losses.append(metrics["loss/pretraining"])])
    assert losses[-1] < losses[0] - 0.1


def test_texts_that_ppo_ptx_cannot_read_are_refused_by_name(models, data):
    config = config_of(models, data, pretraining=PretrainingSettings(data="nowhere.jsonl"), output_dir="out")
    with pytest.raises(UserError, match=r"pretraining\.data: there is no file nowhere\.jsonl"):
        ppo.train(config)
    assert not Path("out").exists()


def test_the_averaged_policy_is_saved_and_goes_on_where_it_was(models, data):
    config = config_of(models, data, ema_decay=0.5, num_steps=4, save_every=2, eval_every=2)
    whole, resumed = metrics_in_one_go_and_in_two(config, cut_at=3)
    assert resumed == whole
    assert same_weights("parts/policy", "whole/policy")
    start, saved = weights_of(models["gpt2"]), weights_of("whole/policy")
    last = weights_of("whole/checkpoints/step_000004")
    name = "transformer.wte.weight"
    assert (saved[name] - start[name]).abs().max() < (last[f"language_model.{name}"] - start[name]).abs().max()
    assert not torch.equal(saved[name], last[f"language_model.{name}"])


def test_a_run_bootstraps_where_the_limit_cut_a_response_off(models, data):
    ppo.train(config_of(models, data, kl_coef=0.0, missing_eos=MissingEOS("bootstrap"), output_dir="out"))
    rows = [row for row in jsonl("out/samples.jsonl") if row["kind"] == "rollout"]
    assert {row["finished"] for row in rows} == {True, False}
    for row in rows:
        assert sum(row["rewards"]) == pytest.approx(row["score"] if row["finished"] else 0.0)
    assert json.loads(Path("out/summary.json").read_text())["kl"] != 0


def test_a_learning_rate_of_its_own_moves_the_value_head_alone(models, data):
    """Adam's first step is the learning rate: ten times as long, and a head of zeros leaves the trunk as it is."""
    for name, value_lr in (("same", None), ("own", 0.1)):
        config = config_of(models, data, num_steps=1, value_lr=value_lr, ppo=PPOSettings(num_epochs=1), output_dir=name)
        ppo.train(config)
    assert same_weights("own/policy", "same/policy")
    own, same = (load_file(f"{name}/value_head/value_head.safetensors") for name in ("own", "same"))
    for name in same:
        torch.testing.assert_close(own[name], 10 * same[name])
        assert same[name].abs().max() > 0


def test_a_run_with_a_learning_rate_of_the_value_head_goes_on_where_it_was(models, data):
    config = config_of(models, data, value_lr=0.05, num_steps=3, save_every=1)
    whole, resumed = metrics_in_one_go_and_in_two(config, cut_at=2)
    assert resumed == whole


@pytest.mark.parametrize("value_lr", [0.0, -1.0, float("inf"), float("nan")])
def test_a_learning_rate_that_makes_no_sense_is_refused_by_name(value_lr):
    with pytest.raises(UserError, match=f"value_lr={value_lr} must be above 0, and finite, or null"):
        PPOConfig(value_lr=value_lr)
