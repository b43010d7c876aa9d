"""What a reward model learns from: rankings of responses, as pairs of a better and a worse one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppo_rlhf.data import Rows, text_column
from ppo_rlhf.errors import UserError, did_you_mean
from ppo_rlhf.rewards import RewardModel


@dataclass(frozen=True)
class Ranking:
    """K responses to one prompt, in an order of preference."""

    prompt: str
    responses: list[str]
    pairs: list[tuple[int, int]]  # (better, worse) positions in responses, without the ties
    margin: float  # of each pair

    @property
    def weight(self) -> float:
        """1 / C(K, 2): every ranking weighs the same (Ouyang et al., 2022, eq. 1)."""
        return 1 / math.comb(len(self.responses), 2)


@dataclass(frozen=True)
class EncodedRankings:
    """Rankings with the tokens that the reward model reads."""

    rankings: list[Ranking]
    encoded: list[list[list[int]]]  # of each ranking, the token ids of each response with its prompt

    def __len__(self) -> int:
        return len(self.rankings)


def rankings_of(rows: Rows, *, setting: str) -> list[Ranking]:
    """Rankings from `chosen` and `rejected` [, `margin`], or from `responses` and `ranks`, 1 the best, equal for a tie.

    Raises UserError for rows that are neither, ranks that do not fit, or a row in which nothing is preferred.
    """
    prompts = text_column(rows, "prompt", setting=setting, empty=True)
    if "responses" in rows[0]:
        return [
            _ranking(prompt, row, f"{setting}: row {index}")
            for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
        ]
    missing = [name for name in ("chosen", "rejected") if name not in rows[0]]
    if missing:
        found = ", ".join(sorted(rows[0]))
        raise UserError(
            f"{setting}: no column {missing[0]!r}, only {found}; comparisons need `prompt`, `chosen`, `rejected`, or "
            f"`prompt`, `responses`, `ranks`.{did_you_mean(missing[0], rows[0])}"
        )
    chosen, rejected = (text_column(rows, name, setting=setting, empty=True) for name in ("chosen", "rejected"))
    margins = [row.get("margin") or 0.0 for row in rows]
    for index, margin in enumerate(margins):
        if not _is_number(margin):
            raise UserError(f"{setting}: row {index}, column 'margin' is {margin!r}, not a number.")
    return [
        Ranking(prompt, [better, worse], [(0, 1)], float(margin))
        for prompt, better, worse, margin in zip(prompts, chosen, rejected, margins, strict=True)
    ]


def _ranking(prompt: str, row: dict[str, Any], where: str) -> Ranking:
    responses, ranks = row.get("responses"), row.get("ranks")
    if not isinstance(responses, list) or len(responses) < 2 or not all(isinstance(text, str) for text in responses):
        raise UserError(f"{where}: `responses` must be a list of two or more texts.")
    if not isinstance(ranks, list) or len(ranks) != len(responses) or not all(map(_is_number, ranks)):
        raise UserError(f"{where}: `ranks` must be a list of {len(responses)} numbers, one a response.")
    pairs = [(a, b) for a, b in itertools.permutations(range(len(ranks)), 2) if ranks[a] < ranks[b]]
    if not pairs:
        raise UserError(f"{where}: all `ranks` are equal, so nothing is preferred; remove the row.")
    return Ranking(prompt, responses, pairs, 0.0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def pair_tensors(rankings: Sequence[Ranking], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All pairs of rankings whose responses stand in a row: better, worse (N,) positions, weights, margins (N,)."""
    better, worse, weights, margins = [], [], [], []
    start = 0
    for ranking in rankings:
        for a, b in ranking.pairs:
            better.append(start + a)
            worse.append(start + b)
            weights.append(ranking.weight)
            margins.append(ranking.margin)
        start += len(ranking.responses)
    return (
        torch.tensor(better, device=device),
        torch.tensor(worse, device=device),
        torch.tensor(weights, device=device),
        torch.tensor(margins, device=device),
    )


def fitting(reward_model: RewardModel, rankings: Sequence[Ranking], *, setting: str) -> EncodedRankings:
    """The rankings whose responses fit in the model's context. Raises UserError where none fits."""
    kept = [ranking for ranking in rankings if reward_model.fits(ranking.responses)]
    if not kept:
        raise UserError(f"{setting}: each comparison has a response longer than the reward model's context.")
    encoded = [reward_model.encode([ranking.prompt] * len(ranking.responses), ranking.responses) for ranking in kept]
    return EncodedRankings(kept, encoded)
