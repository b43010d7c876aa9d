"""Runs that differ in seed and paths alone are one group: one line in a chart, the others as a band around it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppo_rlhf.records import STAGES, Record
from ppo_rlhf.settings import flat

APART = {"output_dir", "resume", "seed", "log_with", "eval_every", "save_every", "keep_checkpoints", "pictures"}
"""Settings in which the runs of a group differ: they change nothing that is trained, but for the seed."""


@dataclass(frozen=True)
class Group:
    """Runs of one stage with the same settings, of one seed each."""

    name: str  # in the legend: the folders, seen from where they lie together; of control runs the algorithm
    stage: str  # of control runs the environment
    records: tuple[Record, ...]

    @property
    def control(self) -> bool:
        """Whether these are control runs."""
        return self.records[0].stage == "classic"


def groups_of(records: Sequence[Record]) -> list[Group]:
    """The runs in groups, in the order of the stages, then in that of the runs."""
    names = names_of(records)
    together: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        key = (record.task, *sorted((name, repr(value)) for name, value in comparable(record.config)))
        together.setdefault(key, []).append(record)
    algorithms = [(members[0].task, members[0].config.get("algorithm")) for members in together.values()]
    groups = []
    for (task, algorithm), members in zip(algorithms, together.values(), strict=True):
        alone = algorithm is not None and algorithms.count((task, algorithm)) == 1
        name = str(algorithm) if alone else _joined([names[record.folder] for record in members])
        groups.append(Group(name, task, tuple(members)))
    order = {stage: place for place, stage in enumerate(STAGES)}
    return sorted(groups, key=lambda group: order.get(group.stage, len(order)))


def names_of(records: Sequence[Record]) -> dict[Path, str]:
    """Short names: a run's folder, or that of its pipeline, seen from where they all lie together."""
    roots = {record.folder: root_of(record).absolute() for record in records}
    common = Path(os.path.commonpath([root.parent for root in roots.values()]))
    return {folder: root.relative_to(common).as_posix() for folder, root in roots.items()}


def root_of(record: Record) -> Path:
    """A run's own folder, or its pipeline's."""
    inside = record.folder.name in STAGES and (record.folder.parent / "config.yaml").exists()
    return record.folder.parent if inside else record.folder


def comparable(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings by dotted name, but for the seed and where the run lies; of a path its last part alone."""
    for name, value in flat(config).items():
        if name.split(".")[-1] not in APART:
            yield name, Path(value).name if _is_path(value) else value


def differences(groups: Sequence[Group]) -> list[tuple[str, list[Any]]]:
    """The settings in which groups differ: (name, each group's value), in the order of the first that has it."""
    settings = [dict(comparable(group.records[0].config)) for group in groups]
    names = dict.fromkeys(name for each in settings for name in each)
    rows = [(name, [each.get(name) for each in settings]) for name in names]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def _is_path(value: Any) -> bool:
    """Whether a setting names a place on a disk. One slash alone may be a model's name on the Hub."""
    return isinstance(value, str) and "/" in value and (value.count("/") > 1 or Path(value).exists())


def _joined(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    if len(names) == 1:
        return names[0]
    return f"{names[0]} … {names[-1]} ({len(names)} runs)" if len(names) > 2 else " and ".join(names)
