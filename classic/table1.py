"""Table 1 of Schulman et al. (2017) again: surrogate objectives, and TRPO, on the same tasks with all else equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from classic.config import ExperimentConfig, TrainConfig
from classic.experiment import Experiment, Results, carry_out, command_line, returns_table, runs_of
from classic.many_runs import versions
from classic.plot import plot, plot_estimates, read_curve
from classic.presets import mujoco
from classic.variants import SURROGATES
from ppo_rlhf.run import strict_json, write_text
from ppo_rlhf.statistics import Estimate, estimate

LAST_EPISODES = 100  # whose mean return is a run's outcome (section 6.1)

PROTOCOL = """\
Section 6.1: one environment, rollouts of 2,048 steps, 10 epochs of minibatches of 64, Adam at 3e-4, γ = 0.99, λ = 0.95,
policy and value function apart, two layers of 64 tanh units each, a Gaussian with deviations of its own, no entropy
bonus. A run's return is the mean of its last 100 training episodes (those of the rollout in which they begin count by
its mean); a score is that return on a scale on which the untrained policy, its actions sampled, is 0 and the best of
all these runs on the environment is 1. The score of a row is the mean over environments and seeds; the interval is a
95 % bootstrap interval over seeds within each environment, at that scale.

What the paper does not tell is as in its authors' code (baselines, ppo1): observations normalised by running moments,
advantages whitened in each rollout, Adam's ε 1e-5, rewards and gradients as they are; and the learning rate falls to 0
along a line, as in that code, where table 3 has one number and ε falls as well. What differs: MuJoCo's v5 tasks in
place of v1; a time limit is bootstrapped and not taken for an end; an environment's reset takes a step of the rollout,
which is masked; weights begin orthogonal; normalised observations are clipped at ±10, there at ±5; β stays within 1e-4
and 1e4. TRPO is not in the paper's table; its value function takes as many steps as the others', and its runs count
among those of which the best is 1."""


def last_episodes(run: Path, number: int = LAST_EPISODES) -> float:
    """The mean return of a run's latest `number` training episodes, of all where there are fewer.

    Rollouts log means: those of the one in which the latest begin count by its mean.
    """
    curve = read_curve(run, "episode/return", "episodes")
    means, counts = curve.y, curve.x
    later = counts[::-1].cumsum()[::-1] - counts  # episodes after each rollout
    return float(np.average(means, weights=np.clip(number - later, 0, counts)))


def protocol(env_id: str, num_steps: int | None) -> TrainConfig:
    """The paper's settings (table 3), and where it says nothing those of its authors' code (baselines, ppo1)."""
    preset = mujoco(env_id)
    return replace(
        preset,
        num_steps=num_steps or preset.num_steps,
        normalize_rewards=False,
        ppo=replace(preset.ppo, max_grad_norm=float("inf")),
    )


TABLE1 = Experiment("table1", SURROGATES, protocol, last_episodes)


def table1(config: ExperimentConfig) -> dict[str, Any]:
    """Runs the comparison and writes table1.md, .json, .png and .svg, and the learning curves; → what the JSON holds.

    Raises UserError as `carry_out` does.
    """
    folder, results = carry_out(TABLE1, config)
    estimates = {name: estimate(results.scores(name)) for name in config.variants}
    runs = runs_of(TABLE1, config, folder)
    write_text(folder / "table1.md", markdown(config, runs, results, estimates))
    rows = [
        {"variant": name, "text": SURROGATES[name].text, **asdict(found), "paper": SURROGATES[name].paper}
        for name, found in estimates.items()
    ]
    summary = {"output_dir": str(folder), "rows": rows, **results.as_dict()}
    write_text(folder / "table1.json", strict_json(summary, indent=1))
    labels = {SURROGATES[name].text: found for name, found in estimates.items()}
    papers = {SURROGATES[name].text: SURROGATES[name].paper for name in config.variants}
    plot_estimates(labels, folder / "table1.png", axis="normalised score", marks=papers, marked="the paper's")
    plot(list(runs), folder / "learning_curves.png", smooth=10)
    return summary


def markdown(
    config: ExperimentConfig, runs: Mapping[Path, TrainConfig], results: Results, estimates: Mapping[str, Estimate]
) -> str:
    """table1.md."""
    steps = {run.num_updates * run.num_envs * run.horizon for run in runs.values()}
    lines = [
        "# Surrogate objectives (Schulman et al., 2017, table 1)",
        "",
        f"{len(config.env_ids)} environments, {len(config.seeds)} seeds, {max(steps):,} steps a run "
        "(the paper: 7 environments, 3 seeds, 1,000,000 steps).",
        "",
        "| surrogate objective | score | 95 % interval | the paper |",
        "|---|---:|---:|---:|",
        *(_row(name, found) for name, found in estimates.items()),
        "",
        "![scores](table1.png)",
        "",
        *returns_table(TABLE1, config, results),
        "",
        "![learning curves](learning_curves.png)",
        "",
        *PROTOCOL.splitlines(),
        "",
        f"    {command_line(TABLE1, config)}",
        "",
        versions(runs),
        "",
    ]
    return "\n".join(lines)


def _row(name: str, found: Estimate) -> str:
    paper = SURROGATES[name].paper
    told = "–" if paper is None else f"{paper:.2f}"
    return f"| {SURROGATES[name].text} | {found.value:.2f} | {found.interval()} | {told} |"
