"""Rewards made of rewards: a weighted sum, and an ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ppo_rlhf.errors import UserError
from ppo_rlhf.rewards.functions import RewardFunction, Scores, score
from ppo_rlhf.rewards.model import RewardModel


@dataclass(frozen=True)
class Weighted:
    """A reward with its weight and its name in a sum."""

    name: str
    reward: RewardFunction
    weight: float = 1.0


class WeightedSum:
    """Σ weight · score, of which each part is logged apart, as it was before its weight."""

    def __init__(self, parts: Sequence[Weighted]) -> None:
        """Raises UserError where two parts have one name."""
        self.parts = tuple(parts)
        self.__name__ = "weighted_sum"
        names = [part.name for part in parts]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"reward: two parts are called {name!r}; give each a name of its own.")

    def __call__(
        self,
        prompts: list[str],
        responses: list[str],
        *,
        response_tokens: list[list[str]] | None = None,
        **columns: Any,
    ) -> Scores:
        """The sum and its parts; one that is made of parts itself has them below its name."""
        total, dense, logged = torch.zeros(len(responses)), None, {}
        for part in self.parts:
            found = score(
                part.reward, prompts, responses, columns, response_tokens=response_tokens, must_be_finite=False
            )
            total = total + part.weight * found.total
            if found.dense is not None:
                dense = part.weight * found.dense + (0 if dense is None else dense)
            logged[part.name] = found.total
            if len(found.parts) > 1:
                logged |= {f"{part.name}/{name}": scores for name, scores in found.parts.items()}
        return Scores(total, logged, dense)


class Ensemble:
    """Several rewards whose scores become one, so that what only one of them likes earns little (Coste et al., 2024).

    mean; min, the worst case; lower_bound = mean − deviations · std, where std, over the members, is their disagreement
    (theirs is mean − λ · variance).
    """

    def __init__(
        self,
        members: Sequence[RewardFunction],
        *,
        rule: Literal["mean", "min", "lower_bound"] = "mean",
        deviations: float = 1.0,
    ) -> None:
        self.members = tuple(members)
        self.rule = rule
        self.deviations = deviations
        self.__name__ = "ensemble"

    def __call__(self, prompts: list[str], responses: list[str], **columns: Any) -> Scores:
        """One score a response, with the members' mean and standard deviation as its parts."""
        scores = torch.stack(
            [score(member, prompts, responses, columns, must_be_finite=False).total for member in self.members]
        )
        mean, std = scores.mean(0), scores.std(0, correction=0)
        return Scores(self._combined(scores, mean, std), {"mean": mean, "std": std})

    def _combined(self, scores: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        if self.rule == "min":
            return scores.amin(0)
        return mean - self.deviations * std if self.rule == "lower_bound" else mean


def models_in(reward: RewardFunction) -> list[RewardModel]:
    """The reward models that a reward is made of."""
    if isinstance(reward, WeightedSum):
        return [model for part in reward.parts for model in models_in(part.reward)]
    if isinstance(reward, Ensemble):
        return [model for member in reward.members for model in models_in(member)]
    return [reward] if isinstance(reward, RewardModel) else []
