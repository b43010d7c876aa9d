"""Small deterministic environments, whose answers can be worked out by hand."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv

STOP = 1


class Counting(gymnasium.Env):
    """Shows (episode, steps in it) and pays the steps; STOP terminates, and `limit` steps truncate."""

    observation_space = spaces.Box(0, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, limit: int = 3) -> None:
        self.limit = limit
        self.episode = self.count = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.episode, self.count = self.episode + 1, 0
        return self._observe(), {}

    def step(self, action):
        self.count += 1
        return self._observe(), float(self.count), bool(action == STOP), self.count == self.limit, {}

    def _observe(self) -> np.ndarray:
        return np.array([self.episode, self.count], dtype=np.float32)


class Masked(Counting):
    """Forbids choice `steps in the episode` of four; tells in `info`, and not at odd counts if `rarely`."""

    action_space = spaces.Discrete(4)

    def __init__(self, limit: int = 3, rarely: bool = False) -> None:
        super().__init__(limit)
        self.rarely = rarely

    def reset(self, **kwargs: Any):
        observations, _ = super().reset(**kwargs)
        return observations, self._told()

    def step(self, action):
        return *super().step(action)[:4], self._told()

    def _told(self) -> dict[str, Any]:
        return {} if self.rarely and self.count % 2 else {"action_mask": self.mask()}

    def mask(self) -> Any:
        return (np.arange(4) != self.count).astype(np.int8)


class MaskedPairs(Masked):
    """Two choices at once, the mask in Gymnasium's own form for them: a tuple of arrays."""

    action_space = spaces.MultiDiscrete([3, 2])

    def step(self, action):
        return super().step(0)

    def mask(self) -> Any:
        return np.array([1, 0, 1], np.int8), np.array([0, 1], np.int8)


class WrongMask(Masked):
    """Tells of three choices where there are four."""

    def mask(self) -> Any:
        return np.ones(3, np.int8)


class MaskShown(Counting):
    """Forbids choice `steps in the episode` of four; tells in its observations."""

    action_space = spaces.Discrete(4)
    observation_space = spaces.Dict(
        {"count": Counting.observation_space, "action_mask": spaces.Box(0, 1, (4,), np.int8)}
    )

    def _observe(self):
        return {"count": super()._observe(), "action_mask": (np.arange(4) != self.count).astype(np.int8)}


class Showing(gymnasium.Env):
    """Shows samples of any space, which it keeps."""

    def __init__(self, space: gymnasium.Space, action_space: gymnasium.Space | None = None) -> None:
        self.observation_space = space
        self.action_space = action_space or spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.shown = self.observation_space.sample()
        return self.shown, {}

    def step(self, action):
        self.shown = self.observation_space.sample()
        return self.shown, 0.0, False, False, {}


class Echo(gymnasium.Env):
    """Shows the action that it received, flattened, once it has found it in its space."""

    def __init__(self, space: gymnasium.Space) -> None:
        self.action_space = space
        size = int(np.prod(space.shape))
        self.observation_space = spaces.Box(-np.inf, np.inf, (size,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        return np.zeros(self.observation_space.shape, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), repr(action)
        return np.ravel(action).astype(np.float32), 0.0, False, False, {}


class Halved(gymnasium.ObservationWrapper):
    """Shows half of what there is."""

    def observation(self, observation):
        return observation / 2


def counting_in_same_step(num_envs: int, **kwargs: Any) -> SyncVectorEnv:
    """A vectorization of its own, with its own way of resetting."""
    kwargs.pop("max_episode_steps", None)
    return SyncVectorEnv([lambda: Counting(**kwargs)] * num_envs, autoreset_mode="SameStep")


def counting_in_silence(num_envs: int) -> SyncVectorEnv:
    """A vectorization that does not say how it resets."""
    envs = SyncVectorEnv([Counting] * num_envs)
    del envs.metadata["autoreset_mode"]
    return envs


if "Counting-v0" not in gymnasium.registry:
    gymnasium.register("Counting-v0", Counting, vector_entry_point=counting_in_same_step)
    gymnasium.register("Silent-v0", Counting, vector_entry_point=counting_in_silence)
