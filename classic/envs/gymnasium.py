"""Every environment of Gymnasium, and of whoever follows its interface, as a batch of tensors.

With `classic.video`, the only module that imports gymnasium.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces as gymnasium_spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import concatenate, create_empty_array, iterate
from torch import Tensor

from classic.envs.types import Step
from classic.spaces import (
    Box,
    Dict,
    Discrete,
    Flat,
    MultiBinary,
    MultiDiscrete,
    Observations,
    Space,
    Tuple,
    encode,
    to_native,
    vector_size,
)
from ppo_rlhf.errors import UserError, did_you_mean
from ppo_rlhf.references import load_object

Env = str | Callable[..., gymnasium.Env]  # an id, `module:id`, or what makes one environment
Wrapper = str | Callable[[gymnasium.Env], gymnasium.Env]  # or its name, `module:function`

MASK = "action_mask"  # where environments tell the allowed choices: a key of `info`, or of Dict observations
EXTRAS = ("box2d", "mujoco")  # ours, each named as the module of Gymnasium's that needs it


# ---------------------------------------------------------------------------------------------------------- spaces


def observation_space(space: gymnasium.Space) -> Space:
    """Gymnasium's space as ours; bytes with three or four axes are an image.

    Raises UserError, which names the space, where it is of another kind.
    """
    if isinstance(space, gymnasium_spaces.Dict):
        return Dict({str(name): observation_space(inner) for name, inner in space.spaces.items()})
    if isinstance(space, gymnasium_spaces.Tuple):
        return Tuple(tuple(observation_space(inner) for inner in space.spaces))
    if isinstance(space, gymnasium_spaces.Box) and space.dtype == np.uint8 and len(space.shape) in (3, 4):
        channels_first = len(space.shape) == 3 and space.shape[0] < space.shape[-1]
        return Box(space.shape, (0.0,), (255.0,), image=True, channels_first=channels_first)
    return _flat_space(space, "observation", "Box, Discrete, MultiDiscrete, MultiBinary, Dict and Tuple")


def action_space(space: gymnasium.Space) -> Flat:
    """Gymnasium's space as ours.

    Raises UserError, which names the space, where it is of another kind.
    """
    return _flat_space(space, "action", "Discrete, MultiDiscrete, MultiBinary and Box")


def _flat_space(space: gymnasium.Space, role: str, known: str) -> Flat:
    if isinstance(space, gymnasium_spaces.Discrete):
        return Discrete(int(space.n), int(space.start))
    if isinstance(space, gymnasium_spaces.MultiDiscrete):
        nvec, start = (tuple(numbers.reshape(-1).tolist()) for numbers in (space.nvec, space.start))
        return MultiDiscrete(nvec, start, None if len(space.shape) == 1 else tuple(space.shape))
    if isinstance(space, gymnasium_spaces.MultiBinary):
        return MultiBinary(tuple(space.shape))
    if isinstance(space, gymnasium_spaces.Box):
        low, high = (tuple(bound.reshape(-1).astype(float).tolist()) for bound in (space.low, space.high))
        return Box(tuple(space.shape), low, high)
    raise UserError(f"unsupported {role} space {space}: {known} are; a wrapper can turn it into one of them.")


def _num_choices(space: Flat) -> int:
    """How long a mask of the allowed actions is; 0 where actions are not choices."""
    return vector_size(space) if isinstance(space, (Discrete, MultiDiscrete)) else 0


# ---------------------------------------------------------------------------------------------- making environments


@dataclass(frozen=True)
class SingleEnvironment:
    """Makes one environment each time it is called.

    Around what `env` gives: Gymnasium's time limit, AtariPreprocessing if `atari`, `wrappers` in their order, and
    stacked frames outermost. `max_episode_steps`: None keeps the environment's own limit, −1 takes it away.

    Raises UserError, when called, for an unknown environment, a package that is missing, arguments that the environment
    refuses, a callable that gives something else, and spaces that are not supported.
    """

    env: Env
    env_kwargs: Mapping[str, Any]
    wrappers: Sequence[Callable[[gymnasium.Env], gymnasium.Env]] = ()
    max_episode_steps: int | None = None
    frame_stack: int = 1
    atari: bool = False

    def __call__(self) -> gymnasium.Env:
        env = self._registered(self.env) if isinstance(self.env, str) else self._called(self.env)
        with _closing_on_error(env):
            return self._wrapped(env)

    def _wrapped(self, env: gymnasium.Env) -> gymnasium.Env:
        if self.atari:
            with _explained(self.env, self.env_kwargs, extra="atari"):
                # Without stacking, an axis of one channel makes the frame an image.
                env = gymnasium.wrappers.AtariPreprocessing(env, grayscale_newaxis=self.frame_stack == 1)
        for wrapper in self.wrappers:
            env = wrapper(env)
        if self.frame_stack > 1:
            env = gymnasium.wrappers.FrameStackObservation(env, self.frame_stack)
        observation_space(env.observation_space)
        action_space(env.action_space)
        return env

    def _registered(self, env_id: str) -> gymnasium.Env:
        registered = registered_id(env_id, atari=self.atari)
        # AtariPreprocessing skips frames itself.
        arguments = {**({"frameskip": 1} if self.atari else {}), **self.env_kwargs}
        with _explained(env_id, arguments):
            return gymnasium.make(registered, max_episode_steps=self.max_episode_steps, **arguments)

    def _called(self, make: Callable[..., gymnasium.Env]) -> gymnasium.Env:
        with _explained(make, self.env_kwargs):
            env = make(**self.env_kwargs)
        if not isinstance(env, gymnasium.Env):
            raise UserError(f"{_name(make)} returned {type(env).__name__}, not an environment (gymnasium.Env).")
        if self.max_episode_steps is None or self.max_episode_steps < 0:
            return env
        return gymnasium.wrappers.TimeLimit(env, self.max_episode_steps)


def registered_id(env_id: str, *, atari: bool = False) -> str:
    """The id under which Gymnasium knows the environment, once the module of `module:id` is imported.

    Raises UserError for an unknown environment, with the nearest known one, and where ale-py is needed and missing.
    """
    module, _, name = env_id.rpartition(":")
    if module:
        load_object(f"{module}:__name__")
    if atari or name.startswith("ALE/"):
        with _explained(env_id, {}, extra="atari"):
            import ale_py

            gymnasium.register_envs(ale_py)
    if name not in gymnasium.registry:
        hint = did_you_mean(name, gymnasium.registry) or " One of your own is module:EnvId, or a callable."
        raise UserError(f"unknown environment {env_id}.{hint}")
    return name


def reward_threshold(env_id: str) -> float | None:
    """Gymnasium's `reward_threshold` of an environment; None where it has none, or does not know the environment."""
    spec = gymnasium.registry.get(env_id.rpartition(":")[2])
    return None if spec is None else spec.reward_threshold


@contextmanager
def _closing_on_error(envs: gymnasium.Env | VectorEnv) -> Iterator[None]:
    """Closes them where what follows fails, so that no process, window or file of theirs stays behind."""
    try:
        yield
    except BaseException:
        envs.close()
        raise


@contextmanager
def _explained(env: Env, env_kwargs: Mapping[str, Any], extra: str = "") -> Iterator[None]:
    """Turns what goes wrong when an environment is made into a user's error, where it is one.

    extra: of ours, that installs what may be missing.
    """
    try:
        yield
    except (ModuleNotFoundError, gymnasium.error.DependencyNotInstalled) as error:
        extra = extra or _extra_of(env)
        remedy = f'; pip install "ppo-rlhf[{extra}]"' if extra else ""
        cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
        raise UserError(f"{_name(env)} needs a package that is not there: {_one_line(cause)}{remedy}") from error
    except ImportError as error:
        raise UserError(f"{_name(env)}: {_one_line(error)}") from error
    except (TypeError, ValueError, AssertionError) as error:
        if not env_kwargs:
            raise
        raise UserError(f"{_name(env)} refuses env_kwargs={dict(env_kwargs)}: {_one_line(error)}") from error


def _extra_of(env: Env) -> str:
    """Our extra that installs what the registered environment needs, or nothing."""
    spec = gymnasium.registry.get(env.rpartition(":")[2]) if isinstance(env, str) else None
    return next((extra for extra in EXTRAS if spec and f".{extra}" in str(spec.entry_point)), "")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _name(env: Env) -> str:
    return env if isinstance(env, str) else getattr(env, "__qualname__", type(env).__name__)


def _vectorized(single: SingleEnvironment, num_envs: int, vectorization: str, autoreset: str | None) -> VectorEnv:
    if vectorization == "vector_entry_point":
        return _from_entry_point(single, num_envs, autoreset)
    kind = {"sync": SyncVectorEnv, "async": AsyncVectorEnv}[vectorization]
    mode = AutoresetMode[(autoreset or "next_step").upper()]
    return kind([single] * num_envs, copy=False, autoreset_mode=mode)  # `encode` copies


def _from_entry_point(single: SingleEnvironment, num_envs: int, autoreset: str | None) -> VectorEnv:
    """The environment's own vectorization, which sets its own way of resetting."""
    name = _name(single.env)
    if not isinstance(single.env, str):
        raise UserError(f"vectorization=vector_entry_point needs an environment id, not {name}; use sync or async.")
    if single.wrappers or single.frame_stack > 1 or single.atari:
        raise UserError(f"{name}: vectorization=vector_entry_point takes no wrappers; use sync or async.")
    registered = registered_id(single.env)
    if gymnasium.spec(registered).vector_entry_point is None:
        raise UserError(f"{name} has no vectorization of its own (vector_entry_point); use sync or async.")
    arguments = dict(single.env_kwargs)
    if single.max_episode_steps is not None:
        arguments["max_episode_steps"] = single.max_episode_steps
    with _explained(name, arguments):
        envs = gymnasium.make_vec(registered, num_envs, "vector_entry_point", None, (), **arguments)
    with _closing_on_error(envs):
        if autoreset is not None and _autoreset_mode(envs) is not AutoresetMode[autoreset.upper()]:
            mode = _autoreset_mode(envs).name.lower()
            raise UserError(
                f"{name} resets in {mode} mode, not autoreset={autoreset}; use vectorization sync or async."
            )
    return envs


def _autoreset_mode(envs: VectorEnv) -> AutoresetMode:
    mode = envs.metadata.get("autoreset_mode")
    if mode is None:
        raise UserError(
            f"{envs} does not say how it resets (metadata autoreset_mode); use vectorization sync or async."
        )
    return AutoresetMode(mode)


# ------------------------------------------------------------------------------------------------------- the batch


class GymnasiumEnvironments:
    """N environments of any kind, stepped by Gymnasium on the CPU; see `Environments` for the interface.

    `vectorization`: "sync" (one after the other), "async" (a process each) or "vector_entry_point" (the environment's
    own). `autoreset`: "next_step" (the default), "same_step" or "disabled", which an own vectorization sets itself.
    `wrappers` are callables or their names, `module:function`. The rest is as in `SingleEnvironment`.

    Allowed choices are read from `info["action_mask"]`, or from the "action_mask" of Dict observations, which then is
    no part of the vector. Who tells none at the reset is taken to have none; who says nothing in a step allows all.

    Gymnasium's environments cannot tell their state: `state_dict` is empty, and a resumed run resets them.

    Raises UserError as `SingleEnvironment` does.
    """

    def __init__(
        self,
        env: Env,
        num_envs: int = 1,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        vectorization: str = "sync",
        autoreset: str | None = None,
        env_kwargs: Mapping[str, Any] | None = None,
        wrappers: Sequence[Wrapper] = (),
        max_episode_steps: int | None = None,
        frame_stack: int = 1,
        atari: bool = False,
    ) -> None:
        loaded = tuple(load_object(wrapper) if isinstance(wrapper, str) else wrapper for wrapper in wrappers)
        single = SingleEnvironment(env, dict(env_kwargs or {}), loaded, max_episode_steps, frame_stack, atari)
        self._envs = _vectorized(single, num_envs, vectorization, autoreset)
        with _closing_on_error(self._envs):
            self._mode = _autoreset_mode(self._envs)
            self.action_space = action_space(self._envs.single_action_space)
            self.observation_space = observation_space(self._envs.single_observation_space)
        self._seed: int | None = seed
        self._dtype = self._envs.single_action_space.dtype
        self._ended = np.zeros(num_envs, dtype=bool)  # in the latest step; NEXT_STEP resets these in the next
        self.num_envs = num_envs
        self.device = torch.device(device)
        self.action_mask: Tensor | None = None
        self._num_choices = _num_choices(self.action_space)
        self._masks = ""  # where allowed choices are told: in "observations", in "info", or nowhere
        if self._num_choices and isinstance(self.observation_space, Dict):
            shown = dict(self.observation_space.spaces)
            self._masks = "" if shown.pop(MASK, None) is None else "observations"
            self.observation_space = Dict(shown)

    def reset(self, *, seed: int | None = None) -> Observations:
        """Starts all environments anew, the first time with the seed of the batch if none is given."""
        seed, self._seed = (self._seed if seed is None else seed), None
        observations, infos = self._envs.reset(seed=self._seeds(seed))
        self._ended = np.zeros(self.num_envs, dtype=bool)
        if self._num_choices and MASK in infos:
            self._masks = self._masks or "info"
        self.action_mask = self._mask(observations, infos)
        return self._encode(observations)

    def step(self, actions: Tensor) -> Step:
        """Takes one action in each environment."""
        own = to_native(self.action_space, actions.detach()).cpu().numpy()
        observations, rewards, terminated, truncated, infos = self._envs.step(own.astype(self._dtype))
        ended = np.logical_or(terminated, truncated)
        self.action_mask = self._mask(observations, infos)
        decided, final = np.ones(self.num_envs, dtype=bool), None
        if self._mode is AutoresetMode.NEXT_STEP:
            decided = ~self._ended
        elif self._mode is AutoresetMode.SAME_STEP:
            final = self._encode(self._before_reset(observations, infos, ended))
        else:
            final = self._encode(observations)
            if ended.any():
                observations, infos = self._envs.reset(options={"reset_mask": ended.copy()})
                self.action_mask = self._mask(observations, infos, self.action_mask)
        self._ended = ended
        return Step(
            observations=self._encode(observations),
            rewards=torch.tensor(rewards, dtype=torch.float32, device=self.device),
            terminated=torch.tensor(terminated, device=self.device),
            truncated=torch.tensor(truncated, device=self.device),
            decided=torch.tensor(decided, device=self.device),
            final_observations=final,
            action_mask=self.action_mask,
        )

    def close(self) -> None:
        """Closes the environments, and ends their processes."""
        self._envs.close()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: Gymnasium has no way to ask."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""

    def _seeds(self, seed: int | None) -> Any:
        """One seed an environment; Gymnasium's seed + i would make batches with neighbouring seeds share most."""
        if seed is None or not isinstance(self._envs, (SyncVectorEnv, AsyncVectorEnv)):
            return seed
        return np.random.SeedSequence(seed).generate_state(self.num_envs).tolist()

    def _encode(self, observations: Any) -> Observations:
        return encode(self.observation_space, observations, self.device)

    def _before_reset(self, observations: Any, infos: Mapping[str, Any], ended: np.ndarray) -> Any:
        """SAME_STEP: the batch with the true last observation where an episode ended."""
        if not ended.any():
            return observations
        rows = list(iterate(self._envs.observation_space, observations))
        for index in np.flatnonzero(ended):
            rows[index] = infos["final_obs"][index]
        space = self._envs.single_observation_space
        empty: Any = create_empty_array(space, n=self.num_envs)
        return concatenate(space, rows, empty)

    def _mask(self, observations: Any, infos: Mapping[str, Any], before: Tensor | None = None) -> Tensor | None:
        """(N, A) bool, the allowed choices; as `before`, or all, of an environment of which `infos` says nothing."""
        if self._masks == "observations":
            # Of stacked frames the latest.
            return self._checked(observations[MASK].reshape(self.num_envs, -1)[:, -self._num_choices :])
        if self._masks != "info":
            return None
        if before is None:
            before = torch.ones(self.num_envs, self._num_choices, dtype=torch.bool, device=self.device)
        if MASK not in infos:
            return before
        tells = infos.get(f"_{MASK}", np.ones(self.num_envs, dtype=bool))
        return torch.where(torch.tensor(tells, device=self.device)[:, None], self._checked(infos[MASK]), before)

    def _checked(self, masks: np.ndarray) -> Tensor:
        """(N, A) bool, of N arrays of numbers, of tuples of them (a MultiDiscrete's), or of None where nothing is told.

        Raises UserError where a mask has not as many numbers as there are choices.
        """
        if masks.dtype == object:
            masks = np.stack([np.zeros(self._num_choices) if mask is None else np.hstack(mask) for mask in masks])
        masks = masks.reshape(self.num_envs, -1)
        if masks.shape[1] != self._num_choices:
            raise UserError(
                f"an action_mask of {masks.shape[1]} numbers, for {self._num_choices} choices of an action."
            )
        return torch.tensor(masks.astype(bool), device=self.device)
