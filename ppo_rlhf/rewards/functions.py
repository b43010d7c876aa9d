"""The reward protocol, and the checks on what comes back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ppo_rlhf.errors import UserError
from ppo_rlhf.references import is_reference, load_object
from ppo_rlhf.rewards.model import RewardModel


class RewardFunction(Protocol):
    """Texts in, one score a response out; the prompts' other columns come as keyword arguments."""

    def __call__(self, prompts: list[str], responses: list[str], **columns: Any) -> Sequence[float] | Tensor: ...


@dataclass(frozen=True)
class Scores:
    """What the responses earned."""

    total: Tensor  # (B,) float32, what PPO maximises
    parts: dict[str, Tensor]  # name → (B,) what it is made of, for the logs


def load_reward(source: str, *, setting: str, device: torch.device | str = "cpu") -> RewardFunction:
    """A reward from a reward model's folder, or from `module:function`. Raises UserError when there is neither."""
    if not is_reference(source):
        return RewardModel.load(source, setting=setting, device=device)
    function = load_object(source)
    if not callable(function):
        raise UserError(f"{setting}: {source} is not a function, but {type(function).__name__}.")
    return function


def score(
    reward: RewardFunction,
    prompts: list[str],
    responses: list[str],
    columns: dict[str, list[Any]],
    *,
    must_be_finite: bool = True,
) -> Scores:
    """Calls the reward and checks its answer: one number a response, finite unless that is left to the caller.

    Raises UserError that says what came instead, or what the function raised.
    """
    name = getattr(reward, "__name__", type(reward).__name__)
    try:
        answer = reward(prompts, responses, **columns)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"reward function {name} raised {type(error).__name__}: {error}") from error
    try:
        if isinstance(answer, str):  # "12" would be the scores 1 and 2
            raise TypeError("text")
        values = [float(value) for value in answer]
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"reward function {name} must return numbers, one a response; it returned {answer!r}."
        ) from error
    if len(values) != len(responses):
        raise UserError(f"reward function {name} returned {len(values)} scores for {len(responses)} responses.")
    total = torch.tensor(values, dtype=torch.float32)
    for kept, value, prompt, response in zip(total.tolist(), values, prompts, responses, strict=True):
        if must_be_finite and not math.isfinite(kept):  # in float32, where 1e39 is infinite
            raise UserError(f"reward function {name} returned {value} for prompt {prompt!r}, response {response!r}.")
    return Scores(total, {name: total})
