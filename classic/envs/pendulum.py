"""Pendulum-v1 as Gymnasium has it, for N pendulums at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from classic.envs.batched import LONGEST_COUNT, BatchedEnvironments
from classic.envs.types import Step
from classic.spaces import Box

MAX_SPEED = 8.0  # rad/s
MAX_TORQUE = 2.0  # N m
SECONDS = 0.05  # between two steps
MASS = 1.0  # kg
LENGTH = 1.0  # m
START_RANGE = (math.pi, 1.0)  # rad, rad/s


class Pendulum(BatchedEnvironments):
    """N pendulums, each to swing up and hold upright with a torque too weak to do it at once.

    Observations (N, 3) float32: cos θ, sin θ, θ' (rad/s), with θ = 0 upright; actions (N, 1) or (N,), torques u that
    are clipped to ±2 N m. With gravity `g`, mass and length 1, and the angle wrapped to ±π,

        reward = −(θ² + 0.1 θ'² + 0.001 u²)      θ' += (1.5 g sin θ + 3 u) · 0.05, clipped to ±8      θ += 0.05 θ'

    An episode never terminates; it is truncated after `max_episode_steps` (None: never).

    The state keeps θ wrapped, where Gymnasium lets it grow: float32 would lose its digits on many turns. Rewards come
    in the environments' `dtype`. Raises UserError for counts that cannot be.
    """

    action_space = Box(shape=(1,), low=(-MAX_TORQUE,), high=(MAX_TORQUE,))
    observation_space = Box(shape=(3,), low=(-1.0, -1.0, -MAX_SPEED), high=(1.0, 1.0, MAX_SPEED))

    def __init__(
        self,
        num_envs: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_episode_steps: int | None = 200,
        g: float = 10.0,
    ) -> None:
        super().__init__(
            num_envs,
            start_range=START_RANGE,
            shortest_episode=LONGEST_COUNT,  # nothing but the time limit ends one
            seed=seed,
            device=device,
            dtype=dtype,
            max_episode_steps=max_episode_steps,
        )
        self._angle, self._speed = self._state  # (N,) views
        self._gravity = 3 * g / (2 * LENGTH)

    def set_state(self, state: Tensor, counts: Tensor | int = 0) -> None:
        """Puts running environments at `state` (N, 2), θ and θ', `counts` steps into their episodes."""
        super().set_state(state, counts)
        self._wrap()

    def step(self, actions: Tensor) -> Step:
        """Turns each pendulum with its torque, (N, 1) or (N,); resets those whose episode had ended."""
        torques = actions.detach().reshape(-1).to(self.dtype).clamp(-MAX_TORQUE, MAX_TORQUE)
        runs = self._begin_step()
        costs = torch.addcmul(self._angle * self._angle, self._speed, self._speed, value=0.1)
        costs.addcmul_(torques, torques, value=0.001)
        self._move(torques)
        self._restart(runs)
        return self._end_step(-costs * runs, torch.zeros_like(self._running))

    def _move(self, torques: Tensor) -> None:
        self._speed.add_(self._angle.sin(), alpha=self._gravity * SECONDS)
        self._speed.add_(torques, alpha=3 / (MASS * LENGTH**2) * SECONDS).clamp_(-MAX_SPEED, MAX_SPEED)
        self._angle.add_(self._speed, alpha=SECONDS)
        self._wrap()

    def _wrap(self) -> None:
        """θ less its whole turns; an angle within ±π stays as it is, to the last bit."""
        self._angle.sub_((self._angle / math.tau).round_(), alpha=math.tau)

    def _observe(self) -> Tensor:
        return torch.stack((self._angle.cos(), self._angle.sin(), self._speed)).float().t()
