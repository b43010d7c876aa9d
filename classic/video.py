"""Episodes to look at: recorded as videos, or shown in a window as they are played."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium

from classic.config import TrainConfig
from classic.envs import Environments, make_environments
from classic.evaluate import Outcome, play
from classic.policy import Policy, require_spaces
from ppo_rlhf.errors import UserError
from ppo_rlhf.seeding import keyed_seed

REMEDY = 'pip install "ppo-rlhf[video]"'


def record(
    policy: Policy,
    config: TrainConfig,
    folder: str | Path,
    *,
    episodes: int = 1,
    seed: int = 0,
    deterministic: bool = True,
) -> tuple[Outcome, list[Path]]:
    """Plays fresh episodes of the run's environment and writes a video of each; → how they went, and the files.

    Raises UserError where moviepy or the environment's renderer is missing, or the environment shows no images.
    """
    if importlib.util.find_spec("moviepy") is None:
        raise UserError(f"videos need moviepy: {REMEDY}")
    folder, prefix = Path(folder), re.sub(r"[^\w.-]", "_", config.env_id)
    recorder = partial(
        gymnasium.wrappers.RecordVideo,
        video_folder=str(folder),
        episode_trigger=lambda _: True,
        name_prefix=prefix,
        disable_logger=True,
    )
    existed = folder.exists()
    fresh = keyed_seed(seed, "fresh episodes")
    try:
        with warnings.catch_warnings(action="ignore"), _shown(policy, config, "rgb_array", recorder) as envs:
            outcome = play(envs, policy, episodes=episodes, seed=fresh, deterministic=deterministic)
    finally:
        if not existed and folder.exists() and not any(folder.iterdir()):
            folder.rmdir()
    return outcome, [folder / f"{prefix}-episode-{index}.mp4" for index in range(episodes)]


def watch(
    policy: Policy, config: TrainConfig, *, episodes: int = 1, seed: int = 0, deterministic: bool = True
) -> Outcome:
    """Plays fresh episodes in a window. Raises UserError where they cannot be shown."""
    fresh = keyed_seed(seed, "fresh episodes")
    with _shown(policy, config, "human") as envs:
        return play(envs, policy, episodes=episodes, seed=fresh, deterministic=deterministic)


@contextmanager
def _shown(policy: Policy, config: TrainConfig, render_mode: str, *recorders: Any) -> Iterator[Environments]:
    """One environment of the run, rendered; what its renderer lacks becomes a UserError."""
    given = config.environment.arguments()
    given |= {
        "vectorization": "sync",
        "env_kwargs": {**given["env_kwargs"], "render_mode": render_mode},
        "wrappers": (*given["wrappers"], *recorders),
    }
    try:
        envs = make_environments(config.env_id, num_envs=1, seed=0, **given)
        try:
            require_spaces(policy, envs, config.env_id)
            yield envs
        finally:
            envs.close()
    except gymnasium.error.DependencyNotInstalled as error:
        raise UserError(f"{config.env_id} cannot be shown: {error}; {REMEDY}") from error
