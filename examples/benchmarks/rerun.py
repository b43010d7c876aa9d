"""Runs the quick half of the reference results again, and says which figures lie outside their intervals.

    python examples/benchmarks/rerun.py --output-dir runs/rerun
    python examples/benchmarks/rerun.py --output-dir runs/rerun-some --only pendulum startup

The commands and the intervals are in reference.json. Prints a table and writes the same into <output-dir>/rerun.json;
exit code 1 where a figure moved. With --resume a run that is finished in the folder is not repeated, and one that was
begun goes on, if both are of the commit that is checked out.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from ppo_rlhf.errors import Interrupted, UserError
from ppo_rlhf.run import checked_out_commit, is_finished, new_folder, strict_json, told_if_unwritable, write_text
from ppo_rlhf.run.grid import Job, run_grid

REFERENCE = Path(__file__).with_name("reference.json")
WORKERS = 2


@dataclass(frozen=True)
class Reference:
    """A result of the README that is quick to take again."""

    name: str
    command: str  # of one run; {seed} stands for its seed; without seeds, what shows the same to a reader
    seeds: tuple[int, ...]  # a run each, a figure is the mean over them; none where the command leaves no run folder
    figures: Mapping[str, tuple[float, float]]  # dotted name in a run's summary.json → lowest and highest
    source: str  # of the intervals

    def jobs(self, folder: Path) -> list[Job]:
        """Its runs."""
        words = {seed: shlex.split(self.command.format(seed=seed)) for seed in self.seeds}
        return [
            Job(f"{self.name} seed {seed}", (sys.executable, *command[1:]), folder / self.name / f"seed-{seed}")
            for seed, command in words.items()
        ]


@dataclass(frozen=True)
class Finding:
    """A figure beside its interval."""

    name: str
    figure: str
    value: float | None  # None where it is missing or not finite
    low: float
    high: float
    source: str

    @property
    def verdict(self) -> str:
        """Where the figure lies; all but `inside` says that it moved."""
        if self.value is None or not math.isfinite(self.value):
            return "missing"
        return "below" if self.value < self.low else "above" if self.value > self.high else "inside"


def read_references() -> list[Reference]:
    """What reference.json holds."""
    rows = json.loads(REFERENCE.read_text(encoding="utf-8"))
    return [
        Reference(
            row["name"],
            row["command"],
            tuple(row["seeds"]),
            {figure: (low, high) for figure, (low, high) in row["figures"].items()},
            row["source"],
        )
        for row in rows
    ]


def claims_that_fail() -> dict[str, Any]:
    """What `ppo-rlhf study kl-estimators` finds."""
    from ppo_rlhf.study import kl_estimators

    return {"claims_that_fail": sum(not claim.holds for claim in kl_estimators.run().claims)}


def slowest_help() -> dict[str, Any]:
    """What startup.py finds: of each command the least of its repeats, and of these the largest."""
    from startup import WORDS, seconds

    return {"slowest_help": max(seconds(*words) for words in WORDS)}


WITHOUT_RUNS = {"kl-estimators": claims_that_fail, "startup": slowest_help}


def summaries_of(reference: Reference, folder: Path) -> list[dict[str, Any]]:
    """What its runs came to, one a seed, empty where a run failed; of those without a run folder what is measured."""
    if reference.seeds:
        folders = [job.folder for job in reference.jobs(folder)]
        return [
            json.loads((each / "summary.json").read_text(encoding="utf-8")) if is_finished(each) else {}
            for each in folders
        ]
    return [WITHOUT_RUNS[reference.name]()]


def compared(reference: Reference, summaries: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """The mean of each figure over the summaries, beside its interval."""
    return [
        Finding(reference.name, figure, mean_of(figure, summaries), low, high, reference.source)
        for figure, (low, high) in reference.figures.items()
    ]


def mean_of(figure: str, summaries: Sequence[Mapping[str, Any]]) -> float | None:
    """The mean of summary["ppo"]["kl"] for "ppo.kl"; None where one summary lacks it, or holds null."""
    values: list[Any] = list(summaries)
    for name in figure.split("."):
        values = [(value or {}).get(name) for value in values]
    return None if None in values else statistics.fmean(values)


def show(findings: Sequence[Finding]) -> None:
    """The findings as a table."""
    table = Table("result", Column("figure", overflow="fold"), "now", "interval", "verdict")
    for each in findings:
        now = "–" if each.value is None else f"{each.value:.3f}"
        interval = f"{each.low:.3f} to {each.high:.3f}"
        style = "" if each.verdict == "inside" else "bold red"
        table.add_row(each.name, each.figure, now, interval, each.verdict, style=style)
    Console(markup=False, highlight=False).print(table)


def check_folder(folder: Path, jobs: Sequence[Job], *, resume: bool) -> None:
    """Raises UserError for a file, runs or a table that are not to be resumed, and runs of another commit than is
    checked out.
    """
    for each in (folder, *(job.folder for job in jobs)):
        new_folder(str(each), "rerun", resume=resume)
    if (folder / "rerun.json").exists() and not resume:
        raise UserError(f"{folder} holds a table already; go on with it by --resume, or give another --output-dir.")
    now = checked_out_commit()
    for path in sorted(path for job in jobs for path in job.folder.rglob("environment.json")):
        then = json.loads(path.read_text(encoding="utf-8"))["commit"]
        if then != now:
            raise UserError(
                f"{path.parent} was run at commit {then}, and {now} is checked out; give another --output-dir."
            )


def main(argv: Sequence[str] | None = None) -> int:
    """→ 0 where every figure is inside its interval, 1 where one moved, 2 for a folder that will not do, 128 + n after
    signal n.
    """
    references = read_references()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[each.name for each in references])
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="go on with the runs in --output-dir")
    given = parser.parse_args(argv)

    chosen = [each for each in references if given.only is None or each.name in given.only]
    jobs = [job for each in chosen for job in each.jobs(given.output_dir)]
    try:
        check_folder(given.output_dir, jobs, resume=given.resume)
        with told_if_unwritable(given.output_dir):
            given.output_dir.mkdir(parents=True, exist_ok=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        run_grid(jobs, workers=WORKERS, title="reference results")
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return stopped.code
    except UserError as error:
        print(error, file=sys.stderr)  # and what failed is missing below
    findings = [found for each in chosen for found in compared(each, summaries_of(each, given.output_dir))]
    show(findings)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(f"{sum(each.ru_utime + each.ru_stime for each in used):.0f} CPU seconds in what ran now")

    rows = [{**asdict(each), "verdict": each.verdict} for each in findings]
    write_text(given.output_dir / "rerun.json", strict_json(rows, indent=1) + "\n")
    return 0 if all(each.verdict == "inside" for each in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
