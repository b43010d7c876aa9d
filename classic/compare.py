"""Algorithms side by side: each over the same seeds, environments and settings, in a run folder each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from classic.config import CompareConfig, TrainConfig
from classic.many_runs import folder_of, refuse_runs, train_all, versions
from classic.plot import plot
from classic.presets import preset_for
from ppo_rlhf.run import new_folder, write_text
from ppo_rlhf.statistics import mean_and_interval


@dataclass(frozen=True)
class Result:
    """The final evaluations of one algorithm on one environment."""

    env_id: str
    algorithm: str
    returns: tuple[float, ...]  # one a seed, each a mean over its episodes

    def numbers(self) -> dict[str, Any]:
        """Mean, its 95 % t interval (null with one seed), median, least and greatest."""
        returns = np.array(self.returns)
        mean, half = (float(number) for number in mean_and_interval(returns))
        return {
            **asdict(self),
            "mean": mean,
            "interval": [mean - half, mean + half] if len(returns) > 1 else None,
            "median": float(np.median(returns)),
            "min": float(returns.min()),
            "max": float(returns.max()),
        }


def compare(config: CompareConfig) -> dict[str, Any]:
    """Runs every algorithm with every seed on every environment, and writes comparison.md, .png, .svg and .csv.

    A run that is finished is not repeated, one that was interrupted goes on. → `output_dir`, and `results` as in
    `Result.numbers`.

    Raises UserError, before anything is written, for an environment that cannot be made, a folder in use, or runs in it
    that trained otherwise; and at the end where a run failed.
    """
    folder = new_folder(config.output_dir, "comparison", resume=config.resume)
    planned = runs_of(config, folder)
    refuse_runs(planned)
    train_all(folder, config, planned, outcome=final_return)
    results = [
        Result(
            env_id,
            algorithm,
            tuple(final_return(folder_of(folder, env_id, algorithm, seed)) for seed in config.seeds),
        )
        for env_id in config.env_ids
        for algorithm in config.algorithms
    ]
    plot(list(planned), folder / "comparison.png", smooth=5)
    write_text(folder / "comparison.md", table(config, planned, results))
    return {"output_dir": str(folder), "results": [result.numbers() for result in results]}


def runs_of(config: CompareConfig, folder: Path) -> dict[Path, TrainConfig]:
    """The configurations of all runs by their folders: the environment's preset, or the algorithm's own for it, with
    every seed.

    Raises UserError for settings that do not go together.
    """
    common: dict[str, Any] = {"eval_episodes": config.eval_episodes, "device": config.device}
    if config.num_steps is not None:
        common["num_steps"] = config.num_steps
    return {
        folder_of(folder, env_id, algorithm, seed): replace(
            preset_for(env_id, algorithm), env_id=env_id, algorithm=algorithm, seed=seed, **common
        )
        for env_id in config.env_ids
        for algorithm in config.algorithms
        for seed in config.seeds
    }


def final_return(run: Path) -> float:
    """The mean return of a finished run's final evaluation."""
    return float(json.loads((run / "summary.json").read_text(encoding="utf-8"))["return_after"])


def table(config: CompareConfig, runs: Mapping[Path, TrainConfig], results: Sequence[Result]) -> str:
    """comparison.md."""
    lines = ["# Comparison", ""]
    steps = {(run.env_id, str(run.algorithm)): run.num_updates * run.num_envs * run.horizon for run in runs.values()}
    for env_id in config.env_ids:
        lines += [
            f"## {env_id}",
            "",
            "| algorithm | steps | seeds | mean | 95 % interval | median | min to max |",
            "|---|---:|---:|---:|---:|---:|---:|",
            *(_row(result, steps[env_id, result.algorithm]) for result in results if result.env_id == env_id),
            "",
        ]
    seeds = " ".join(str(seed) for seed in config.seeds)
    steps_given = "" if config.num_steps is None else f" --num-steps {config.num_steps}"
    lines += [
        f"Returns of the final policies, deterministic, over {config.eval_episodes} episodes on environments of their "
        "own; over seeds: mean with its t interval, median and range.",
        "",
        f"    python -m classic compare {' '.join(config.env_ids)} --algorithms {' '.join(config.algorithms)} "
        f"--seeds {seeds}{steps_given} --eval-episodes {config.eval_episodes}",
        "",
        versions(runs),
        "",
        "![learning curves](comparison.png)",
        "",
    ]
    return "\n".join(lines)


def _row(result: Result, steps: int) -> str:
    numbers = result.numbers()
    interval = "–" if numbers["interval"] is None else "{:.1f} to {:.1f}".format(*numbers["interval"])
    return (
        f"| {result.algorithm} | {steps:,} | {len(result.returns)} | {numbers['mean']:.1f} | {interval} "
        f"| {numbers['median']:.1f} | {numbers['min']:.1f} to {numbers['max']:.1f} |"
    )
