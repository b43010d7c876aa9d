"""What a run left in its folder, as the checks read it: settings, series of metrics, samples."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance
from typing import Any

import yaml

from ppo_rlhf.errors import UserError

STAGES = ("sft", "reward", "ppo")


@dataclass(frozen=True)
class Record:
    """One run folder, finished or in progress."""

    folder: Path
    stage: str  # sft, reward, ppo or classic
    config: dict[str, Any]
    rows: list[dict[str, Any]]  # of metrics.jsonl
    samples: list[dict[str, Any]]  # of samples.jsonl
    finished: bool

    @property
    def step(self) -> int:
        """The latest step that was logged."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    def series(self, name: str) -> list[float]:
        """A metric's values in the order of the steps, without those that were not finite."""
        return [float(row[name]) for row in self.rows if row.get(name) is not None]

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting by its dotted name."""
        value: Any = self.config
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value


def records_of(folder: Path) -> list[Record]:
    """The run in a folder, or those of a pipeline's stages that have begun.

    Raises UserError for a folder that holds no run.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}.")
    places = [folder / name for name in STAGES if (folder / name / "config.yaml").exists()] or [folder]
    if not (places[0] / "config.yaml").exists():
        raise UserError(f"{folder} holds no run: it has no config.yaml.")
    return [record_of(place) for place in places]


def record_of(folder: Path) -> Record:
    """What the run in a folder has written so far. Raises UserError for files that no run wrote."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        environment = folder / "environment.json"
        stage = json.loads(environment.read_text(encoding="utf-8"))["stage"] if environment.exists() else ""
    except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
        raise UserError(f"{folder} holds no run that can be read: {' '.join(str(error).split())}") from error
    return Record(
        folder=folder,
        stage=stage,
        config=config if isinstance(config, dict) else {},
        rows=[row for row in _lines(folder / "metrics.jsonl") if "step" in row],
        samples=_lines(folder / "samples.jsonl"),
        finished=(folder / "summary.json").exists(),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of lines; the last one may still be being written."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


@dataclass(frozen=True)
class Change:
    """How a noisy series moved: the means of its first, best and last quarter."""

    first: float
    highest: float
    last: float
    margin: float  # three standard errors of a difference between two quarters

    @property
    def rose(self) -> bool:
        """Whether the last quarter lies above the first beyond the noise."""
        return self.last - self.first > self.margin

    @property
    def fell(self) -> bool:
        """Whether the last quarter lies below the best one beyond the noise."""
        return self.highest - self.last > self.margin


FEWEST = 12  # values of which a quarter says something: three


def change_of(values: list[float]) -> Change | None:
    """How the series moved; None for one too short to say."""
    if len(values) < FEWEST:
        return None
    bounds = [round(len(values) * part / 4) for part in range(5)]
    quarters = [values[start:end] for start, end in itertools.pairwise(bounds)]
    means = [fmean(quarter) for quarter in quarters]
    errors = [variance(quarter) / len(quarter) for quarter in quarters]
    return Change(means[0], max(means), means[-1], 3 * math.sqrt(errors[0] + errors[-1]))


def latest(values: list[float]) -> list[float]:
    """The last quarter of a series, at least three of its values."""
    return values[-max(3, len(values) // 4) :]
