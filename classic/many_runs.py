"""Runs of one command, over environments, seeds and whatever it compares: where they lie, and how all are trained."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from classic.config import ManyRuns, TrainConfig
from classic.envs import make_environments
from classic.ppo import device_of
from ppo_rlhf.run import read_config, refuse_changes, told_if_unwritable, write_config
from ppo_rlhf.run.folder import HOW_OFTEN
from ppo_rlhf.run.grid import Job, available_cores, run_grid

LIBRARIES = ("torch", "gymnasium", "numpy")


def folder_of(folder: Path, env_id: str, name: str, seed: int) -> Path:
    """Where a run lies; name: of the algorithm or variant."""
    return folder / re.sub(r"[^\w.-]", "_", env_id) / name / f"seed-{seed}"


def refuse_runs(planned: Mapping[Path, TrainConfig]) -> None:
    """Raises UserError for runs by folder of which one trained otherwise, has no device, or no environment."""
    for path, run in planned.items():
        refuse_changes(path, read_config(path) or {}, asdict(run), may_change=HOW_OFTEN)
        device_of(run, run.env_id)
    for run in {run.env_id: run for run in planned.values()}.values():
        make_environments(run.env_id, **run.environment.arguments()).close()


def train_all(
    folder: Path, config: ManyRuns, planned: Mapping[Path, TrainConfig], *, outcome: Callable[[Path], float]
) -> None:
    """Trains runs by their folders within `folder`, each in a process of its own, `config.workers` at a time.

    A run that is finished is not repeated, one that was interrupted goes on. outcome: of a finished run, told with it.

    Raises UserError where the folder cannot be written, and at the end where a run failed.
    """
    with told_if_unwritable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, config)
        for path, run in planned.items():
            if read_config(path) is None:
                path.mkdir(parents=True, exist_ok=True)
                write_config(path, run)  # which `train --resume` starts from
    command = (sys.executable, "-m", "classic", "train")
    jobs = [Job(str(path.relative_to(folder)), command, path) for path in planned]
    workers = config.workers or available_cores()
    run_grid(jobs, workers=workers, told=lambda finished: f"{outcome(finished):,.1f}")


def versions(runs: Iterable[Path]) -> str:
    """Of the libraries on which returns hang, as the runs noted them."""
    noted = [json.loads((run / "environment.json").read_text(encoding="utf-8"))["versions"] for run in runs]
    return ", ".join(f"{name} {' and '.join(sorted({each[name] for each in noted}))}" for name in LIBRARIES)
