"""What the stages compute: `train()` with objects, and what each setting does to the metrics."""

import copy
import itertools
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_runs
import torch
from tiny_runs import STOPS, metrics_of, same_weights, without_times

from ppo_rlhf.config import MissingEOS, PPOConfig, RewardConfig, SFTConfig
from ppo_rlhf.errors import UserError
from ppo_rlhf.models import load_policy
from ppo_rlhf.report import outcome_lines, write_report
from ppo_rlhf.rewards import RewardModel
from ppo_rlhf.settings import OptimizerSettings, PPOSettings, SamplingSettings
from ppo_rlhf.train import ppo, reward_model, sft

SAMPLING = SamplingSettings(max_new_tokens=6, stop_token_ids=STOPS)


def length(prompts, responses, **columns):
    return [len(response) / 10 for response in responses]


def sft_config(models, files, /, **changes):
    settings = {
        "policy": models["gpt2"],
        "data": files["demonstrations"],
        "output_dir": "sft",
        "batch_size": 4,
        "eval_fraction": 0.2,
        "eval_every": 0,
        "save_every": 0,
        "log_with": (),
        "optimizer": OptimizerSettings(lr=1e-2, schedule="constant"),
    }
    return SFTConfig(**settings | changes)


def reward_config(models, files, /, **changes):
    settings = {
        "policy": models["gpt2"],
        "data": files["comparisons"],
        "output_dir": "reward",
        "batch_size": 4,
        "eval_fraction": 0.2,
        "eval_every": 0,
        "save_every": 0,
        "log_with": (),
        "normalization_prompts": 16,
        "sampling": SAMPLING,
        "optimizer": OptimizerSettings(lr=1e-2),
    }
    return RewardConfig(**settings | changes)


def ppo_config(models, files, /, **changes):
    settings = {
        "policy": models["gpt2"],
        "prompts": files["prompts"],
        "reward": "user.py:length",
        "output_dir": "ppo",
        "num_steps": 2,
        "batch_size": 8,
        "eval_every": 0,
        "save_every": 0,
        "max_eval_prompts": 4,
        "log_with": (),
        "sampling": SAMPLING,
        "ppo": PPOSettings(num_epochs=2, num_minibatches=2),
        "optimizer": OptimizerSettings(lr=1e-2, schedule="constant"),
    }
    return PPOConfig(**settings | changes)


def assert_close(one, other, tolerance=1e-5, without=()):
    """The metrics of two runs agree in every number but the times."""
    for a, b in zip(without_times(metrics_of(one)), without_times(metrics_of(other)), strict=True):
        a, b = ({name: row[name] for name in row if name not in without} for row in (a, b))
        assert a == pytest.approx(b, abs=tolerance, rel=tolerance)


# ------------------------------------------------------------------------------------------------ objects


def test_the_three_stages_take_objects_instead_of_paths(models):
    policy, tokenizer = load_policy(models["llama"], setting="test")
    sft_config_ = SFTConfig(output_dir="sft", batch_size=4, eval_fraction=0.2, log_with=())
    summary = sft.train(sft_config_, policy=policy, tokenizer=tokenizer, data=tiny_runs.demonstrations(20))
    assert summary["output_dir"] == "sft"
    assert Path("sft/summary.json").exists()

    config = RewardConfig(
        output_dir="reward", batch_size=4, eval_fraction=0.2, normalization_prompts=4, sampling=SAMPLING, log_with=()
    )
    made = copy.deepcopy(policy)
    summary = reward_model.train(
        config, policy=made, tokenizer=tokenizer, data=tiny_runs.comparisons(20), gold=lambda p, r: [len(x) for x in r]
    )
    assert 0 <= summary["pairwise_accuracy"] <= 1

    seen = []
    config = PPOConfig(
        output_dir="ppo",
        num_steps=2,
        batch_size=4,
        sampling=SAMPLING,
        max_eval_prompts=2,
        log_with=(),
        optimizer=OptimizerSettings(lr=1e-2),
    )
    before = copy.deepcopy(policy.state_dict())
    summary = ppo.train(
        config,
        policy=policy,
        tokenizer=tokenizer,
        reference=made,
        reward=lambda prompts, responses: [1.0 for _ in responses],
        gold=lambda prompts, responses: torch.arange(len(responses)),
        prompts=tiny_runs.prompts(20),
        callbacks=[lambda step, metrics: seen.append((step, metrics["objective/score"]))],
    )
    assert seen == [(1, 1.0), (2, 1.0)]
    assert summary["score_before"] == summary["score_after"] == 1
    assert summary["gold_score_before"] == 0.5
    assert any(not torch.equal(before[name], value) for name, value in policy.state_dict().items())
    assert [row["objective/gold_score"] for row in metrics_of("ppo")[1:]] == [1.5, 1.5]


@pytest.mark.parametrize("given", ["policy", "tokenizer"])
@pytest.mark.parametrize("stage", [sft, reward_model, ppo])
def test_a_policy_or_a_tokenizer_alone_is_refused(stage, given, models, data):
    config = {sft: sft_config, reward_model: reward_config, ppo: ppo_config}[stage](models, data, output_dir="out")
    made = dict(zip(("policy", "tokenizer"), load_policy(models["llama"], setting="test"), strict=True))
    with pytest.raises(UserError, match="policy and tokenizer go together"):
        stage.train(config, **{given: made[given]})
    assert not Path("out").exists()


@pytest.mark.parametrize("module", [sft, reward_model])
def test_callbacks_are_called_after_each_step_of_the_supervised_stages(module, models, data):
    seen = []
    config = (sft_config if module is sft else reward_config)(models, data, num_epochs=0.5)
    module.train(config, callbacks=[lambda step, metrics: seen.append((step, metrics["loss"]))])
    assert [step for step, _ in seen] == [1, 2, 3, 4]


def test_the_other_columns_of_the_prompts_reach_the_reward_function(models, data):
    rows = [{**row, "bonus": index} for index, row in enumerate(tiny_runs.prompts(20))]
    calls = []

    def reward(prompts, responses, *, bonus):
        calls.append(list(zip(prompts, bonus, strict=True)))
        return bonus

    ppo.train(ppo_config(models, data, num_steps=1), reward=reward, prompts=rows)
    expected = {row["prompt"]: row["bonus"] for row in rows}
    assert all(expected[prompt] == bonus for call in calls for prompt, bonus in call)
    paid, row = [bonus for _, bonus in calls[1]], metrics_of("ppo")[1]
    assert row["objective/score"] == sum(paid) / 8
    assert row["objective/score_std"] == pytest.approx(statistics.pstdev(paid))


@pytest.mark.parametrize("name", ["gpt2", "llama", "pad_is_eos"])
def test_all_stages_run_on_all_kinds_of_models(name, models, data):
    sft.train(sft_config(models, data, policy=models[name], num_epochs=0.25))
    reward_model.train(reward_config(models, data, policy="sft/policy", num_epochs=0.25))
    ppo.train(
        ppo_config(models, data, policy="sft/policy", reward="reward/reward_model", value_model="separate", num_steps=1)
    )
    tokenizer = load_policy("ppo/policy", setting="test")[1]
    assert tokenizer.eos_token_id == 0
    assert tokenizer.pad_token_id not in (0, None)
    assert metrics_of("ppo")[1]["policy/ratio"] > 0
    assert math.isfinite(metrics_of("ppo")[1]["loss/value"])


# ---------------------------------------------------------------------------------------- reproducibility

STAGES = {
    "sft": (sft, sft_config, "policy", {"num_epochs": 0.5}),
    "reward": (reward_model, reward_config, "reward_model", {"num_epochs": 0.5}),
    "ppo": (ppo, ppo_config, "policy", {}),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_seed_gives_the_same_run_twice_and_another_seed_another_one(stage, models, data):
    module, config_of, model, changes = STAGES[stage]
    changes = {**changes, "policy": models["dropout"]}
    for folder, seed in (("one", 0), ("two", 0), ("other", 1)):
        torch.rand(3)  # what ran before in this process must not matter
        module.train(config_of(models, data, output_dir=folder, seed=seed, **changes))
    assert without_times(metrics_of("one")) == without_times(metrics_of("two"))
    assert same_weights(f"one/{model}", f"two/{model}")
    assert without_times(metrics_of("one")) != without_times(metrics_of("other"))
    assert not same_weights(f"one/{model}", f"other/{model}")


@pytest.mark.parametrize("stage", STAGES)
def test_the_size_of_micro_batches_changes_nothing(stage, models, data):
    module, config_of, _, changes = STAGES[stage]
    for folder, size in (("whole", None), ("threes", 3), ("ones", 1)):
        if stage == "ppo":
            changes = {"ppo": PPOSettings(num_epochs=2, num_minibatches=2, micro_batch_size=size)}
        else:
            changes = changes | {"micro_batch_size": size}
        if stage == "reward":
            changes = changes | {"language_model_coef": 0.3, "data": data["rankings"]}
        module.train(config_of(models, data, output_dir=folder, optimizer=OptimizerSettings(lr=1e-3), **changes))
    assert_close("threes", "whole")
    assert_close("ones", "whole")


@pytest.mark.parametrize("policy", ["gpt2", "llama"])
@pytest.mark.parametrize("value_model", ["shared", "separate"])
def test_gradient_checkpointing_changes_nothing_but_memory(policy, value_model, models, data):
    for folder, on in (("with", True), ("without", False)):
        ppo.train(
            ppo_config(
                models,
                data,
                policy=models[policy],
                output_dir=folder,
                gradient_checkpointing=on,
                value_model=value_model,
            )
        )
    assert_close("with", "without")


def test_the_batch_size_of_sampling_changes_nothing(models, data):
    for folder, size in (("one", 256), ("two", 3)):
        ppo.train(ppo_config(models, data, output_dir=folder, sampling=replace(SAMPLING, batch_size=size)))
    assert_close("one", "two", tolerance=1e-4)


# -------------------------------------------------------------------------------------------- supervised


def test_the_best_policy_is_kept_where_the_last_one_is_worse(models, data):
    optimizer = OptimizerSettings(lr=0.5, schedule="constant", warmup_steps=12)
    changes = {"eval_every": 1, "num_epochs": 1.5, "optimizer": optimizer}
    for folder, keep_best in (("best", True), ("last", False)):
        summary = sft.train(sft_config(models, data, output_dir=folder, keep_best=keep_best, **changes))
        losses = [row["eval/loss"] for row in metrics_of(folder)][1:]
        assert min(losses) < losses[-1] - 0.1
        assert summary["loss_after"] == (min(losses) if keep_best else losses[-1])
        kept = sft.train(
            sft_config(models, data, output_dir=f"{folder}-again", policy=f"{folder}/policy", num_epochs=0.1)
        )
        assert kept["loss_before"] == pytest.approx(summary["loss_after"], abs=1e-5)


def test_a_run_whose_evaluation_is_not_a_number_still_ends_and_says_null(models, data):
    optimizer = OptimizerSettings(lr=1e30, schedule="constant")
    summary = sft.train(sft_config(models, data, num_epochs=0.5, optimizer=optimizer, max_grad_norm=1e30))
    assert summary["loss_after"] is None
    assert tiny_runs.strict(Path("sft/summary.json").read_text())["loss_after"] is None
    assert metrics_of("sft")[-1]["eval/loss"] is None
    assert Path("sft/policy/model.safetensors").exists()
    assert "to not finite nats a token" in write_report([Path("sft")]).read_text()
    assert "→ not finite nats a token" in outcome_lines(Path("sft"))[0]


def test_an_update_of_which_every_step_was_skipped_says_null(models, data):
    """The gradient of a reward that float32 can hold, but not square, is not finite."""
    config = ppo_config(models, data, missing_eos=MissingEOS("none"))
    ppo.train(config, reward=lambda prompts, responses, **_: [1e38] * len(responses))
    for row in metrics_of("ppo")[1:]:
        assert (row["optimizer_steps"], row["skipped_steps"]) == (0, 4)
        assert row["loss/policy"] is None
        assert row["grad_norm"] is None
    assert same_weights("ppo/policy", models["gpt2"])
    assert "raised the reward model’s score" in write_report([Path("ppo")]).read_text()


def test_fine_tuning_learns_its_demonstrations_and_to_stop(models):
    rows = [{"prompt": f"red {index}:", "completion": " blue bird ."} for index in range(40)]
    summary = sft.train(
        sft_config(models, {"demonstrations": None}, num_epochs=12, optimizer=OptimizerSettings(lr=2e-2)), data=rows
    )
    assert summary["loss_after"] < 0.1 < summary["loss_before"]
    samples = tiny_runs.jsonl("sft/samples.jsonl")
    assert all(row["demonstration"] == " blue bird ." for row in samples)
    assert not any(row["response"] == " blue bird ." for row in samples[:8])
    assert sum(row["response"] == " blue bird ." and row["finished"] for row in samples[-8:]) >= 6
    ppo.train(
        PPOConfig(
            policy="sft/policy",
            output_dir="ppo",
            num_steps=1,
            batch_size=4,
            max_eval_prompts=4,
            sampling=SamplingSettings(max_new_tokens=8),
            log_with=(),
        ),
        reward=lambda prompts, responses: [float(response == " blue bird .") for response in responses],
        prompts=[{"prompt": row["prompt"]} for row in rows],
    )
    assert metrics_of("ppo")[1]["objective/score"] >= 0.75
    assert metrics_of("ppo")[1]["response/stop_rate"] >= 0.75


def test_sampling_beside_the_demonstrations_changes_nothing_else(models, data, monkeypatch):
    config = sft_config(models, data, policy=models["dropout"], eval_every=2)
    sft.train(config)
    monkeypatch.setattr(sft, "responses_beside", lambda *_, **__: [])
    sft.train(replace(config, output_dir="without"))
    assert not Path("without/samples.jsonl").exists()
    assert metrics_of("without") == metrics_of("sft")
    assert same_weights("without/policy", "sft/policy")


def test_plain_texts_have_no_prompts_to_respond_to(models, data):
    sft.train(sft_config(models, data, num_epochs=0.25), data=[{"text": f"red fish {index}"} for index in range(20)])
    assert not Path("sft/samples.jsonl").exists()


def test_responses_to_prompts_that_nearly_fill_the_context_end_where_it_does(models, data):
    prompt = "zq" * 29  # a token a letter
    rows = [{"prompt": f"{prompt}{index:02}", "completion": "."} for index in range(20)]
    sft.train(sft_config(models, data, num_epochs=0.25), data=rows)  # GPT-2 has no position beyond its context
    assert len(tiny_runs.jsonl("sft/samples.jsonl")) == 2 * 4


def test_long_demonstrations_are_cut_and_counted(models, data, capfd):
    sft.train(sft_config(models, data, num_epochs=0.2, max_length=12))
    assert "of 32 demonstrations were cut on the right to max_length=12 tokens." in capfd.readouterr().err


def test_the_learning_rate_follows_its_schedule(models, data):
    steps = range(8)
    expected = {
        ("constant", 0): [1e-2] * 8,
        ("linear", 0): [1e-2 * (1 - step / 8) for step in steps],
        ("cosine", 0): [1e-2 * (1 + math.cos(math.pi * step / 8)) / 2 for step in steps],
        # the warm-up climbs to the highest rate, which its first step after has
        ("constant", 3): [0.25e-2, 0.5e-2, 0.75e-2] + [1e-2] * 5,
        ("linear", 3): [0.25e-2, 0.5e-2, 0.75e-2] + [1e-2 * (1 - k / 5) for k in range(5)],
        ("cosine", 3): [0.25e-2, 0.5e-2, 0.75e-2] + [1e-2 * (1 + math.cos(math.pi * k / 5)) / 2 for k in range(5)],
    }
    for (schedule, warmup), rates in expected.items():
        folder = f"{schedule}-{warmup}"
        optimizer = OptimizerSettings(lr=1e-2, schedule=schedule, warmup_steps=warmup)
        sft.train(sft_config(models, data, output_dir=folder, optimizer=optimizer))
        assert [row["lr"] for row in metrics_of(folder)[1:]] == pytest.approx(rates)
    ppo.train(ppo_config(models, data, num_steps=4, optimizer=OptimizerSettings(lr=1e-2)))
    assert [row["lr"] for row in metrics_of("ppo")[1:]] == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])


def test_an_evaluation_that_is_not_a_number_is_never_the_best(models, data, monkeypatch):
    losses = iter([6.0, math.nan, 5.0, math.nan, 5.5])  # before and after each of four steps
    monkeypatch.setattr(sft, "held_out_loss", lambda *_, **__: next(losses))
    summary = sft.train(sft_config(models, data, batch_size=8, eval_every=1))
    assert next(losses, None) is None
    assert summary["loss_after"] == 5.0


# ------------------------------------------------------------------------------------------ reward model


def test_the_starting_policy_s_samples_score_zero_on_average_with_deviation_one(models, data):
    from ppo_rlhf.data import load_rows
    from ppo_rlhf.train.reward_model import policy_samples

    config = reward_config(models, data, prompts=data["prompts"])
    summary = reward_model.train(config)
    policy, tokenizer = load_policy(models["gpt2"], setting="test")
    rows = load_rows(data["prompts"], required=("prompt",), setting="test")
    model = RewardModel.load("reward/reward_model", setting="test")
    scores = model(*policy_samples(policy, tokenizer, rows, config))
    assert len(scores) == 16
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert (summary["mean"], summary["scale"]) == (pytest.approx(model.mean), pytest.approx(model.scale))


@pytest.mark.parametrize("rows", ["comparisons", "rankings"])
def test_a_reward_model_learns_to_prefer_what_was_preferred(rows, models, data):
    summary = reward_model.train(reward_config(models, data, data=data[rows], num_epochs=4))
    assert summary["pairwise_accuracy"] >= 0.9
    assert summary["loss_after"] < summary["loss_before"]
    model = RewardModel.load("reward/reward_model", setting="test")
    given = (tiny_runs.rankings if rows == "rankings" else tiny_runs.comparisons)(10)
    better = [row["responses"][1] if rows == "rankings" else row["chosen"] for row in given]
    worse = [row["responses"][0] if rows == "rankings" else row["rejected"] for row in given]
    prompts = [row["prompt"] for row in given]
    assert (model(prompts, better) > model(prompts, worse)).float().mean() >= 0.9


def test_accuracy_is_against_the_gold_order_where_there_is_one(models, data):
    against_labels = reward_model.train(reward_config(models, data, num_epochs=4))
    upside_down = reward_model.train(
        reward_config(models, data, output_dir="gold", num_epochs=4),
        gold=lambda prompts, responses: [-len(response) for response in responses],
    )
    assert upside_down["label_accuracy"] == against_labels["pairwise_accuracy"] >= 0.9
    assert upside_down["pairwise_accuracy"] == pytest.approx(1 - upside_down["label_accuracy"])


# ---------------------------------------------------------------------------------------------------- PPO


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (3, 1), (2, 4)])
def test_an_update_takes_exactly_epochs_times_minibatches_optimizer_steps(
    epochs, minibatches, models, data, monkeypatch
):
    taken = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *given, **named: taken.append(1) or step(*given, **named))
    settings = PPOSettings(num_epochs=epochs, num_minibatches=minibatches)
    ppo.train(ppo_config(models, data, num_steps=2, ppo=settings))
    assert len(taken) == 2 * epochs * minibatches
    for row in metrics_of("ppo")[1:]:
        counts = row["optimizer_steps"], row["skipped_steps"], row["stopped_steps"]
        assert counts == (epochs * minibatches, 0, 0)


def test_the_first_ratio_of_an_update_is_one(models, data):
    ppo.train(ppo_config(models, data, num_steps=2, ppo=PPOSettings(num_epochs=1)))
    for row in metrics_of("ppo")[1:]:
        assert row["policy/ratio"] == pytest.approx(1, abs=1e-5)
        assert row["policy/approx_kl"] == pytest.approx(0, abs=1e-6)
        assert row["policy/clip_fraction"] == 0


@pytest.mark.parametrize(
    ("rule", "paid"),
    [
        (MissingEOS("none"), lambda score, finished: score),
        (MissingEOS("set", -3.0), lambda score, finished: score if finished else -3.0),
        (MissingEOS("subtract", 0.5), lambda score, finished: score if finished else score - 0.5),
    ],
    ids=["none", "set", "subtract"],
)
def test_a_response_that_was_cut_off_is_paid_by_the_rule(rule, paid, models, data):
    ppo.train(ppo_config(models, data, missing_eos=rule, kl_coef=0.0, num_steps=4))
    rows = [row for row in tiny_runs.jsonl("ppo/samples.jsonl") if row["kind"] == "rollout"]
    assert {row["finished"] for row in rows} == {True, False}
    for row in rows:
        assert row["score"] == pytest.approx(len(row["response"]) / 10)
        assert sum(row["rewards"]) == pytest.approx(paid(row["score"], row["finished"]), abs=1e-4)


def test_the_kl_coefficient_adapts_by_the_rule_of_ziegler_et_al(models, data):
    ppo.train(ppo_config(models, data, num_steps=5, kl_coef=0.3, kl_target=2.0, kl_horizon=40))
    rows = metrics_of("ppo")[1:]
    assert rows[0]["kl_coef"] == 0.3
    # No KL yet: the error is −1, clipped to −0.2; 8 of 40 episodes: 0.3 · (1 − 0.2 · 0.2) = 0.288.
    assert rows[1]["kl_coef"] == pytest.approx(0.288)
    for row, following in itertools.pairwise(rows):
        error = max(-0.2, min(0.2, row["objective/kl"] / 2 - 1))
        assert following["kl_coef"] == pytest.approx(row["kl_coef"] * (1 + error / 5))


def test_the_kl_is_measured_to_the_policy_at_the_start_or_to_a_given_reference(models, data):
    ppo.train(ppo_config(models, data, num_steps=2))
    assert metrics_of("ppo")[1]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert metrics_of("ppo")[2]["objective/kl"] != pytest.approx(0, abs=1e-3)
    tokens = tiny_runs.tokenizer()
    other = tiny_runs.save("other", tiny_runs.model(tokens, seed=5), tokens)
    ppo.train(ppo_config(models, data, output_dir="far", num_steps=1, reference=other))
    assert metrics_of("far")[1]["objective/kl"] > 0.1


def test_a_separate_value_model_leaves_the_policy_s_trunk_to_the_policy(models, data):
    """A constant reward with γ = λ = 1 and a zero value leaves no advantage: the value loss alone has a gradient."""
    settings = PPOSettings(num_epochs=1, value_coef=1.0)
    changes = {"ppo": settings, "kl_coef": 0.0, "missing_eos": MissingEOS("none"), "num_steps": 1, "gae_lambda": 1.0}
    for value_model in ("shared", "separate"):
        ppo.train(
            ppo_config(models, data, output_dir=value_model, value_model=value_model, **changes),
            reward=lambda prompts, responses, **_: [1.0] * len(responses),
        )
        assert metrics_of(value_model)[1]["loss/value"] == pytest.approx(0.5)  # ½ (0 − 1)²
    start = tiny_runs.weights_of(models["gpt2"])
    moved = {
        folder: max(
            float((value - start[name]).abs().max()) for name, value in tiny_runs.weights_of(f"{folder}/policy").items()
        )
        for folder in ("shared", "separate")
    }
    assert moved["separate"] < 1e-4
    assert moved["shared"] < 1e-4  # the head starts at zero: in its first step nothing flows through it to the trunk


def test_a_separate_value_model_starts_from_the_reward_model(models, data):
    reward_model.train(reward_config(models, data))
    ppo.train(ppo_config(models, data, reward="reward/reward_model", value_model="separate", num_steps=1))
    rows = [row for row in tiny_runs.jsonl("ppo/samples.jsonl") if row["kind"] == "rollout"]
    model = RewardModel.load("reward/reward_model", setting="test")
    for row in rows:
        prompt = model.tokenizer(row["prompt"])["input_ids"]
        with torch.no_grad():
            raw, _ = model.network(torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.bool))
        # The first decision is made after the prompt: its value is what the reward model makes of the prompt alone.
        assert row["values"][0] == pytest.approx((float(raw) - model.mean) / model.scale, abs=1e-3)


def test_ppo_raises_the_score_of_an_easy_reward(models, data):
    summary = ppo.train(
        ppo_config(models, data, num_steps=12, kl_coef=0.0, missing_eos=MissingEOS("none"), max_eval_prompts=4),
        reward=lambda prompts, responses, **_: [response.count("e") for response in responses],
    )
    assert summary["score_after"] > summary["score_before"]
    rows = metrics_of("ppo")
    assert rows[-1]["objective/score"] > rows[1]["objective/score"] + 0.2


def test_the_best_policy_by_score_minus_kl_is_kept_beside_the_last_one(models, data):
    settings = {"num_steps": 4, "eval_every": 1, "missing_eos": MissingEOS("none")}
    ppo.train(ppo_config(models, data, **settings, optimizer=OptimizerSettings(lr=0.1)))
    rows = metrics_of("ppo")[1:]
    quality = [row["eval/score"] - 0.05 * row["eval/kl"] for row in rows]
    best = quality.index(max(quality))
    changes = {"num_steps": 1, "policy": "ppo/best", "reference": models["gpt2"]}
    ppo.train(ppo_config(models, data, output_dir="again", **changes))
    assert metrics_of("again")[0]["eval/score"] == pytest.approx(rows[best]["eval/score"])


def test_a_truncating_sampler_says_that_its_kl_is_biased(models, data):
    with pytest.warns(UserWarning, match="top_k"):
        ppo.train(ppo_config(models, data, num_steps=1, sampling=replace(SAMPLING, top_k=5)))


# ------------------------------------------------------------------------------------------------- throughput, memory


def test_every_ppo_step_tells_its_throughput_and_its_memory(models, data, capsys):
    ppo.train(ppo_config(models, data))
    for row in metrics_of("ppo")[1:]:
        assert row["throughput/sampled"] > 0
        assert row["throughput/trained"] > 0
        assert 0 < row["throughput/matmul_share"] < 1
        assert 0 <= row["throughput/padding"] < 1
        assert 0 <= row["throughput/computed_padding"] < 1
        assert 0.05 < row["memory/peak_gib"] < 500
    told = capsys.readouterr().err
    assert "matrix products: " in told
    assert "tokens/s" in told
    assert "of peak" in told


@pytest.mark.parametrize("value_model", ["shared", "separate"])
def test_frozen_models_hold_no_gradients_and_where_told_half_the_bytes(models, data, value_model, monkeypatch):
    reward_model.train(reward_config(models, data, num_epochs=0.2))
    seen = []
    load = ppo.load_parts
    monkeypatch.setattr(ppo, "load_parts", lambda *arguments: seen.append(load(*arguments)) or seen[0])
    ppo.train(ppo_config(models, data, reward="reward/reward_model", frozen_precision="bf16", value_model=value_model))
    parts = seen[0]
    for frozen in (parts.reference, parts.reward.classifier):
        assert all(p.grad is None for p in frozen.parameters())
        assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in parts.model.parameters()} == {torch.float32}
    assert all(math.isfinite(row["objective/kl"]) for row in metrics_of("ppo")[1:])
