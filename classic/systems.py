"""The environments whose state can be drawn: their state's numbers, the planes to look at, and what actions are called.

Also an environment of one's own whose observation is two numbers with bounds: the plane of them is all there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from classic.config import EnvironmentSettings
from classic.spaces import Box, Discrete, Space


@dataclass(frozen=True)
class Variable:
    """One number of a state, with the range that a picture shows of it; 0 is its rest."""

    name: str
    unit: str
    low: float
    high: float
    turns: bool = False  # an angle: both ends of the range are the same


@dataclass(frozen=True)
class System:
    """An environment whose state is a few numbers that its observations tell."""

    variables: tuple[Variable, ...]
    planes: tuple[tuple[int, int], ...]  # pairs of variables, across and up; the others are held at 0
    actions: tuple[str, ...]  # names of the choices, or of the numbers that an action has
    unit: str = ""  # of an action that is numbers
    observe: Callable[[Tensor], Tensor] = lambda states: states  # states (…, S) → observations (…, D)
    state_of: Callable[[Tensor], Tensor] = lambda observations: observations  # and back


def _angle(name: str) -> Variable:
    return Variable(name, "rad", -math.pi, math.pi, turns=True)


def _observe_pendulum(states: Tensor) -> Tensor:
    angle, speed = states.unbind(-1)
    return torch.stack((angle.cos(), angle.sin(), speed), dim=-1)


def _state_of_pendulum(observations: Tensor) -> Tensor:
    cos, sin, speed = observations.unbind(-1)
    return torch.stack((torch.atan2(sin, cos), speed), dim=-1)


def _observe_acrobot(states: Tensor) -> Tensor:
    first, second, first_speed, second_speed = states.unbind(-1)
    return torch.stack((first.cos(), first.sin(), second.cos(), second.sin(), first_speed, second_speed), dim=-1)


def _state_of_acrobot(observations: Tensor) -> Tensor:
    cos, sin, other_cos, other_sin, speed, other_speed = observations.unbind(-1)
    return torch.stack((torch.atan2(sin, cos), torch.atan2(other_sin, other_cos), speed, other_speed), dim=-1)


HILL = (Variable("position", "", -1.2, 0.6), Variable("velocity", "", -0.07, 0.07))
# By Gymnasium's name without its version; ranges: those of its documentation, or where they have none what is visited.
SYSTEMS = {
    "CartPole": System(
        variables=(
            Variable("position", "m", -2.4, 2.4),
            Variable("velocity", "m/s", -2.0, 2.0),
            Variable("pole angle", "rad", -0.21, 0.21),
            Variable("angular velocity", "rad/s", -2.0, 2.0),
        ),
        planes=((2, 3), (0, 1)),
        actions=("push left", "push right"),
    ),
    "Pendulum": System(
        variables=(_angle("angle"), Variable("angular velocity", "rad/s", -8.0, 8.0)),
        planes=((0, 1),),
        actions=("torque",),
        unit="N m",
        observe=_observe_pendulum,
        state_of=_state_of_pendulum,
    ),
    "MountainCar": System(HILL, planes=((0, 1),), actions=("push left", "no push", "push right")),
    "MountainCarContinuous": System(HILL, planes=((0, 1),), actions=("force",)),
    "Acrobot": System(
        variables=(
            _angle("upper angle"),
            _angle("lower angle"),
            Variable("upper angular velocity", "rad/s", -4 * math.pi, 4 * math.pi),
            Variable("lower angular velocity", "rad/s", -9 * math.pi, 9 * math.pi),
        ),
        planes=((0, 2), (1, 3)),
        actions=("torque −1", "no torque", "torque +1"),
        observe=_observe_acrobot,
        state_of=_state_of_acrobot,
    ),
}


def system_of(
    env_id: str, observation_space: Space, action_space: Space, settings: EnvironmentSettings
) -> System | None:
    """The system that an environment is; None where its state cannot be drawn, or wrappers may change what it shows."""
    if settings.wrappers or settings.frame_stack > 1 or not isinstance(observation_space, Box):
        return None
    system = SYSTEMS.get(env_id.rpartition(":")[2].rpartition("-v")[0]) or _plane(observation_space, action_space)
    if system is None:
        return None
    sizes = (system.observe(torch.zeros(len(system.variables))).numel(), len(system.actions))
    return system if sizes == (math.prod(observation_space.shape), _num_actions(action_space)) else None


def _plane(observation_space: Box, action_space: Space) -> System | None:
    """A system of two observed numbers; None where there are more, or they have no bounds."""
    bounds = tuple(zip(observation_space.low, observation_space.high, strict=True))
    if len(bounds) != 2 or not all(math.isfinite(bound) for pair in bounds for bound in pair):
        return None
    variables = tuple(Variable(f"observation {i}", "", low, high) for i, (low, high) in enumerate(bounds))
    return System(variables, ((0, 1),), tuple(f"action {i}" for i in range(_num_actions(action_space))))


def _num_actions(space: Space) -> int:
    """Choices, or numbers of an action; 0 for a space of another kind."""
    if isinstance(space, Discrete):
        return space.n
    return math.prod(space.shape) if isinstance(space, Box) else 0
