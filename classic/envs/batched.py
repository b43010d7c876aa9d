"""What the environments written in torch share: N states in one tensor, time limits, resets, saving.

State is kept as rows (S, N), one row a quantity, because an operation on a contiguous row is several times cheaper than
on a column; observations are returned as transposed views (N, D).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from classic.envs.types import Step
from ppo_rlhf.errors import UserError

LONGEST_COUNT = 2**24  # float32 counts exactly up to here


class BatchedEnvironments(ABC):
    """N environments in NEXT_STEP layout whose whole state is tensors on `device`.

    A subclass moves states (`step`) and shows them (`_observe`). Nothing in a step waits for the device, and everything
    that lives across steps is written in place.

    Each of the S quantities starts uniformly within ± its `start_range`. Start states are drawn for all environments at
    once, every `shortest_episode` + 1 steps: between two resets of one environment lie at least that many, so none
    starts twice from the same draw, and the draws cost next to nothing.

    Raises UserError for a count of environments or steps that cannot be.
    """

    action_mask: Tensor | None = None  # every action is always allowed

    def __init__(
        self,
        num_envs: int,
        *,
        start_range: tuple[float, ...],
        shortest_episode: int,
        seed: int,
        device: torch.device | str,
        dtype: torch.dtype,
        max_episode_steps: int | None,
    ) -> None:
        if num_envs < 1:
            raise UserError(f"num_envs={num_envs}: at least one environment is needed.")
        if max_episode_steps is not None and not 1 <= max_episode_steps <= LONGEST_COUNT:
            raise UserError(f"max_episode_steps={max_episode_steps}: use 1 to {LONGEST_COUNT}, or None for no limit.")
        self.num_envs = num_envs
        self.device = torch.device(device)
        self.dtype = dtype
        limit = math.inf if max_episode_steps is None else max_episode_steps
        self._draw_interval = int(min(shortest_episode, limit)) + 1
        self._steps_until_draw = 0
        self._generator = torch.Generator(self.device).manual_seed(seed)
        self._start_range = torch.tensor(start_range, dtype=dtype, device=self.device).unsqueeze(1)  # (S, 1)
        self._state = torch.zeros(len(start_range), num_envs, dtype=dtype, device=self.device)  # (S, N)
        self._starts = torch.zeros_like(self._state)  # (S, N) where each environment begins when it next resets
        self._counts = torch.zeros_like(self._state[0])  # (N,) steps of the present episode
        self._running = torch.ones(num_envs, dtype=torch.bool, device=self.device)  # (N,) False: the next step resets
        self._limit = torch.tensor(limit, dtype=dtype, device=self.device)
        self._start_all()

    @property
    def state(self) -> Tensor:
        """A copy of the state, (N, S), in Gymnasium's order."""
        return self._state.t().clone()

    def set_state(self, state: Tensor, counts: Tensor | int = 0) -> None:
        """Puts running environments at `state` (N, S), `counts` steps into their episodes."""
        self._state.copy_(state.t())
        self._counts.copy_(torch.as_tensor(counts))
        self._running.fill_(True)
        self._steps_until_draw = 0

    def reset(self, *, seed: int | None = None) -> Tensor:
        """Starts all environments anew, with `seed` if there is one; → the first observations (N, D)."""
        if seed is not None:
            self._generator.manual_seed(seed)
        self._start_all()
        return self._observe()

    def close(self) -> None:  # noqa: B027 - tensors need no closing, a subclass may
        """Nothing to free."""

    def state_dict(self) -> dict[str, Any]:
        """All that going on exactly needs, as tensors on the environments' device and one number."""
        return {
            **{name: tensor.clone() for name, tensor in self._tensors().items()},
            "steps_until_draw": self._steps_until_draw,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there, bit for bit.

        Raises UserError when the state is of another number of environments, or of another kind of device.
        """
        saved = state["state"].shape[1]
        if saved != self.num_envs:
            raise UserError(f"the saved state is of {saved} environments, not of num_envs={self.num_envs}.")
        if state["generator"].shape != self._generator.get_state().shape:
            raise UserError(
                f"the saved state's random numbers are another device's; {self.device} cannot continue them."
            )
        for name, tensor in self._tensors().items():
            tensor.copy_(state[name])
        self._steps_until_draw = int(state["steps_until_draw"])
        self._generator.set_state(state["generator"].cpu())

    def _tensors(self) -> dict[str, Tensor]:
        return {"state": self._state, "starts": self._starts, "counts": self._counts, "running": self._running}

    def _start_all(self) -> None:
        self._draw(self._state)
        self._counts.zero_()
        self._running.fill_(True)
        self._steps_until_draw = 0

    def _draw(self, into: Tensor) -> None:
        """Fills `into` (S, N) with start states."""
        into.uniform_(-1.0, 1.0, generator=self._generator).mul_(self._start_range)

    @abstractmethod
    def step(self, actions: Tensor) -> Step:
        """Takes one action in each environment that runs; resets those whose episode had ended."""

    @abstractmethod
    def _observe(self) -> Tensor:
        """What the present state looks like, (N, D) float32, in memory of its own."""

    def _begin_step(self) -> Tensor:
        """Draws start states if they are due; → (N,) 1 where the environment runs, 0 where this step resets it."""
        if self._steps_until_draw == 0:
            self._draw(self._starts)
            self._steps_until_draw = self._draw_interval
        self._steps_until_draw -= 1
        return self._running.to(self.dtype)

    def _restart(self, runs: Tensor) -> None:
        """Puts the environments that do not run at their start, and counts the step of the others."""
        # With weights 0 and 1 lerp gives exactly one of the two, in a third of torch.where's time. States are finite.
        torch.lerp(self._starts, self._state, runs, out=self._state)
        torch.addcmul(runs, self._counts, runs, out=self._counts)

    def _end_step(self, rewards: Tensor, terminated: Tensor) -> Step:
        """The answer, after the time limit."""
        truncated = self._counts >= self._limit
        decided = self._running.clone()
        torch.logical_not(terminated | truncated, out=self._running)
        return Step(self._observe(), rewards, terminated, truncated, decided)
