"""Evaluation of a reward model on held-out rankings."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ppo_rlhf.core import bradley_terry_loss
from ppo_rlhf.rewards import RewardFunction, RewardModel, score
from ppo_rlhf.run import SAMPLES_KEPT, gathered, share_of
from ppo_rlhf.train.rankings import EncodedRankings, Ranking
from ppo_rlhf.train.supervised import HeldOut

CALIBRATION_BINS = 10
Order = Sequence[tuple[int, int]]  # (better, worse) positions among a ranking's responses


def evaluate_held_out(
    reward_model: RewardModel, held_out: EncodedRankings, gold_orders: Sequence[Order] | None, accelerator: Accelerator
) -> HeldOut:
    """Scores every held-out response, raw, and compares with the labels, and with the gold order where there is one."""
    mine = share_of(len(held_out), accelerator)
    flat = reward_model.raw_scores([line for lines in held_out.encoded[mine] for line in lines]).tolist()
    gathered_scores = iter(gathered(flat))
    scores = [[next(gathered_scores) for _ in ranking.responses] for ranking in held_out.rankings]
    return HeldOut(held_out_metrics(scores, held_out.rankings, gold_orders), pair_samples(scores, held_out.rankings))


def pair_samples(scores: Sequence[Sequence[float]], rankings: Sequence[Ranking]) -> list[dict[str, Any]]:
    """The first pair of each of the first few rankings, with both raw scores."""
    samples = []
    for line, ranking in list(zip(scores, rankings, strict=True))[:SAMPLES_KEPT]:
        better, worse = ranking.pairs[0]
        samples.append(
            {
                "prompt": ranking.prompt,
                "chosen": ranking.responses[better],
                "rejected": ranking.responses[worse],
                "chosen_score": line[better],
                "rejected_score": line[worse],
            }
        )
    return samples


def gold_pairs(ranking: Ranking, gold: RewardFunction) -> Order:
    """The ranking's pairs in the order of the true reward, without its ties."""
    scores = score(gold, [ranking.prompt] * len(ranking.responses), ranking.responses, {}).total.tolist()
    return [(a, b) for a, b in itertools.permutations(range(len(scores)), 2) if scores[a] > scores[b]]


def held_out_metrics(
    scores: Sequence[Sequence[float]],
    rankings: Sequence[Ranking],
    gold_orders: Sequence[Order] | None,
) -> dict[str, float]:
    """Loss, accuracy and calibration error over the held-out pairs, and accuracy against a known gold order."""
    differences = torch.tensor(
        [line[a] - line[b] for line, ranking in zip(scores, rankings, strict=True) for a, b in ranking.pairs]
    )
    metrics = {
        "eval/loss": float(bradley_terry_loss(differences, torch.zeros_like(differences))),
        "eval/accuracy": accuracy_of(differences),
        "eval/calibration_error": calibration_error(differences),
    }
    if gold_orders is not None:
        against_gold = [line[a] - line[b] for line, order in zip(scores, gold_orders, strict=True) for a, b in order]
        metrics["eval/gold_accuracy"] = accuracy_of(torch.tensor(against_gold))
    return metrics


def accuracy_of(differences: Tensor) -> float:
    """Share of pairs ordered right, (N,) score differences; a tie counts half."""
    return float(((differences > 0).float() + 0.5 * (differences == 0).float()).mean())


def calibration_error(differences: Tensor) -> float:
    """Expected calibration error: |accuracy − confidence| over ten bins of confidence σ(|difference|), weighted."""
    confidence, right = differences.abs().sigmoid(), 0.5 * (differences.sign() + 1)  # a tie is half right
    bins = ((confidence - 0.5) * 2 * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    total = 0.0
    for number in bins.unique():
        inside = bins == number
        total += float((right[inside].mean() - confidence[inside].mean()).abs() * inside.float().mean())
    return total
