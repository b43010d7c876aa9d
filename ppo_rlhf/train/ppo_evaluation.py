"""Evaluation of the policy on held-out prompts: the same prompts and the same noise each time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from ppo_rlhf.config import PPOConfig
from ppo_rlhf.measures import distinct_n
from ppo_rlhf.models import evaluating
from ppo_rlhf.policy import Inputs
from ppo_rlhf.rewards import ScoreMoments, Scores, is_constant, shaped
from ppo_rlhf.rollout import in_pieces, inputs_of
from ppo_rlhf.run import SAMPLES_KEPT, LoopState, gathered, share_of, whole_weights
from ppo_rlhf.seeding import uniform_rows
from ppo_rlhf.train.averaging import averaged
from ppo_rlhf.train.measured import measure
from ppo_rlhf.train.ppo_credit import missing_eos_rule, response_advantages, response_gae
from ppo_rlhf.train.ppo_parts import Parts
from ppo_rlhf.train.ppo_records import token_numbers


@dataclass(frozen=True)
class Outcome:
    """One evaluation."""

    metrics: dict[str, float]  # eval/…
    rows: list[dict[str, Any]]  # a response each, in the order of the prompts
    quality: float  # what the best policy maximises


@torch.no_grad()
def evaluate_held_out(
    parts: Parts,
    config: PPOConfig,
    accelerator: Accelerator,
    state: LoopState,
    *,
    must_be_finite: bool = True,
) -> Outcome:
    """Samples a response to every held-out prompt, at the run's temperature, and measures what the run is about.

    Scores are raw: before they are shaped, the rule for a missing eos and the KL penalty. KL is per response, in nats.
    state: whose average weights are evaluated, where it has some, and with whose β and moments of the scores the first
    few responses are shown, token by token. must_be_finite: a score that is not raises UserError, as it should before a
    run and not in its tenth hour.
    """
    numbers = range(len(parts.eval_prompts))[share_of(len(parts.eval_prompts), accelerator)]
    rows: list[dict[str, Any]] = []
    model = parts.model.language_model
    with accelerator.autocast(), evaluating(parts.model), whole_weights(parts.model), averaged(model, state.tensors):
        for start in range(0, len(numbers), config.sampling.batch_size):
            batch = list(numbers[start : start + config.sampling.batch_size])
            rows += _evaluate_batch(batch, parts, config, state, must_be_finite)
    rows = gathered(rows)
    scores = torch.tensor([row["score"] for row in rows], dtype=torch.float64)
    metrics = {
        "eval/score": _mean([row["score"] for row in rows]),
        "eval/score_std": float(scores.std(correction=0)),
        "eval/kl": _mean([row["kl"] for row in rows]),
        "eval/length": _mean([row["length"] for row in rows]),
        "eval/stop_rate": _mean([row["finished"] for row in rows]),
        "eval/distinct_2": distinct_n([row["response"] for row in rows], 2),
    }
    for name in rows[0].get("score_parts", {}):
        metrics[f"eval/score/{name}"] = _mean([row["score_parts"][name] for row in rows])
    if parts.gold is not None:
        gold = torch.tensor([row["gold_score"] for row in rows])
        metrics |= {"eval/gold_score": float(gold.mean()), "eval/gold_score_std": float(gold.std(correction=0))}
        metrics["eval/gold_correlation"] = rank_correlation(scores, gold)
    metrics["eval/reference_norm"] = weight_norm(parts.reference)
    return Outcome(metrics, rows, quality_of(rows, config, state.score_moments, state.before or metrics))


def quality_of(
    rows: Sequence[Mapping[str, Any]], config: PPOConfig, moments: ScoreMoments, before: Mapping[str, float]
) -> float:
    """Mean of the scores as they are paid, less β·KL, by a measure that is the same all through the run:

    β is the one that the run starts with, and running moments, which would move under it, give way to those of the
    starting policy. A missing eos counts by its rule; where that leaves responses unscored the mean is of the others,
    and −∞ where there are none.
    """
    scores, lengths, finished = (torch.tensor([row[name] for row in rows]) for name in ("score", "length", "finished"))
    shaping = config.score_shaping
    if shaping.normalize == "running":
        mean, std = before["eval/score"], before["eval/score_std"]
        moments = (mean, 1.0 if is_constant(mean, std) else std**2, len(rows))
        shaping = replace(shaping, clip=None)  # around the mean of its time
    paid = shaped(Scores(scores.double(), {}), lengths, shaping, moments).total
    paid = missing_eos_rule(paid, finished, config.missing_eos)
    if config.missing_eos.rule == "bootstrap":
        paid = paid[finished]
    return float(paid.mean() if len(paid) else -torch.inf) - config.kl_coef * _mean([row["kl"] for row in rows])


def _evaluate_batch(
    numbers: list[int],
    parts: Parts,
    config: PPOConfig,
    state: LoopState,
    must_be_finite: bool,
) -> list[dict[str, Any]]:
    measured = measure(
        parts.eval_prompts,
        numbers,
        uniform_rows(numbers, config.sampling.max_new_tokens, config.seed, "held out"),
        parts.model.language_model,
        parts.tokenizer,
        config.sampling,
        reference=parts.reference,
        rewards={"score": parts.reward, **({} if parts.gold is None else {"gold_score": parts.gold})},
        must_be_finite=must_be_finite,
        micro_batch_size=parts.micro_batch.size,
    )
    rows, responses = measured.rows(), measured.responses
    kept = sum(number < SAMPLES_KEPT for number in numbers)  # what samples.jsonl shows, token by token
    if kept:
        logprobs, ref_logprobs, log_ratio = measured.logprobs, measured.ref_logprobs, measured.log_ratio
        assert logprobs is not None
        assert ref_logprobs is not None
        assert log_ratio is not None
        rewards = parts.extensions.reward_shaping(
            measured.scores["score"],
            log_ratio,
            responses.mask,
            responses.finished,
            config,
            moments=state.score_moments,
            kl_coef=state.kl_coef,
        )
        per_token = {"logprobs": logprobs[:kept], "ref_logprobs": ref_logprobs[:kept], "rewards": rewards[:kept]}
        inputs = {name: x[:kept] for name, x in inputs_of(measured.prompts, responses).items()}
        per_token |= _judged(inputs, rewards[:kept], parts, config)
        for row in range(kept):
            rows[row] |= {"kl_coef": state.kl_coef, **token_numbers(row, responses, per_token, parts.tokenizer)}
    return rows


def _judged(inputs: Inputs, rewards: Tensor, parts: Parts, config: PPOConfig) -> dict[str, Tensor]:
    """What PPO would make of each token, were it to train on it; advantages are those before whitening. (B, T) each.

    All responses count as terminated, those too that were cut off. Estimators other than GAE may compare a response
    with others of its rollout: they leave out advantages and returns, and without a value function there are no values.
    """
    evaluations = [parts.model(**piece) for piece in in_pieces(inputs, parts.micro_batch.size)]
    judged = {"entropy": torch.cat([evaluation.entropy for evaluation in evaluations])}
    if config.has_values:
        judged["values"] = torch.cat([evaluation.values for evaluation in evaluations])
    if config.advantage == "gae" and parts.extensions.advantage is response_advantages:
        mask, values = inputs["response_mask"], F.pad(judged["values"], (0, 1))
        discounts = {"gamma": config.gamma, "lam": config.gae_lambda}
        judged["advantages"], judged["returns"] = response_gae(rewards, values, mask, mask.any(1), **discounts)
    return judged


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's, of the ranks, where equal values share the mean of theirs. (N,) each; 0 without spread."""
    ranks = torch.stack([(x[:, None] > x).sum(1).double() + (x[:, None] == x).sum(1) / 2 for x in (one, other)])
    deviations = ranks - ranks.mean(1, keepdim=True)
    scale = deviations.square().sum(1).prod().sqrt()
    return float(deviations.prod(0).sum() / scale) if scale > 0 else 0.0


def weight_norm(module: nn.Module) -> float:
    """√Σ w² over all weights: the same at every evaluation, as long as nothing moves the module."""
    return math.sqrt(sum(float(parameter.detach().double().square().sum()) for parameter in module.parameters()))


def summary_of(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """The outcome of a run: the reference policy and the final one on the same held-out prompts."""
    summary: dict[str, float] = {}
    for name in ("score", "gold_score", "length", "stop_rate", "distinct_2"):
        if f"eval/{name}" in before:
            summary |= {f"{name}_before": before[f"eval/{name}"], f"{name}_after": after[f"eval/{name}"]}
    if "eval/gold_score_std" in before:
        summary["gold_score_std_before"] = before["eval/gold_score_std"]
    return summary | {"kl": after["eval/kl"], "stop_rate": after["eval/stop_rate"]}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
