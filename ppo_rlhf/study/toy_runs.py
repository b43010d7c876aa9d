"""Runs on the embedded task with some of the demo's settings changed: what the studies below are made of."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ppo_rlhf import toy
from ppo_rlhf.run import write_text
from ppo_rlhf.run.grid import Job

PIPELINE = Path(toy.__file__).with_name("pipeline.yaml")
Changes = Mapping[str, Any]  # dotted name of a setting → its value

# What a study reads is in metrics.jsonl; a run that was cut short takes a minute and starts again.
UNWATCHED: Changes = {"log_with": [], "save_every": 0}


def stage_job(stage: str, folder: Path, changes: Changes) -> Job:
    """A stage of the demo, with some settings changed. The demo's own are written beside the folder."""
    settings = yaml.safe_load(PIPELINE.read_text(encoding="utf-8"))[stage]
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = folder.parent / f"{stage}.yaml"
    write_text(config, yaml.safe_dump(settings, sort_keys=False))
    options = (word for name, value in (UNWATCHED | changes).items() for word in (f"--{name}", _word(value)))
    return Job(folder.name, (sys.executable, "-m", "ppo_rlhf", stage, "--config", str(config), *options), folder)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
