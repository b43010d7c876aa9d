"""Numbers that are not finite: the update is skipped, counted and told of; many in a row end the run."""

import math
from pathlib import Path

import pytest
import tiny_runs
import torch
from tiny_runs import jsonl, metrics_of, same_weights

from ppo_rlhf.cli import main
from ppo_rlhf.config import RewardConfig, SFTConfig
from ppo_rlhf.errors import UserError
from ppo_rlhf.models import load_policy
from ppo_rlhf.settings import OptimizerSettings, PPOSettings, SamplingSettings
from ppo_rlhf.train import ppo, reward_model, sft

BEFORE = 1  # calls of the reward before the first rollout: the held-out prompts


def config(models, **changes):
    settings = {
        "save_every": 1,
        "max_eval_prompts": 4,
        "kl_target": 1.0,
        "ppo": PPOSettings(num_epochs=2, num_minibatches=2),
        "optimizer": OptimizerSettings(lr=1e-2, schedule="constant"),
    }
    return tiny_runs.ppo_config(models, **settings | changes)


def reward_that_is(number, calls):
    """The response's length, but `number` for the third response in these calls."""
    count = 0

    def reward(prompts, responses, **columns):
        nonlocal count
        count += 1
        scores = [float(len(response)) for response in responses]
        if count in calls:
            scores[2] = number
        return scores

    return reward


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_skips_its_update_and_nothing_else(number, models):
    steps = []
    policy, tokenizer = load_policy(models["gpt2"], setting="test")

    def watch(step, metrics):
        steps.append({name: value.clone() for name, value in policy.state_dict().items()})

    ppo.train(
        config(models),
        policy=policy,
        tokenizer=tokenizer,
        reward=reward_that_is(number, {BEFORE + 2}),
        prompts=tiny_runs.prompts(40),
        callbacks=[watch],
    )
    rows = metrics_of("run")
    assert [row["skipped_steps"] for row in rows[1:]] == [0, 4, 0, 0]
    assert rows[2]["objective/score"] is None
    assert all(torch.equal(value, steps[1][name]) for name, value in steps[0].items())
    assert not all(torch.equal(value, steps[2][name]) for name, value in steps[1].items())
    assert all(math.isfinite(row["kl_coef"]) for row in rows[1:])
    assert math.isfinite(rows[4]["objective/kl"])

    (bad,) = jsonl("run/bad_samples.jsonl")
    rollout = [row for row in jsonl("run/samples.jsonl") if row["step"] == 2 and row["kind"] == "rollout"]
    assert (bad["step"], bad["bad"], bad["score"]) == (2, ["score"], None)
    assert len(bad["ids"]) == len(bad["logprobs"]) == len(bad["returns"]) > 0
    assert rollout[0]["prompt"] != bad["prompt"]


def test_a_log_ratio_that_is_not_finite_skips_the_update_and_names_it(models):
    reference, _ = load_policy(models["gpt2"], setting="test")

    def spoil(step, metrics):
        reference.lm_head.weight.data.fill_(math.nan if step == 1 else 0.0)

    reference.lm_head.weight = torch.nn.Parameter(
        reference.lm_head.weight.detach().clone()
    )  # apart from the embeddings
    ppo.train(
        config(models, num_steps=3, eval_every=0),
        reference=reference,
        reward=reward_that_is(0.0, set()),
        prompts=tiny_runs.prompts(40),
        callbacks=[spoil],
    )
    assert [row["skipped_steps"] for row in metrics_of("run")[1:]] == [0, 4, 0]
    assert {tuple(row["bad"]) for row in jsonl("run/bad_samples.jsonl")} == {("log-ratio",)}


def test_a_gradient_that_overflows_alone_saves_the_responses_with_the_largest_returns(models):
    ppo.train(
        config(models, num_steps=1),
        reward=lambda prompts, responses, **_: [1e38 * (1 + index) / 9 for index in range(len(responses))],
        prompts=tiny_runs.prompts(40),
    )
    rows = jsonl("run/bad_samples.jsonl")
    assert {tuple(row["bad"]) for row in rows} == {("gradient",)}
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)


ILL_FROM_THE_FOURTH_CALL = """
from pathlib import Path

calls = []

def ill(prompts, responses, **columns):
    calls.append(1)
    bad = len(calls) > 3 and not Path("cured").exists()
    return [float("nan") if bad else float(len(text)) for text in responses]
"""


def test_skips_in_a_row_end_the_run_with_one_line_that_names_a_checkpoint_from_before(models, data, capfd):
    Path("ill.py").write_text(ILL_FROM_THE_FOURTH_CALL)
    words = (
        f"ppo --policy {models['gpt2']} --prompts {data['prompts']} --reward ill.py:ill --num_steps 20 --batch_size 8"
    )
    words += " --max_eval_prompts 4 --save_every 1 --eval_every 3 --max_skips 3 --keep_checkpoints 1 --output-dir run"
    words += " --sampling.max_new_tokens 4 --missing_eos.rule none"
    assert main(words.split()) == 2
    *told, line = capfd.readouterr().err.splitlines()
    assert line == (
        "error: the 3 updates up to step 5 were skipped, for numbers that are not finite: their samples are in "
        "run/bad_samples.jsonl, run/checkpoints/step_000002 is from before. Lower optimizer.lr, or bound the reward."
    )
    assert sum("was skipped" in line for line in told) == 3
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["step_000002"]
    assert {row["step"] for row in jsonl("run/bad_samples.jsonl")} == {3, 4, 5}

    Path("cured").touch()
    assert main(["ppo", "--resume", "--output-dir", "run", "--reward", "ill.py:ill"]) == 0
    assert [row["step"] for row in metrics_of("run")] == list(range(21))
    assert jsonl("run/bad_samples.jsonl") == []


def test_skips_that_are_not_in_a_row_end_nothing(models):
    bad = {BEFORE + 1, BEFORE + 3}
    ppo.train(config(models, max_skips=2), reward=reward_that_is(math.nan, bad), prompts=tiny_runs.prompts(40))
    assert [row["skipped_steps"] for row in metrics_of("run")[1:]] == [4, 0, 4, 0]


def test_a_score_that_is_not_finite_in_a_later_evaluation_is_null_and_ends_nothing(models):
    last = BEFORE + 4 + 1
    summary = ppo.train(config(models), reward=reward_that_is(math.nan, {last}), prompts=tiny_runs.prompts(40))
    assert summary["score_after"] is None
    assert metrics_of("run")[-1]["eval/score"] is None


SUPERVISED = {
    "sft": (sft, SFTConfig, "demonstrations", "completion"),
    "reward": (reward_model, RewardConfig, "comparisons", "responses"),
}


@pytest.mark.parametrize("stage", SUPERVISED)
def test_a_supervised_run_whose_weights_burst_stops_and_names_a_checkpoint_from_before(stage, models, data):
    module, settings, rows, column = SUPERVISED[stage]
    policy, tokenizer = load_policy(models["gpt2"], setting="test")
    made = settings(
        output_dir="run",
        batch_size=4,
        num_epochs=2.0,
        eval_fraction=0.2,
        eval_every=0,
        save_every=1,
        max_skips=3,
        log_with=(),
        **({"sampling": SamplingSettings(max_new_tokens=4)} if stage == "reward" else {}),
    )

    def burst(step, metrics):
        if step == 2:  # as if the third step's batch had done it
            for parameter in trained:
                parameter.data.fill_(math.nan)

    trained = []
    prepare = module.fit

    def fit(wrapped, *arguments, **options):
        trained.extend(wrapped.parameters())
        return prepare(wrapped, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "fit", fit)
        with pytest.raises(UserError, match=r"the 3 updates up to step 5 were skipped.*step_000002 is from before"):
            module.train(made, policy=policy, tokenizer=tokenizer, data=data[rows], callbacks=[burst])
    assert [row["skipped_steps"] for row in metrics_of("run")[1:]] == [0, 0, 1, 1, 1]
    bad = jsonl("run/bad_samples.jsonl")
    assert [row["step"] for row in bad] == [3] * 4 + [4] * 4 + [5] * 4
    assert all(column in row for row in bad)


def test_an_untouched_run_writes_no_bad_samples(models):
    ppo.train(config(models, num_steps=1), reward=reward_that_is(0.0, set()), prompts=tiny_runs.prompts(40))
    assert not Path("run/bad_samples.jsonl").exists()
    assert not same_weights("run/policy", models["gpt2"])
