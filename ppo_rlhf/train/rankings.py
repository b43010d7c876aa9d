"""What a reward model learns from: rankings of responses, as pairs of a better and a worse one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ppo_rlhf.data import Rows, responses_in_tokens, text_column
from ppo_rlhf.errors import UserError, did_you_mean
from ppo_rlhf.settings import Ties


@dataclass(frozen=True)
class Ranking:
    """K responses to one prompt, in an order of preference."""

    prompt: str
    responses: list[str]
    pairs: list[tuple[int, int]]  # (better, worse) positions in responses
    weights: list[float]  # of each pair
    margin: float  # of each pair


@dataclass(frozen=True)
class EncodedRankings:
    """Rankings with the tokens that the reward model reads."""

    rankings: list[Ranking]
    encoded: list[list[list[int]]]  # of each ranking, the token ids of each response with its prompt
    num_cut: int  # that lost the beginning of their prompt
    num_dropped: int  # that were too long

    def __len__(self) -> int:
        return len(self.rankings)

    def told(self) -> list[str]:
        """A line for what was dropped for its length, and one for what was cut."""
        total = len(self) + self.num_dropped
        dropped = f"{self.num_dropped} of {total} comparisons are too long and were left out."
        cut = f"{self.num_cut} of {total} comparisons lost the beginning of their prompt."
        return [dropped] * bool(self.num_dropped) + [cut] * bool(self.num_cut)


def rankings_of(rows: Rows, *, setting: str, ties: Ties = "drop") -> list[Ranking]:
    """Rankings from `chosen` and `rejected`, or from `responses` and `ranks`, 1 the best, equal for a tie.

    Optional columns: `margin`; `weight` of a chosen and a rejected response. ties: what equal ranks teach, see
    `RewardConfig`; a row that teaches nothing is left out.

    Raises UserError for rows that are neither, ranks that do not fit, or where no row is left.
    """
    prompts = text_column(rows, "prompt", setting=setting, empty=True)
    if "responses" in rows[0]:
        rankings = [
            _ranking(prompt, row, ties, f"{setting}: row {index}")
            for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
        ]
        kept = [ranking for ranking in rankings if ranking.pairs]
        if not kept:
            raise UserError(f"{setting}: the `ranks` of every row are all equal, so nothing is preferred.")
        return kept
    missing = [name for name in ("chosen", "rejected") if name not in rows[0]]
    if missing:
        found = ", ".join(sorted(rows[0]))
        raise UserError(
            f"{setting}: no column {missing[0]!r}, only {found}; comparisons need `prompt`, `chosen`, `rejected`, or "
            f"`prompt`, `responses`, `ranks`.{did_you_mean(missing[0], rows[0])}"
        )
    chosen, rejected = (text_column(rows, name, setting=setting, empty=True) for name in ("chosen", "rejected"))
    return [
        Ranking(
            prompt,
            [better, worse],
            [(0, 1)],
            [_number(row, "weight", 1.0, f"{setting}: row {index}")],
            _number(row, "margin", 0.0, f"{setting}: row {index}"),
        )
        for index, (prompt, better, worse, row) in enumerate(zip(prompts, chosen, rejected, rows, strict=True))
    ]


def _ranking(prompt: str, row: dict[str, Any], ties: Ties, where: str) -> Ranking:
    """Each pair weighs 1 / C(K, 2), so that every ranking weighs the same (Ouyang et al., 2022, eq. 1)."""
    responses, ranks = row.get("responses"), row.get("ranks")
    if not isinstance(responses, list) or len(responses) < 2 or not all(isinstance(text, str) for text in responses):
        raise UserError(f"{where}: `responses` must be a list of two or more texts.")
    if not isinstance(ranks, list) or len(ranks) != len(responses) or not all(map(_is_number, ranks)):
        raise UserError(f"{where}: `ranks` must be a list of {len(responses)} numbers, one a response.")
    weight = 1 / math.comb(len(ranks), 2)
    tie_weight = {"drop": 0.0, "both": weight, "half": weight / 2}[ties]
    weights = {
        (a, b): weight if ranks[a] < ranks[b] else tie_weight
        for a, b in itertools.permutations(range(len(ranks)), 2)
        if ranks[a] <= ranks[b]
    }
    pairs = [pair for pair, weight in weights.items() if weight]
    margin = _number(row, "margin", 0.0, where)
    return Ranking(prompt, responses, pairs, [weights[pair] for pair in pairs], margin)


def _number(row: dict[str, Any], column: str, default: float, where: str) -> float:
    value = default if row.get(column) is None else row[column]
    if not _is_number(value):
        raise UserError(f"{where}, column {column!r} is {value!r}, not a number.")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def pair_tensors(rankings: Sequence[Ranking], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All pairs of rankings whose responses stand in a row: better, worse (N,) positions, weights, margins (N,)."""
    better, worse, weights, margins = [], [], [], []
    start = 0
    for ranking in rankings:
        for (a, b), weight in zip(ranking.pairs, ranking.weights, strict=True):
            better.append(start + a)
            worse.append(start + b)
            weights.append(weight)
            margins.append(ranking.margin)
        start += len(ranking.responses)
    return (
        torch.tensor(better, device=device),
        torch.tensor(worse, device=device),
        torch.tensor(weights, device=device),
        torch.tensor(margins, device=device),
    )


def fitting(
    rankings: Sequence[Ranking],
    tokenizer: PreTrainedTokenizerBase,
    *,
    longest: int,
    too_long: Literal["left", "drop", "refuse"],
    setting: str,
) -> EncodedRankings:
    """The rankings in tokens, cached on disk, none with more than `longest`; too_long: see `RewardConfig`.

    Raises UserError for a longer one that is refused, and where none fits.
    """
    prompts, responses = [each.prompt for each in rankings], [each.responses for each in rankings]
    table = responses_in_tokens(prompts, responses, tokenizer)
    lines = zip(table["ids"], table["start"], strict=True)
    kept, encoded, num_cut = [], [], 0
    for ranking in rankings:
        sides = list(itertools.islice(lines, len(ranking.responses)))
        length = max(len(ids) for ids, _ in sides)
        if length > longest and too_long == "refuse":
            raise UserError(
                f"{setting}: a comparison has {length} tokens with its prompt, but {longest} fit; set too_long to drop "
                f"such, or to cut their prompts on the left. It begins {ranking.prompt[:40]!r}."
            )
        if length > longest and (too_long == "drop" or max(len(ids) - start for ids, start in sides) > longest):
            continue
        num_cut += length > longest
        kept.append(ranking)
        encoded.append([ids[-longest:] for ids, _ in sides])
    if not kept:
        raise UserError(
            f"{setting}: each comparison has a response longer than the reward model's context, or than max_length."
        )
    return EncodedRankings(kept, encoded, num_cut=num_cut, num_dropped=len(rankings) - len(kept))
