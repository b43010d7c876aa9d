"""Environments and policies small enough to know what must come of them, and how the tests make learners."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from classic.config import EnvironmentSettings, TrainConfig
from classic.distributions import Categorical
from classic.envs import Step
from classic.evaluate import Evaluator
from classic.policy import Policy
from classic.ppo import Learner, learner_of
from classic.rollout import Trajectory, experience_of
from classic.settings import NetworkSettings
from classic.spaces import Box, Discrete
from ppo_rlhf.core import Evaluation, Experience
from ppo_rlhf.run import make_accelerator
from ppo_rlhf.settings import OptimizerSettings, PPOSettings

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NO_GPU])]
ANY = (-math.inf, math.inf)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(one: Any, other: Any) -> bool:
    """Whether two state dicts, or two lists of tensors, are equal to the last bit; NaN equals NaN."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def copied(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module as it is now."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# ------------------------------------------------------------------------------------------------- what must be learnt


def to_one_hot(target: Any, n: int = 4) -> np.ndarray:
    return np.eye(n, dtype=np.float32)[int(target)]


def to_image(target: Any) -> np.ndarray:
    """A grey image with one quarter lit."""
    image = np.zeros((36, 36, 1), dtype=np.uint8)
    row, column = divmod(int(target), 2)
    image[18 * row : 18 * row + 18, 18 * column : 18 * column + 18] = 255
    return image


SHOWN: dict[str, tuple[spaces.Space, Callable[[Any], Any]]] = {  # ways to show which of four choices is right
    "vector": (spaces.Box(0, 1, (4,), np.float32), to_one_hot),
    "discrete": (spaces.Discrete(4, start=2), lambda target: int(target) + 2),
    "several choices": (spaces.MultiDiscrete([2, 2], start=[0, 5]), lambda t: np.array([t // 2, t % 2 + 5])),
    "switches": (spaces.MultiBinary(2), lambda t: np.array([t // 2, t % 2], np.int8)),
    "dict": (
        spaces.Dict({"row": spaces.Discrete(2), "column": spaces.Box(0, 1, (1, 1), np.float32)}),
        lambda t: {"row": int(t // 2), "column": np.full((1, 1), t % 2, np.float32)},
    ),
    "tuple": (
        spaces.Tuple((spaces.Discrete(2), spaces.MultiBinary(1))),
        lambda t: (int(t // 2), np.array([t % 2], np.int8)),
    ),
    "image": (spaces.Box(0, 255, (36, 36, 1), np.uint8), to_image),
    "image and vector": (
        spaces.Dict({"eye": spaces.Box(0, 255, (36, 36, 1), np.uint8), "row": spaces.Box(-10, 10, (1,), np.float32)}),
        lambda t: {"eye": to_image(t % 2), "row": np.array([t // 2 * 20 - 10], np.float32)},
    ),
}


class Guess(gymnasium.Env):
    """Shows an action and pays 1 for taking it: the parts that are right, or how near they are. `length` steps.

    With `shown` the action is one of four, shown in another way.
    """

    def __init__(self, action_space: spaces.Space | None = None, shown: str | None = None, length: int = 16) -> None:
        self.action_space = action_space or spaces.Discrete(4)
        self.shown = shown
        self.length = length
        if shown is None:
            size = spaces.flatdim(self.action_space)
            self.observation_space = spaces.Box(-np.inf, np.inf, (size,), np.float32)
        else:
            self.observation_space = SHOWN[shown][0]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        if seed is not None:
            self.action_space.seed(seed)
        self.count = 0
        return self._next(), self._told()

    def step(self, action):
        assert self.action_space.contains(action), repr(action)
        reward = self._reward(action)
        self.count += 1
        return self._next(), reward, False, self.count == self.length, self._told()

    def _next(self) -> Any:
        self.target = self.action_space.sample()
        if self.shown is not None:
            return SHOWN[self.shown][1](self.target)
        return spaces.flatten(self.action_space, self.target).astype(np.float32)

    def _reward(self, action: Any) -> float:
        if isinstance(self.action_space, spaces.Box):
            return 1 - 2 * float(
                np.mean(np.abs(action - self.target) / (self.action_space.high - self.action_space.low))
            )
        return float(np.mean(action == self.target))

    def _told(self) -> dict[str, Any]:
        return {}


def far_and_dear(env: gymnasium.Env) -> gymnasium.Env:
    """The same with observations around 1000, and paying a thousand times as much."""
    shifted = gymnasium.wrappers.TransformObservation(env, lambda x: 1000 + x, env.observation_space)
    return gymnasium.wrappers.TransformReward(shifted, lambda reward: 1000 * reward)


class Allowed(Guess):
    """Shows nothing, allows two of four choices, and pays for the lower one; a forbidden choice is an error."""

    observation_space = spaces.Box(0, 1, (1,), np.float32)

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = Allowed.observation_space

    def _next(self) -> Any:
        self.mask = np.zeros(4, np.int8)
        self.mask[self.np_random.choice(4, 2, replace=False)] = 1
        return np.zeros(1, np.float32)

    def _reward(self, action: Any) -> float:
        assert self.mask[action], f"{action} is forbidden by {self.mask}"
        return float(action == self.mask.argmax())

    def _told(self) -> dict[str, Any]:
        return {"action_mask": self.mask.copy()}


class Remember(gymnasium.Env):
    """Shows one of two cues at first and nothing afterwards; pays 1 for naming it in the last of four steps."""

    observation_space = spaces.Box(0, 1, (3,), np.float32)
    action_space = spaces.Discrete(2)
    steps = 4

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.count, self.cue = 0, int(self.np_random.integers(2))
        return np.array([self.cue, 1 - self.cue, 0], np.float32), {}

    def step(self, action):
        self.count += 1
        last = self.count == self.steps
        observation = np.array([0, 0, self.count / self.steps], np.float32)
        return observation, float(last and action == self.cue), last, False, {}


def mean_reward(
    policy: Policy, env: Callable[[], gymnasium.Env], *, episodes: int = 8, deterministic: bool = True
) -> float:
    """What the policy is paid a step, or by `Remember` an episode, in fresh episodes."""
    judge = Evaluator(env, episodes=episodes, seed=99)
    outcome = judge(policy, deterministic=deterministic)
    judge.close()
    return float((outcome.returns / getattr(env(), "length", 1)).mean())


# ----------------------------------------------------------------------------------------------- what is known by hand


class Tape:
    """Environments that show, pay and end as told, whatever is done in them.

    shown (N, T + 1), rewards (N, T): numbers by environment and time. terminated, truncated, resets: pairs of an
    environment and a time. final: by such a pair, what an episode last showed, where the next observation is another
    episode's.
    """

    action_mask = None
    action_space = Discrete(2)
    observation_space = Box((1,), ANY[:1], ANY[1:])

    def __init__(
        self,
        shown: Any,
        rewards: Any,
        *,
        terminated: Iterable[tuple[int, int]] = (),
        truncated: Iterable[tuple[int, int]] = (),
        resets: Iterable[tuple[int, int]] = (),
        final: dict[tuple[int, int], float] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.shown = torch.as_tensor(shown, dtype=dtype)[..., None]
        self.rewards = torch.as_tensor(rewards, dtype=dtype)
        self.num_envs, self.device, self.time = len(self.rewards), torch.device("cpu"), 0
        self.terminated, self.truncated, self.undecided = (
            self._flags(pairs) for pairs in (terminated, truncated, resets)
        )
        self.final = final

    def _flags(self, pairs: Iterable[tuple[int, int]]) -> Tensor:
        flags = torch.zeros(self.rewards.shape, dtype=torch.bool)
        for pair in pairs:
            flags[pair] = True
        return flags

    def reset(self, *, seed: int | None = None) -> Tensor:
        self.time = 0
        return self.shown[:, 0]

    def step(self, actions: Tensor) -> Step:
        t = self.time
        self.time += 1
        final = None
        if self.final is not None:
            final = self.shown[:, t + 1].clone()
            for (row, time), shown in self.final.items():
                if time == t:
                    final[row] = shown
        return Step(
            self.shown[:, t + 1],
            self.rewards[:, t],
            self.terminated[:, t],
            self.truncated[:, t],
            ~self.undecided[:, t],
            final_observations=final,
        )

    def state_dict(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


class Plain(nn.Module):
    """A scripted policy in float64: V(s) and the action are functions of what is shown."""

    normalizer = reward_normalizer = core = None

    def __init__(
        self,
        value: Callable[[Tensor], Tensor] = lambda shown: shown[..., 0],
        action: Callable[[Tensor], Tensor] = lambda shown: shown[..., 0].long() % 2,
    ) -> None:
        super().__init__()
        self.distribution = Categorical(2)
        self.value_of, self.action_of = value, action

    def memory(self, num_envs: int) -> None:
        return None

    def decide(self, observations: Tensor, noise: Any, memory: Any, action_mask: Any) -> Tensor:
        return self.action_of(observations.double())

    def value(self, observations: Tensor, memory: Any = None) -> Tensor:
        return self.value_of(observations.double())

    def forward(self, *, observations: Tensor, actions: Tensor) -> Evaluation:
        values = self.value_of(observations.double())
        half = torch.full((*values.shape, 2), math.log(0.5), dtype=torch.float64)
        return Evaluation(half[..., 0], -half[..., 0], values, (half,))


# ---------------------------------------------------------------------------------------------------------- learners


def config_of(**changes: Any) -> TrainConfig:
    """Four environments of sixteen steps, two passes of two minibatches."""
    ppo = {"num_epochs": 2, "num_minibatches": 2, "value_clip_range": None, "value_coef": 0.5, "max_grad_norm": 0.5}
    ppo |= changes.pop("ppo", {})
    network = NetworkSettings(**{"hidden_sizes": (16, 16), **changes.pop("network", {})})
    optimizer = OptimizerSettings(**{"lr": 3e-3, "schedule": "constant", **changes.pop("optimizer", {})})
    environment = EnvironmentSettings(**changes.pop("environment", {}))
    settings = {"num_envs": 4, "horizon": 16, "num_steps": 6 * 64, "log_with": (), "eval_episodes": 2, "device": "cpu"}
    return TrainConfig(
        **{**settings, **changes},
        ppo=PPOSettings(**ppo),
        network=network,
        optimizer=optimizer,
        environment=environment,
    )


def make_learner(env: Any = "CartPole-v1", policy: Policy | None = None, **changes: Any) -> Learner:
    """What `train` trains, before its first update."""
    config = config_of(**changes)
    accelerator = make_accelerator(None, precision="no", log_with=(), cpu=config.device == "cpu")
    return learner_of(config, env, policy, accelerator)


def collected(learner: Learner, *, seed: int = 0, **settings: Any) -> tuple[Trajectory, Experience]:
    """One rollout, and what is learnt from it."""
    noise = torch.Generator(learner.policy.device).manual_seed(seed)
    trajectory = learner.collector.collect(learner.policy, learner.config.horizon, noise)
    return trajectory, experience_of(trajectory, learner.policy, **{"gamma": 0.9, "lam": 0.8, **settings})
