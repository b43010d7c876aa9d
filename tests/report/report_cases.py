"""Run folders made by hand, one that was really trained, and what a page holds."""

import json
import math

import pytest
import tiny_runs
import yaml

from ppo_rlhf.config import PPOConfig
from ppo_rlhf.report import write_report
from ppo_rlhf.settings import OptimizerSettings, PPOSettings, SamplingSettings
from ppo_rlhf.train import ppo

TEXTS = ["你好", "👋🏽", "שלום", "שוב", "\n", "  ", "\t", "", "\ufffd", "\u202eevil\u0000", "<b>bold</b>", "<|eos|>"]


def write_run(folder, *, stage="ppo", seed=0, steps=6, tokens=12, texts=(), every=2, summary=True, **settings):
    """A run folder as the toolkit writes it, of made-up numbers; texts: the first tokens of every response."""
    folder.mkdir(parents=True)
    config = {"seed": seed, "output_dir": str(folder), "gamma": 1.0, "gae_lambda": 0.95, "kl_coef": 0.1}
    config["batch_size"] = 64
    config |= {"policy": f"{folder}/policy", "ppo": {"clip_range": 0.2, "dual_clip": None}, **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps({"stage": stage, "seed": seed}))
    metrics = [{"step": 0, "eval/score": 0.0, "eval/gold_score": 0.0, "eval/kl": 0.0}]
    for step in range(1, steps + 1):
        score = step / steps + 0.1 * seed
        row = {"step": step, "objective/score": score, "objective/kl": step / 3, "kl_coef": 0.1, "loss": 1 / step}
        row["response/length"] = tokens
        if step % every == 0:
            row |= {"eval/score": score, "eval/gold_score": score / 2, "eval/kl": step / 3}
        metrics.append(row)
    tiny_runs.write_rows(folder / "metrics.jsonl", metrics)
    rows = [row for step in range(0, steps + 1, every) for row in held_out(step, tokens, texts)]
    rows += [row for step in range(1, steps + 1) for row in rollouts(step, tokens, texts)]
    tiny_runs.write_rows(folder / "samples.jsonl", rows)
    if summary:
        told = {"loss_before": 2.0, "loss_after": 1.0} if stage == "sft" else {}
        told |= {"score_before": 0.0, "score_after": 1.0 + seed, "gold_score_before": 0.0, "gold_score_after": 0.5}
        told |= {"kl": 2.0, "stop_rate": 1.0, "seconds": 3.0}
        (folder / "summary.json").write_text(json.dumps(told))
    return folder


def held_out(step, tokens, texts):
    return [
        {**response(step, tokens, texts, wave=0.3 + number), "kind": "held-out", "prompt": f"prompt {number} ?"}
        for number in range(2)
    ]


def rollouts(step, tokens, texts):
    rows = []
    for number in range(2):
        row = response(step, tokens, texts, wave=0.7 + number)
        row["new_logprobs"] = [[x + 0.15 * epoch for x in row["logprobs"]] for epoch in (1, 2)]
        rows.append({**row, "kind": "rollout", "prompt": f"rollout {step} of {number}"})
    return rows


def response(step, tokens, texts, wave):
    """Numbers that obey the formulas with β = 0.1, γ = 1, λ = 0.95 and a score of 1."""
    words = [*texts, *(f" word{i}" for i in range(tokens))][:tokens]
    ref_logprobs = [-1.5 - math.sin(wave * t) for t in range(tokens)]
    logprobs = [x + 0.05 * step * math.cos(wave * t) for t, x in enumerate(ref_logprobs)]
    rewards = [-0.1 * (p - q) for p, q in zip(logprobs, ref_logprobs, strict=True)]
    rewards[-1] += 1.0
    values = [0.3 * math.sin(t) for t in range(tokens)]
    advantages, following, value = [0.0] * tokens, 0.0, 0.0
    for t in reversed(range(tokens)):
        following = rewards[t] + value - values[t] + 0.95 * following
        advantages[t], value = following, values[t]
    return {
        "step": step,
        "response": "".join(words),
        "finished": True,
        "score": 1.0,
        "gold_score": 0.5,
        "kl": sum(logprobs) - sum(ref_logprobs),
        "kl_coef": 0.1,
        "ids": list(range(tokens)),
        "tokens": words,
        "logprobs": logprobs,
        "ref_logprobs": ref_logprobs,
        "entropy": [1.0] * tokens,
        "rewards": rewards,
        "values": values,
        "advantages": advantages,
        "returns": [a + v for a, v in zip(advantages, values, strict=True)],
    }


def report_of(*folders, **more):
    """The page as text."""
    return write_report(list(folders), **more).read_text(encoding="utf-8")


def inspected_in(page):
    """What the page's inspector is given."""
    start = page.index('id="inspected">') + len('id="inspected">')
    return json.loads(page[start : page.index("</script>", start)])


# ------------------------------------------------------------------------------------------------- a real run


def config_of(models, data, folder, **changes):
    settings = {
        "policy": models["gpt2"],
        "prompts": data["prompts"],
        "output_dir": str(folder),
        "num_steps": 3,
        "batch_size": 8,
        "eval_every": 2,
        "save_every": 0,
        "max_eval_prompts": 4,
        "kl_coef": 0.2,
        "gae_lambda": 0.9,
        "matmul_precision": "highest",
        "log_with": (),
        "sampling": SamplingSettings(max_new_tokens=10, stop_token_ids=tiny_runs.STOPS, temperature=0.9),
        "ppo": PPOSettings(num_epochs=3, num_minibatches=2, value_coef=0.5),
        "optimizer": OptimizerSettings(lr=5e-3, schedule="constant"),
    }
    return PPOConfig(**settings | changes)


def length(prompts, responses, **_):
    return [len(text) / 10 for text in responses]


@pytest.fixture(scope="session")
def trained(models, data, tmp_path_factory):
    """A PPO run's folder, with the configuration that it was trained with."""
    config = config_of(models, data, tmp_path_factory.mktemp("trained") / "run")
    ppo.train(config, reward=length)
    return config
