"""The reward protocol, and the checks on what comes back."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ppo_rlhf.errors import UserError


@dataclass(frozen=True)
class Scores:
    """What the responses earned."""

    total: Tensor  # (B,) float32, what PPO maximises
    parts: dict[str, Tensor]  # name → (B,) what it is made of, for the logs
    dense: Tensor | None = (
        None  # (B, T) the share of the total that each token was paid at once; the last pays the rest
    )

    def to(self, device: torch.device) -> Scores:
        """The same on a device; the parts stay where they are."""
        dense = None if self.dense is None else self.dense.to(device)
        return replace(self, total=self.total.to(device), dense=dense)

    def parts_of(self, row: int) -> dict[str, float]:
        """What one response's total is made of."""
        return {name: float(scores[row]) for name, scores in self.parts.items()}


Answer = Sequence[float] | Sequence[Sequence[float]] | Tensor | Scores


class RewardFunction(Protocol):
    """Texts in, one score a response out; the prompts' other columns come as keyword arguments.

    A function that names the argument `response_tokens` is given each response's tokens, as texts, and may answer with
    a sequence of numbers for each response, one a token: a dense reward. It may be an async function. One that is made
    of parts returns `Scores`, in which each is logged apart.
    """

    def __call__(self, prompts: list[str], responses: list[str], **columns: Any) -> Answer | Awaitable[Answer]: ...


def name_of(reward: RewardFunction) -> str:
    """What a reward is called in messages and logs."""
    return getattr(reward, "__name__", type(reward).__name__)


def wants_tokens(reward: RewardFunction) -> bool:
    """Whether the reward names the argument `response_tokens`."""
    return callable(reward) and "response_tokens" in inspect.signature(reward).parameters


def score(
    reward: RewardFunction,
    prompts: list[str],
    responses: list[str],
    columns: dict[str, list[Any]],
    *,
    response_tokens: list[list[str]] | None = None,
    must_be_finite: bool = True,
) -> Scores:
    """Calls the reward and checks its answer: one number a response, finite unless that is left to the caller.

    response_tokens: the tokens of each response as texts, for a reward that asks for them.

    Raises UserError that says what came instead, or what the function raised.
    """
    name = name_of(reward)
    tokens = response_tokens if wants_tokens(reward) else None
    given = columns if tokens is None else {**columns, "response_tokens": tokens}
    try:
        answer = _awaited(reward(prompts, responses, **given))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"reward function {name} raised {type(error).__name__}: {error}") from error
    if isinstance(answer, Scores):
        _check_count(name, len(answer.total), responses)
        found, values = answer, {part: x.tolist() for part, x in [*answer.parts.items(), (name, answer.total)]}
    else:
        numbers, dense = _numbers(name, answer, responses, tokens)
        total = torch.tensor(numbers, dtype=torch.float32)
        found, values = Scores(total, {name: total}, dense), {name: numbers}
    if must_be_finite:
        for part, numbers in values.items():
            _refuse_infinite(part, numbers, prompts, responses)
    return found


def _awaited(answer: Any) -> Any:
    """What an async function comes to, in an event loop of its own: the caller, such as a notebook, may be in one."""
    if not inspect.isawaitable(answer):
        return answer

    async def outcome() -> Any:
        return await answer

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, outcome()).result()


def _numbers(
    name: str, answer: Any, responses: list[str], tokens: list[list[str]] | None
) -> tuple[list[float], Tensor | None]:
    """One number a response; and one a token, (B, T), where a reward that knows the tokens answered so."""
    try:
        if isinstance(answer, str):  # "12" would be the scores 1 and 2
            raise TypeError("text")
        rows = list(answer)
        is_dense = tokens is not None and any(isinstance(x, Sequence) or getattr(x, "ndim", 0) == 1 for x in rows)
        numbers = [[float(value) for value in row] if is_dense else [float(row)] for row in rows]
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"reward function {name} must return numbers, one a response; it returned {answer!r}."
        ) from error
    _check_count(name, len(numbers), responses)
    dense = _dense(name, numbers, responses, tokens) if tokens is not None and is_dense else None
    return [sum(line) for line in numbers], dense


def _dense(name: str, numbers: list[list[float]], responses: list[str], tokens: list[list[str]]) -> Tensor:
    """The numbers of each response's tokens, 0 behind them. → (B, T)."""
    dense = torch.zeros(len(tokens), max(map(len, tokens)))
    for row, (line, own) in enumerate(zip(numbers, tokens, strict=True)):
        if len(line) != len(own):
            raise UserError(
                f"reward function {name} returned {len(line)} numbers for the {len(own)} tokens of response "
                f"{responses[row]!r}."
            )
        dense[row, : len(line)] = torch.tensor(line)
    return dense


def _check_count(name: str, count: int, responses: list[str]) -> None:
    if count != len(responses):
        raise UserError(f"reward function {name} returned {count} scores for {len(responses)} responses.")


def _refuse_infinite(name: str, values: list[float], prompts: list[str], responses: list[str]) -> None:
    """Raises UserError for the first value that is not finite in float32, where 1e39 is infinite."""
    for row in (~torch.tensor(values, dtype=torch.float32).isfinite()).nonzero().flatten().tolist():
        raise UserError(
            f"reward function {name} returned {values[row]} for prompt {prompts[row]!r}, response {responses[row]!r}."
        )
