"""Batches of environments on one device, all in Gymnasium's NEXT_STEP layout or one that `Step` describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from classic.envs.cartpole import CartPole
from classic.envs.pendulum import Pendulum
from classic.envs.types import Environments, Step
from ppo_rlhf.errors import UserError, did_you_mean

__all__ = ["CartPole", "Environments", "Pendulum", "Step", "make_environments", "solved_at"]

IN_TORCH: dict[Any, tuple[Callable[..., Environments], str]] = {  # and the argument that each accepts
    "CartPole-v1": (CartPole, "sutton_barto_reward"),
    "Pendulum-v1": (Pendulum, "g"),
}
VECTORIZATIONS = ("auto", "torch", "sync", "async", "vector_entry_point")
AUTORESETS = ("next_step", "same_step", "disabled")


def make_environments(
    env: str | Callable[..., Any],
    *,
    num_envs: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    vectorization: str = "auto",
    autoreset: str | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    wrappers: Sequence[str | Callable[[Any], Any]] = (),
    max_episode_steps: int | None = None,
    frame_stack: int = 1,
    atari: bool = False,
) -> Environments:
    """`num_envs` environments of one kind.

    env: an id of Gymnasium, `module:id` to import a module first, or a callable that makes one environment.
    vectorization: "auto" takes our own environments in torch where they are the same thing (CartPole-v1, Pendulum-v1),
        else "sync"; "torch", "sync", "async" and "vector_entry_point" ask for one.
    autoreset: "next_step", "same_step" or "disabled"; None leaves it to the vectorization, mostly "next_step".
    env_kwargs: arguments of the environment.
    wrappers: callables, or their names `module:function`, innermost first.
    max_episode_steps: None for the environment's own limit, −1 for none.
    frame_stack: how many of the latest observations are shown as one.
    atari: Gymnasium's AtariPreprocessing (84×84 grey, every fourth frame, up to 30 idle ones at the start).

    Raises UserError, in one line, for whatever of this cannot be.
    """
    _check("vectorization", vectorization, VECTORIZATIONS)
    if autoreset is not None:
        _check("autoreset", autoreset, AUTORESETS)
    for name, value in {"num_envs": num_envs, "frame_stack": frame_stack}.items():
        if value < 1:
            raise UserError(f"{name}={value}: use 1 or more.")
    if max_episode_steps is not None and max_episode_steps != -1 and max_episode_steps < 1:
        raise UserError(f"max_episode_steps={max_episode_steps}: use 1 or more, or -1 for no limit.")
    env_kwargs = dict(env_kwargs or {})
    wrapped = bool(wrappers) or frame_stack > 1 or atari
    obstacle = _obstacle_to_torch(env, env_kwargs, wrapped, autoreset)
    if vectorization == "torch" and obstacle:
        raise UserError(f"vectorization=torch: {obstacle}; use vectorization=auto.")
    if vectorization == "torch" or (vectorization == "auto" and not obstacle):
        limit = (
            {}
            if max_episode_steps is None
            else {"max_episode_steps": max_episode_steps if max_episode_steps > 0 else None}
        )
        return IN_TORCH[env][0](num_envs, seed=seed, device=device, **limit, **env_kwargs)

    from classic.envs.gymnasium import GymnasiumEnvironments

    return GymnasiumEnvironments(
        env,
        num_envs,
        seed=seed,
        device=device,
        vectorization="sync" if vectorization == "auto" else vectorization,
        autoreset=autoreset,
        env_kwargs=env_kwargs,
        wrappers=wrappers,
        max_episode_steps=max_episode_steps,
        frame_stack=frame_stack,
        atari=atari,
    )


def solved_at(env_id: str) -> float | None:
    """The mean return from which Gymnasium counts an environment as solved; None where it does not say."""
    from classic.envs.gymnasium import reward_threshold

    return reward_threshold(env_id)


def _check(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"unknown {name}={value}; use one of {', '.join(known)}.{did_you_mean(value, known)}")


def _obstacle_to_torch(env: Any, env_kwargs: Mapping[str, Any], wrapped: bool, autoreset: str | None) -> str | None:
    """Why our own environments cannot stand in for this one; None where they can."""
    if env not in IN_TORCH:
        return f"{env} is not one of {', '.join(IN_TORCH)}"
    unknown = sorted(set(env_kwargs) - {IN_TORCH[env][1]})
    if unknown:
        return f"{env} in torch has no argument {unknown[0]}"
    if wrapped:
        return f"{env} in torch takes no wrappers"
    if autoreset not in (None, "next_step"):
        return f"{env} in torch has no autoreset={autoreset}"
    return None
