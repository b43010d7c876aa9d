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
from ppo_rlhf.run import read_config, refuse_changes, strict_json, told_if_unwritable, write_config, write_text
from ppo_rlhf.run.folder import HOW_OFTEN
from ppo_rlhf.run.grid import Job
from ppo_rlhf.settings import flat

PIPELINE = Path(toy.__file__).with_name("pipeline.yaml")
Changes = Mapping[str, Any]  # dotted name of a setting → its value
Plan = TypeVar("Plan", bound=Any)  # a study's dataclass

COMMON: Changes = {
    "log_with": [],
    "save_every": 0,  # a run that was cut short takes a minute, and starts again
    "matmul_precision": "highest",  # auto chooses by measurement, and one run might round otherwise than another
}


def demo_settings() -> dict[str, Any]:
    """The demo's settings, by stage."""
    settings: dict[str, Any] = yaml.safe_load(PIPELINE.read_text(encoding="utf-8"))
    return settings


def stage_job(stage: str, folder: Path, changes: Changes) -> Job:
    """A stage of the demo, with some settings changed.

    Raises UserError for a folder in which it was begun with others: the demo's may have changed since.
    """
    return _job(stage, folder, flat(demo_settings()[stage]) | dict(COMMON) | dict(changes))


def demo_job(folder: Path, changes: Changes) -> Job:
    """The whole demo, with some settings changed. Raises UserError as `stage_job` does."""
    common = {f"{stage}.{name}": value for stage in STAGES for name, value in COMMON.items()}
    return _job("demo", folder, flat(demo_settings()) | common | dict(changes))


def begun_plan(folder: Path, plan: Plan) -> Plan:
    """The plan with which the study in the folder was begun; the given one where none was.

    Raises UserError for a folder of something else.
    """
    begun = _begun(folder, plan)
    lists = {name: tuple(value) for name, value in begun.items() if isinstance(value, list)}
    return replace(plan, **{**begun, **lists})


def begin(folder: Path, plan: Any, *, may_change: Sequence[str] = ()) -> None:
    """Makes the study's folder, with its plan as config.yaml; or takes it up, if it was begun with the same one.

    may_change: fields in which the plan may differ. Raises UserError where another one differs, for a folder of
    something else, and for one that cannot be written.
    """
    refuse_changes(folder, _begun(folder, plan), asdict(plan), may_change=set(may_change))
    with told_if_unwritable(folder):
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


def _begun(folder: Path, plan: Any) -> dict[str, Any]:
    """The plan in the folder, empty where there is none."""
    begun = read_config(folder) or {}
    others = begun.keys() ^ asdict(plan).keys()
    if begun and others:
        raise UserError(f"{folder} holds another run than this study's, by {min(others)} in its config.yaml.")
    return begun


def _job(command: str, folder: Path, settings: Changes) -> Job:
    begun = read_config(folder)
    if begun is not None:
        refuse_changes(folder, flat(begun), settings, may_change=HOW_OFTEN)
    words = (word for option, value in settings.items() for word in (f"--{option}", _word(value)))
    return Job("/".join(folder.parts[-2:]), (sys.executable, "-m", "ppo_rlhf", command, *words), folder)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
