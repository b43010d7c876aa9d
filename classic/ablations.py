"""What each implementation detail is worth: the preset with one detail changed at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from classic.config import ExperimentConfig, TrainConfig
from classic.experiment import Experiment, Results, carry_out, command_line, returns_table, runs_of
from classic.many_runs import versions
from classic.plot import plot_estimates, read_curve
from classic.presets import preset_for
from classic.variants import DETAILS, PRESET
from ppo_rlhf.run import strict_json, write_text
from ppo_rlhf.statistics import Estimate, difference, estimate, interquartile_mean

EVALUATIONS = 10  # of a run, evenly spread, whose mean is its outcome: how fast it learns counts as well as how far

PROTOCOL = """\
Each row is the environment's preset with one thing changed. A run's return is the mean of its evaluations (ten where it
is long enough), which are deterministic and evenly spread over it, so that speed counts as well as the end. A score is
that return on a scale on which the untrained policy, its actions sampled, is 0 and the best of all these runs on the
environment is 1. The score of a row is the interquartile mean over environments and seeds (Agarwal et al., 2021);
`worth` is the preset's less the row's, above 0 where the preset does better; the intervals are 95 % bootstrap intervals
over seeds within each environment, at that scale."""


def mean_evaluation(run: Path) -> float:
    """The mean return of a run's evaluations."""
    return float(read_curve(run, "eval/return", "steps").y.mean())


def preset(env_id: str, num_steps: int | None) -> TrainConfig:
    """The environment's preset, evaluated ten times."""
    found = replace(preset_for(env_id), env_id=env_id)
    steps = num_steps or found.num_steps
    return replace(found, num_steps=steps, eval_every=max(1, steps // EVALUATIONS))


ABLATIONS = Experiment("ablations", DETAILS, preset, mean_evaluation)


def ablations(config: ExperimentConfig) -> dict[str, Any]:
    """Runs the comparison and writes ablations.md, .json, .png and .svg; → what the JSON holds.

    Raises UserError as `carry_out` does.
    """
    folder, results = carry_out(ABLATIONS, config)
    scores = {name: results.scores(name) for name in config.variants}
    estimates = {name: estimate(found, interquartile_mean) for name, found in scores.items()}
    worth = {
        name: difference(scores[PRESET], found, interquartile_mean)
        for name, found in scores.items()
        if name != PRESET and PRESET in scores
    }
    write_text(folder / "ablations.md", markdown(config, runs_of(ABLATIONS, config, folder), results, estimates, worth))
    rows = [
        {
            "variant": name,
            "text": DETAILS[name].text,
            "changes": dict(DETAILS[name].changes),
            **asdict(found),
            "worth": asdict(worth[name]) if name in worth else None,
        }
        for name, found in estimates.items()
    ]
    summary = {"output_dir": str(folder), "rows": rows, **results.as_dict()}
    write_text(folder / "ablations.json", strict_json(summary, indent=1))
    labels = {DETAILS[name].text: found for name, found in estimates.items()}
    plot_estimates(labels, folder / "ablations.png", axis="normalised score, interquartile mean")
    return summary


def markdown(
    config: ExperimentConfig,
    runs: Iterable[Path],
    results: Results,
    estimates: Mapping[str, Estimate],
    worth: Mapping[str, Estimate],
) -> str:
    """ablations.md."""
    lines = [
        "# What the details are worth",
        "",
        f"{', '.join(config.env_ids)}; seeds {', '.join(map(str, config.seeds))}.",
        "",
        "| detail | score | 95 % interval | worth | 95 % interval |",
        "|---|---:|---:|---:|---:|",
        *(_row(name, found, worth.get(name)) for name, found in estimates.items()),
        "",
        "![scores](ablations.png)",
        "",
        *returns_table(ABLATIONS, config, results),
        "",
        *PROTOCOL.splitlines(),
        "",
        f"    {command_line(ABLATIONS, config)}",
        "",
        versions(runs),
        "",
    ]
    return "\n".join(lines)


def _row(name: str, found: Estimate, worth: Estimate | None) -> str:
    told = "– | –" if worth is None else f"{worth.value:+.2f} | {worth.interval()}"
    return f"| {DETAILS[name].text} | {found.value:.2f} | {found.interval()} | {told} |"
