"""report.html: everything on one page, in one file, for a browser without a network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from ppo_rlhf.errors import UserError
from ppo_rlhf.records import Record, records_of
from ppo_rlhf.report import charts, control, curves, groups, outcome
from ppo_rlhf.report.guide import GUIDE
from ppo_rlhf.report.html import rendered, write_page
from ppo_rlhf.report.inspector import inspected

STAGE_NAMES = {"sft": "Supervised fine-tuning", "reward": "Reward model", "ppo": "PPO"}


def write_report(
    folders: Sequence[Path], output: Path | None = None, *, findings: Sequence[Mapping[str, Any]] | None = None
) -> Path:
    """Writes the report of one or more runs or pipelines; → its path, by default report.html in the first folder.

    findings: the doctor's, as its `--json` gives them; None where it was not asked. Raises UserError for a folder that
    holds no run, and for a file that cannot be written.
    """
    records = [record for folder in folders for record in records_of(folder)]
    if not any(record.rows for record in records):
        raise UserError(f"{folders[0]} holds no run: it has no metrics.jsonl.")
    return write_page(_page(records, findings), output or folders[0] / "report.html")


def _page(records: Sequence[Record], findings: Sequence[Mapping[str, Any]] | None) -> str:
    found = groups.groups_of(records)
    names = list(dict.fromkeys(group.name for group in found))
    stages = [(stage, list(members)) for stage, members in groupby(found, key=lambda group: group.stage)]
    latest_first = [group for _, members in reversed(stages) for group in members]
    pictures = [curves.frontier_charts([group for group in found if group.stage == "ppo"])]
    pictures += [(control.charts_of if members[0].control else curves.curve_charts)(members) for _, members in stages]
    names += control.level_names([chart for each in pictures for chart in each], found)
    drawn = charts.draw([chart for each in pictures for chart in each], names)
    places = iter(drawn.places)
    frontier, *by_stage = [[(chart, next(places)) for chart in each] for each in pictures]
    shown = groups.names_of(records)
    return rendered(
        "page.html",
        title=" · ".join(dict.fromkeys(group.stage if group.control else group.name for group in found)),
        outcomes=[(group, _sentence(group)) for group in latest_first],
        tiles=outcome.tiles_of(latest_first[0]) if len(stages[-1][1]) == 1 else [],  # else they are in the table
        comparisons=[(_stage_name(stage), *_comparison(members)) for stage, members in stages if len(members) > 1],
        frontier=frontier,
        stages=[_stage(*stage, pairs) for stage, pairs in zip(stages, by_stage, strict=True)],
        legend_title="Runs shown",
        legend=list(zip(names, charts.colours_of(names), strict=True)),
        bokeh=drawn.bokeh,
        script=drawn.script,
        tokens=any(not group.control for group in found),
        by_environment=[(stage, _inline_json(each)) for stage, members in stages if (each := _policies(members))],
        inspector=_inline_json(inspected(records, [shown[record.folder] for record in records])),
        guide=GUIDE,
        findings=findings,
        configs=[(f"{shown[record.folder]}: {record.stage}", _yaml(record.config)) for record in records],
    )


def _sentence(group: groups.Group) -> str:
    return control.sentence_of(group) if group.control else outcome.sentence_of(group)


def _policies(members: Sequence[groups.Group]) -> list[dict[str, Any]]:
    return [each for group in members if group.control and (each := control.pictures_of(group)) is not None]


def _comparison(members: Sequence[groups.Group]) -> tuple[list[str], list[Any], list[Any]]:
    settings = [(name, [_yaml(value).strip() for value in values]) for name, values in groups.differences(members)]
    return [group.name for group in members], outcome.comparison_of(members), settings


def _stage(stage: str, members: Sequence[groups.Group], pairs: list[Any]) -> dict[str, Any]:
    """One stage's section. Samples are those of the first run alone; those of PPO are in the inspector."""
    samples = [] if stage == "ppo" else outcome.samples_of(members[0].records[0])
    return {"name": _stage_name(stage), "anchor": stage or "run", "charts": pairs, "samples": samples}


def _stage_name(stage: str) -> str:
    return STAGE_NAMES.get(stage, stage)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True).removesuffix("...\n")


def _inline_json(value: Any) -> Markup:
    """JSON for inside a script element, which no text in it can end."""
    return Markup(json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"))
