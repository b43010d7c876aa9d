"""Pictures of a policy: what it does and expects over planes of its environment's state, and episodes that it played.

One is a line of policy_pictures.jsonl in the run folder, which docs/classic-report.md describes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from classic.config import TrainConfig
from classic.envs import make_environments
from classic.envs.batched import BatchedEnvironments
from classic.evaluate import play
from classic.policy import Policy
from classic.spaces import Box, Discrete
from classic.systems import System, system_of
from ppo_rlhf.seeding import keyed_seed

POINTS = 41  # along each side of a plane: odd, so that rest is one of them
ARROWS = 15  # along each side, where a step leads
EPISODES = 3
LONGEST = 150  # decisions of an episode that are played: most of what a picture costs
DIGITS = 7  # after the point


class Painter:
    """Paints policies of one environment, each time over the same planes and in the same episodes."""

    def __init__(self, system: System, env: Any, config: TrainConfig, *, device: torch.device) -> None:
        self.system = system
        self.seed = keyed_seed(config.seed, "pictures")
        self._envs = make_environments(
            env, num_envs=EPISODES, seed=self.seed, device=device, **config.environment.arguments()
        )
        self._arrows: BatchedEnvironments | None = None
        if isinstance(self._envs, BatchedEnvironments):  # which can be put at a state
            made = make_environments(env, num_envs=ARROWS**2, device=device, **config.environment.arguments())
            assert isinstance(made, BatchedEnvironments)
            self._arrows = made

    @torch.no_grad()
    def __call__(self, policy: Policy) -> dict[str, Any]:
        """The picture of the policy as it is, as JSON's own types; nothing of the policy changes."""
        return {
            "variables": [asdict(variable) for variable in self.system.variables],
            "actions": list(self.system.actions),
            "planes": [self._plane(policy, *pair) for pair in self.system.planes],
            "episodes": self._episodes(policy),
        }

    def close(self) -> None:
        """Frees the environments."""
        self._envs.close()

    def _plane(self, policy: Policy, across: int, up: int) -> dict[str, Any]:
        observations = self.system.observe(self._states(across, up, POINTS)).to(policy.device)
        quantities = [
            {**quantity, "numbers": _rounded(numbers.view(POINTS, POINTS))}
            for quantity, numbers in quantities_of(self.system, policy, observations)
        ]
        plane = {"across": across, "up": up, "quantities": quantities}
        if self._arrows is not None:
            plane["arrows"] = self._arrows_of(policy, across, up)
        return plane

    def _states(self, across: int, up: int, points: int) -> Tensor:
        """States (points², S) on a grid, row by row from the bottom, everything else at rest."""
        x, y = (self.system.variables[index] for index in (across, up))
        rows, columns = torch.meshgrid(
            torch.linspace(y.low, y.high, points), torch.linspace(x.low, x.high, points), indexing="ij"
        )
        states = torch.zeros(points**2, len(self.system.variables))
        states[:, across], states[:, up] = columns.flatten(), rows.flatten()
        return states

    def _arrows_of(self, policy: Policy, across: int, up: int) -> list[Any]:
        """How far a step of the deterministic policy leads across and up, (ARROWS, ARROWS, 2)."""
        assert self._arrows is not None
        states = self._states(across, up, ARROWS)
        self._arrows.set_state(states)
        observations = self.system.observe(states).to(policy.device)
        actions = policy.decide(observations, None, None, None)
        self._arrows.step(policy.distribution.to_environment(actions))
        moved = self._arrows.state.cpu() - states
        for index, variable in enumerate(self.system.variables):
            if variable.turns:
                moved[:, index] = torch.remainder(moved[:, index] + math.pi, math.tau) - math.pi
        return _rounded(moved[:, [across, up]].view(ARROWS, ARROWS, 2))

    def _episodes(self, policy: Policy) -> list[dict[str, Any]]:
        """Deterministic episodes from the same starts each time: states (T, S), actions (T, …), the return so far."""
        seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

        def watch(observations: Tensor, actions: Tensor, rewards: Tensor, counts: Tensor) -> None:
            seen.append((self.system.state_of(observations), actions, rewards, counts))

        play(self._envs, policy, episodes=EPISODES, seed=self.seed, longest=LONGEST, watch=watch)
        states, actions, rewards, counts = (torch.stack(each, dim=1) for each in zip(*seen, strict=True))
        return [
            {
                "states": _rounded(states[index, counts[index]]),
                "actions": _rounded(actions[index, counts[index]]),
                "return": rewards[index, counts[index]].double().sum().item(),
            }
            for index in range(EPISODES)
        ]


def painter_of(env: Any, policy: Policy, config: TrainConfig) -> Painter | None:
    """What paints such policies; None where no pictures are asked for or the state cannot be drawn, and for a
    recurrent policy, which does not decide by the state alone.
    """
    system = system_of(config.env_id, policy.observation_space, policy.action_space, config.environment)
    if not config.pictures or system is None or policy.core is not None:
        return None
    return Painter(system, env, config, device=policy.device)


def quantities_of(system: System, policy: Policy, observations: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """What a picture can show, each with its numbers (N,) at observations (N, D).

    The probability of each choice (of two the second's says both), or the deterministic policy's action; the value.
    """
    if isinstance(policy.action_space, Discrete):
        probabilities = policy.probabilities(observations)
        for index, name in enumerate(system.actions):
            if len(system.actions) > 2 or index == 1:
                yield {"name": f"probability of {name}", "unit": "", "range": [0, 1]}, probabilities[:, index]
    else:
        assert isinstance(policy.action_space, Box)
        actions = policy.distribution.to_environment(policy.decide(observations, None, None, None))
        for index, name in enumerate(system.actions):
            low, high = policy.action_space.low[index], policy.action_space.high[index]
            bounds = [low, high] if math.isfinite(high - low) else None
            yield {"name": name, "unit": system.unit, "range": bounds}, actions[:, index]
    yield {"name": "value", "unit": "", "range": None}, policy.value(observations)


def _rounded(numbers: Tensor) -> list[Any]:
    if not numbers.is_floating_point():
        return numbers.tolist()
    return numbers.double().round(decimals=DIGITS).tolist()
