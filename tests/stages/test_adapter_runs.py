"""The three stages with adapters: what is saved, what the KL is measured to, and that a resumed run is the same run."""

from dataclasses import replace

import pytest
import torch
from tiny_runs import STOPS, data, in_tmp_path, metrics_of, models, same_weights, without_times

from ppo_rlhf.adapters import has_adapter, rank_of
from ppo_rlhf.config import PPOConfig, RewardConfig, SFTConfig
from ppo_rlhf.errors import UserError
from ppo_rlhf.models import load_policy
from ppo_rlhf.rewards import RewardModel
from ppo_rlhf.run import Run
from ppo_rlhf.settings import LoRASettings, OptimizerSettings, PPOSettings, SamplingSettings
from ppo_rlhf.train import ppo, reward_model, sft

__all__ = ["data", "in_tmp_path", "models"]

LORA = LoRASettings(rank=4, dropout=0.1)
SAMPLING = SamplingSettings(max_new_tokens=6, stop_token_ids=STOPS)
TEXTS = (["red fish 1:", "old stone 2:"], [" the bird .", " blue"])
QUICK = {"eval_fraction": 0.2, "log_with": (), "matmul_precision": "highest", "optimizer": OptimizerSettings(lr=1e-2)}


def tune(models, data, folder, **changes):
    config = SFTConfig(policy=models["llama"], data=data["demonstrations"], output_dir=folder, **QUICK)
    return sft.train(replace(config, **{"lora": LORA, "batch_size": 16, **changes}))


def model_reward(policy, data, folder, **changes):
    config = RewardConfig(policy=policy, data=data["comparisons"], output_dir=folder, sampling=SAMPLING, **QUICK)
    return reward_model.train(
        replace(config, **{"lora": LORA, "batch_size": 16, "normalization_prompts": 8, **changes})
    )


def ppo_config(policy, data, folder, **changes):
    config = PPOConfig(
        policy=policy,
        prompts=data["prompts"],
        reward="user.py:vowels",
        output_dir=folder,
        batch_size=8,
        num_steps=4,
        save_every=2,
        max_eval_prompts=4,
        kl_coef=0.1,
        lora=LORA,
        sampling=SAMPLING,
        ppo=PPOSettings(num_epochs=2, num_minibatches=2),
        **QUICK,
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def trained(models, data, tmp_path_factory):
    """Folders of a policy and of a reward model, each an adapter on the same base."""
    folder = tmp_path_factory.mktemp("trained")
    alone = replace(LORA, merge=False)
    tune(models, data, str(folder / "sft"), lora=alone)
    model_reward(models["llama"], data, str(folder / "reward"), lora=alone)
    return str(folder / "sft" / "policy"), str(folder / "reward" / "reward_model")


def test_sft_with_adapters_lowers_the_loss_and_saves_plain_weights(models, data):
    summary = tune(models, data, "sft", num_epochs=3)
    assert summary["loss_after"] < summary["loss_before"] - 0.02
    loaded, _ = load_policy("sft/policy", setting="policy")
    assert not has_adapter(loaded)
    base, _ = load_policy(models["llama"], setting="policy")
    moved = {n for n, w in loaded.named_parameters() if not torch.equal(w, base.get_parameter(n))}
    assert moved == {n for n, w in loaded.named_parameters() if "_proj." in n}


def test_a_reward_model_s_head_and_normalisation_are_saved_with_its_adapter(models, data, monkeypatch):
    saved = {}
    monkeypatch.setattr(
        "ppo_rlhf.train.reward_model.save_with_card",
        lambda model, path, *_: (
            model.save(path),
            saved.update(scores=model(*TEXTS), rank=rank_of(model.classifier)),
        ),
    )
    model_reward(models["llama"], data, "reward", lora=replace(LORA, merge=False))
    loaded = RewardModel.load("reward/reward_model", setting="reward")
    assert saved["rank"] == rank_of(loaded.classifier) == LORA.rank
    assert loaded.scale != 1
    assert torch.equal(loaded(*TEXTS), saved["scores"])
    assert not torch.equal(loaded.raw_scores(loaded.encode(*TEXTS)), saved["scores"])


def test_a_merged_reward_model_scores_as_its_adapter_does(models, data):
    for name, merge in (("merged", True), ("adapter", False)):
        model_reward(models["llama"], data, name, lora=replace(LORA, merge=merge))
    one, other = (RewardModel.load(f"{name}/reward_model", setting="reward") for name in ("merged", "adapter"))
    assert not has_adapter(one.classifier)
    torch.testing.assert_close(one(*TEXTS), other(*TEXTS), rtol=1e-4, atol=1e-4)


STARTS = {"a new adapter": 4, "a trained adapter": 0}


@pytest.mark.parametrize("rank", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("value_model", ["shared", "separate"])
def test_the_kl_to_the_reference_starts_at_zero_and_a_resumed_run_ends_the_same(
    rank, value_model, models, data, trained, monkeypatch
):
    changes = {"value_model": value_model, "lora": replace(LORA, rank=rank)}
    config = ppo_config(trained[0] if rank == 0 else models["llama"], data, "whole", **changes)
    ppo.train(config)
    rows = metrics_of("whole")
    assert rows[0]["eval/kl"] == 0
    assert rows[1]["objective/kl"] == 0
    assert rows[1]["policy/first_kl"] == 0
    assert rows[-1]["eval/kl"] > 1e-3

    log = Run.log
    with monkeypatch.context() as patch:

        def failing(self, number, metrics):
            assert number != 4, "power cut"
            log(self, number, metrics)

        patch.setattr(Run, "log", failing)
        with pytest.raises(AssertionError, match="power cut"):
            ppo.train(replace(config, output_dir="resumed"))
    ppo.train(replace(config, output_dir="resumed", resume=True))
    assert without_times(metrics_of("resumed")) == without_times(rows)
    assert same_weights("whole/policy", "resumed/policy")


def test_policy_reference_value_and_reward_hold_one_base_between_them(models, data, trained, monkeypatch):
    policy, reward = trained
    seen = []

    def load_parts(*arguments):
        seen.append(load(*arguments))
        return seen[0]

    load = ppo.load_parts
    monkeypatch.setattr(ppo, "load_parts", load_parts)
    ppo.train(ppo_config(policy, data, "run", num_steps=1, reward=reward, value_model="separate"))
    (parts,) = seen
    base, _ = load_policy(models["llama"], setting="policy")
    four = [parts.model.language_model, parts.reference, parts.model.value_model.trunk, parts.reward.classifier]
    memory = {w.untyped_storage().data_ptr(): w.numel() for model in four for n, w in model.named_parameters()}
    own = sum(w.numel() for model in four for n, w in model.named_parameters() if "lora_" in n or "score" in n)
    assert sum(memory.values()) == base.num_parameters() + own


def test_rounding_what_an_adapter_shares_is_refused(models, data):
    with pytest.raises(UserError, match="frozen_precision=bf16 would round"):
        ppo.train(ppo_config(models["llama"], data, "run", frozen_precision="bf16"))
