"""What a run left in its folder, as its readers see it: settings, metrics, samples, outcome. Free of torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
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
    summary: dict[str, Any]  # of summary.json, empty while the run goes on
    environment: dict[str, Any]  # of environment.json

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.summary)

    @property
    def task(self) -> str:
        """What its curves can be compared within: its stage; of a control run the environment."""
        return str(self.config.get("env_id", self.stage)) if self.stage == "classic" else self.stage

    @property
    def pictures(self) -> list[dict[str, Any]]:
        """Of policy_pictures.jsonl, which a control run has where its state can be drawn."""
        return read_lines(self.folder / "policy_pictures.jsonl")

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
    """The run in a folder, or those of a pipeline's stages, or of a control comparison, that have begun.

    Raises UserError for a folder that holds no run.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}.")
    stages = [folder / name for name in STAGES if (folder / name / "config.yaml").exists()]
    compared = sorted(path.parent for path in folder.glob("*/*/seed-*/config.yaml"))
    places = stages or compared or [folder]
    if not (places[0] / "config.yaml").exists():
        raise UserError(f"{folder} holds no run: it has no config.yaml.")
    return [record_of(place) for place in places]


def record_of(folder: Path) -> Record:
    """What the run in a folder has written so far. Raises UserError for files that no run wrote."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        environment, summary = (_json(folder / name) for name in ("environment.json", "summary.json"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder} holds no run that can be read: {' '.join(str(error).split())}") from error
    return Record(
        folder=folder,
        stage=environment.get("stage", ""),
        config=config if isinstance(config, dict) else {},
        rows=[row for row in read_lines(folder / "metrics.jsonl") if "step" in row],
        samples=read_lines(folder / "samples.jsonl"),
        summary=summary,
        environment=environment,
    )


def _json(path: Path) -> dict[str, Any]:
    """The object in a file, empty where there is no file."""
    value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no object")
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of lines; the last one may still be being written."""
    rows = []
    # Not splitlines, which also breaks at U+2028 and its like, which stand in JSON as they are.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
