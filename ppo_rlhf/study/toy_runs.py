"""Runs on the embedded task with some of the demo's settings changed, and the folder of a study."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ppo_rlhf import toy
from ppo_rlhf.document import DOCUMENT, Document
from ppo_rlhf.errors import UserError
from ppo_rlhf.pipeline import STAGES
from ppo_rlhf.run import read_config, refuse_changes, strict_json, write_config, write_text
from ppo_rlhf.run.grid import Job

PIPELINE = Path(toy.__file__).with_name("pipeline.yaml")
Changes = Mapping[str, Any]  # dotted name of a setting → its value
Plan = TypeVar("Plan", bound=Any)  # a study's dataclass

COMMON: Changes = {
    "log_with": [],
    "save_every": 0,  # a run that was cut short takes a minute, and starts again
    "matmul_precision": "highest",  # auto chooses by measurement, and one run might round otherwise than another
}


def stage_job(stage: str, folder: Path, changes: Changes) -> Job:
    """A stage of the demo, with some settings changed. The demo's own are written beside the folder."""
    settings = yaml.safe_load(PIPELINE.read_text(encoding="utf-8"))[stage]
    config = folder.parent / f"{stage}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    write_text(config, yaml.safe_dump(settings, sort_keys=False))
    return Job(folder.name, _command(stage, {"config": str(config), **COMMON, **changes}), folder)


def demo_job(folder: Path, changes: Changes) -> Job:
    """The whole demo, with some settings changed."""
    common = {f"{stage}.{name}": value for stage in STAGES for name, value in COMMON.items()}
    return Job(folder.name, _command("demo", {**common, **changes}), folder)


def begun_plan(folder: Path, plan: Plan) -> Plan:
    """The plan with which the study in the folder was begun; the given one where none was.

    Raises UserError for a folder of something else.
    """
    begun = read_config(folder) or {}
    unknown = begun.keys() - asdict(plan).keys()
    if unknown:
        raise UserError(f"{folder} holds another run than this study's: its config.yaml has {min(unknown)}.")
    lists = {name: tuple(value) for name, value in begun.items() if isinstance(value, list)}
    return replace(plan, **{**begun, **lists})


def begin(folder: Path, plan: Any, *, may_change: Sequence[str] = ()) -> None:
    """Makes the study's folder, with its plan as config.yaml; or takes it up, if it was begun with the same one.

    may_change: fields in which the plan may differ. Raises UserError where another one differs.
    """
    begun = read_config(folder)
    if begun is not None:
        refuse_changes(folder, begun, asdict(plan), may_change=set(may_change))
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, plan)


def write_findings(folder: Path, results: Any, document: Document) -> None:
    """results.json, the numbers; README.md, the tables; and the document that the report draws."""
    write_text(folder / "results.json", strict_json(asdict(results), indent=1))
    write_text(folder / "README.md", document.markdown)
    write_text(folder / DOCUMENT, strict_json(asdict(document)))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A JSON object a line."""
    write_text(path, "".join(strict_json(row) + "\n" for row in rows))


def _command(name: str, options: Changes) -> tuple[str, ...]:
    words = (word for option, value in options.items() for word in (f"--{option}", _word(value)))
    return (sys.executable, "-m", "ppo_rlhf", name, *words)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
