"""What every batch of environments offers, and what a step of one returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from classic.spaces import Observations, Space


@dataclass(frozen=True)
class Step:
    """What N environments answered to one action each, in tensors that no later step writes to.

    The flags are as the environment set them: where both are True, `terminated` wins, and nothing is bootstrapped.
    """

    observations: Observations  # (N, …) after the action; SAME_STEP and DISABLED: after the reset, where ended
    rewards: Tensor  # (N,) float32, as the environment paid them
    terminated: Tensor  # (N,) bool: a true end, beyond which there is no value
    truncated: Tensor  # (N,) bool: cut off, by a time limit mostly
    decided: Tensor  # (N,) bool: False where the action was ignored, because the environment was being reset
    final_observations: Observations | None = None  # (N, …) SAME_STEP and DISABLED, always: after the action
    action_mask: Tensor | None = None  # (N, A) bool, the allowed choices in `observations`, where the environment tells


class Environments(Protocol):
    """A batch of `num_envs` environments whose tensors live on one device.

    Where `final_observations` is None the batch resets in the step after an end (NEXT_STEP): that step's action is
    ignored, it pays nothing, ends nothing, and is not `decided`.

    Actions are (N,) integers from 0 for Discrete, (N, K) for MultiDiscrete and MultiBinary, (N, D) numbers for a Box,
    not clipped here to its bounds.
    """

    num_envs: int
    device: torch.device
    action_mask: Tensor | None  # (N, A) bool, the allowed choices in the latest observations, also those of `reset`

    @property
    def observation_space(self) -> Space:
        """Of one environment; `encode` makes `Observations` of its own ones."""

    @property
    def action_space(self) -> Space:
        """Of one environment; `to_native` makes its own actions of ours."""

    def reset(self, *, seed: int | None = None) -> Observations:
        """Starts all environments anew; → the first observations (N, …)."""

    def step(self, actions: Tensor) -> Step:
        """Takes one action in each environment."""

    def close(self) -> None:
        """Frees what the environments hold."""

    def state_dict(self) -> dict[str, Any]:
        """All that going on exactly needs; empty where the environments cannot tell."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
