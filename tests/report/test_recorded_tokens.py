"""What samples.jsonl records of each token, and that recording changes no training."""

from pathlib import Path

import pytest
import report_cases
import tiny_runs
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import ppo_rlhf.train.ppo
from ppo_rlhf.train import ppo
from ppo_rlhf.train.ppo_records import fragments


def shown(trained):
    """The run as the report's inspector is given it."""
    (run,) = report_cases.inspected_in(report_cases.report_of(Path(trained.output_dir)))
    return run


def recomputed(model_folder, trained, row, head=None):
    """log π and, with a value head, V of each recorded token, by plain transformers over prompt and response."""
    tokenizer = AutoTokenizer.from_pretrained(Path(trained.output_dir) / "policy")
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    prompt = tokenizer(row["prompt"])["input_ids"]
    with torch.no_grad():
        output = model(torch.tensor([prompt + row["ids"]]), output_hidden_states=True)
    predicting = slice(len(prompt) - 1, -1)
    logprobs = (output.logits[0, predicting] / trained.sampling.temperature).log_softmax(-1)
    values = output.hidden_states[-1][0, predicting] @ head["weight"][0] + head["bias"] if head else None
    return logprobs.gather(1, torch.tensor(row["ids"])[:, None])[:, 0], values


def last_row(trained, kind):
    rows = tiny_runs.jsonl(Path(trained.output_dir) / "samples.jsonl")
    last = [row for row in rows if row["kind"] == kind and row["step"] == trained.num_steps]
    return next(row for row in last if len(row["ids"]) > 3)


def as_shown(trained, row):
    rows = shown(trained)["held_out" if row["kind"] == "held-out" else "rollouts"]
    keys = ("step", "prompt", "response")
    return next(each for each in rows if all(each[key] == row[key] for key in keys))


def test_three_tokens_have_the_numbers_that_the_saved_models_give_them(trained, models):
    row = last_row(trained, "held-out")
    seen = as_shown(trained, row)
    (checkpoint,) = (Path(trained.output_dir) / "checkpoints").iterdir()
    weights = load_file(checkpoint / "model.safetensors")
    head = {name: weights[f"value_head.{name}"] for name in ("weight", "bias")}
    logprobs, values = recomputed(Path(trained.output_dir) / "policy", trained, row, head)
    ref_logprobs, _ = recomputed(models["gpt2"], trained, row)
    rewards = -trained.kl_coef * (logprobs - ref_logprobs)
    rewards[-1] += row["score"] if row["finished"] else trained.missing_eos.value
    last = len(row["ids"]) - 1
    following = [*values.tolist()[1:], 0.0]
    deltas = [rewards[t].item() + following[t] - values[t].item() for t in range(last + 1)]
    assert values.abs().max() > 0.01
    for t in (0, 1, last):
        advantage = sum(0.9 ** (later - t) * deltas[later] for later in range(t, last + 1))
        assert seen["logprobs"][t] == pytest.approx(logprobs[t].item(), abs=1e-5)
        assert seen["ref_logprobs"][t] == pytest.approx(ref_logprobs[t].item(), abs=1e-5)
        assert seen["values"][t] == pytest.approx(values[t].item(), abs=1e-5)
        assert seen["advantages"][t] == pytest.approx(advantage, abs=1e-5)


def test_after_the_last_epoch_a_rollout_s_tokens_have_the_saved_policy_s_log_probabilities(trained):
    row = last_row(trained, "rollout")
    seen = as_shown(trained, row)
    logprobs, _ = recomputed(Path(trained.output_dir) / "policy", trained, row)
    assert len(seen["new"]) == trained.ppo.num_epochs
    assert seen["new"][-1] == pytest.approx(logprobs.tolist(), abs=1e-5)
    moves = [max(abs(a - b) for a, b in zip(new, row["logprobs"], strict=True)) for new in seen["new"]]
    assert 1e-3 < moves[0] < moves[-1]


def test_recording_after_each_epoch_changes_no_training(trained, models, data, monkeypatch):
    def blind(*given, after_epoch, **more):
        return update(*given, **more)

    update = ppo_rlhf.train.ppo.ppo_update
    monkeypatch.setattr(ppo_rlhf.train.ppo, "ppo_update", blind)
    ppo.train(report_cases.config_of(models, data, "blind"), reward=report_cases.length)
    one, other = (tiny_runs.without_times(tiny_runs.metrics_of(run)) for run in ("blind", trained.output_dir))
    assert one == other
    assert tiny_runs.same_weights("blind/policy", Path(trained.output_dir) / "policy")


def test_recording_draws_no_randomness_where_dropout_was_left_on():
    policy = nn.Sequential(nn.Dropout(0.5))
    policy.forward = lambda x, only: type(
        "Evaluation", (), {"logprobs": nn.functional.dropout(x, 0.5, policy.training)}
    )
    rollout = type("Rollout", (), {"inputs": {"x": torch.ones(4, 3)}})
    torch.manual_seed(0)
    before = torch.get_rng_state()
    seen = ppo_rlhf.train.ppo.recorded_logprobs(policy, rollout)
    assert torch.equal(seen, torch.ones(2, 3))
    assert torch.equal(torch.get_rng_state(), before)
    assert policy.training


def test_the_same_prompts_are_recorded_at_every_evaluation(trained):
    rows = tiny_runs.jsonl(Path(trained.output_dir) / "samples.jsonl")
    held_out = [row for row in rows if row["kind"] == "held-out"]
    prompts = {step: [row["prompt"] for row in held_out if row["step"] == step] for step in (0, 2, 3)}
    assert prompts[0] == prompts[2] == prompts[3]
    assert len(prompts[0]) == 4
    for row in held_out:
        assert row["kl_coef"] == 0.2
        assert sum(row["logprobs"]) - sum(row["ref_logprobs"]) == pytest.approx(row["kl"], abs=1e-4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ab", []),
        ("你", [(0, 3, "你")]),
        ("a你好", [(1, 3, "你"), (4, 3, "好")]),
        ("👋!", [(0, 4, "👋")]),
        ("é", [(0, 2, "é")]),
    ],
)
def test_tokens_that_are_a_character_only_together_are_named(text, expected):
    tokenizer = tiny_runs.tokenizer()
    assert fragments(tokenizer(text)["input_ids"], tokenizer) == expected


def test_bytes_that_make_no_character_are_left_as_they_are():
    tokenizer = tiny_runs.tokenizer()
    lead, *_ = tokenizer("你")["input_ids"]
    plain = tokenizer("ab")["input_ids"]
    assert fragments([lead, lead, *plain], tokenizer) == []
    assert fragments([lead, *tokenizer("é")["input_ids"]], tokenizer) == [(1, 2, "é")]
