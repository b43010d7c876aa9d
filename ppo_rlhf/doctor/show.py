"""Findings for the eye: a table on a terminal, plain lines elsewhere; once, or as a run goes on."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ppo_rlhf.doctor.checks import Finding, examine
from ppo_rlhf.records import records_of


def lines_of(findings: list[Finding]) -> list[str]:
    """Three lines a finding: what was seen, why, and what helps."""
    lines = []
    for finding in findings:
        lines += [
            f"{finding.check.name} ({finding.folder}, step {finding.step}): {finding.evidence}.",
            f"    cause: {finding.check.cause}",
            f"    remedy: {finding.check.remedy}",
        ]
    return lines


def show(findings: list[Finding], console: Console) -> None:
    """All findings, or that there are none."""
    if not findings:
        console.print("healthy: no check found anything.")
    elif console.is_terminal:
        table = Table("finding", "seen", "cause", "remedy", show_lines=True)
        for finding in findings:
            seen = f"{finding.evidence}\n{finding.folder}, step {finding.step}"
            table.add_row(finding.check.name, seen, finding.check.cause, finding.check.remedy)
        console.print(table)
    else:
        for line in lines_of(findings):
            console.print(line, soft_wrap=True)


def watch(folder: Path, console: Console, *, seconds: float = 2.0) -> list[Finding]:
    """Tells each finding when it first appears, and when it is gone, until the run is finished or Ctrl-C; → the last.

    Raises UserError for a folder that holds no run.
    """
    findings: list[Finding] = []
    size = -1
    try:
        while True:
            records = records_of(folder)
            if (now := sum(len(record.rows) for record in records)) != size:
                size, known = now, findings
                findings = examine(folder)
                _tell_changes(known, findings, console)
            # A pipeline is finished by its own summary.
            if (folder / "summary.json").exists():
                return findings
            time.sleep(seconds)
    except KeyboardInterrupt:
        return findings


def _tell_changes(before: list[Finding], now: list[Finding], console: Console) -> None:
    def named(findings: list[Finding]) -> dict[tuple[str, Path], Finding]:
        return {(finding.check.name, finding.folder): finding for finding in findings}

    old, new = named(before), named(now)
    for key in old.keys() - new.keys():
        console.print(f"gone: {key[0]} ({key[1]})", soft_wrap=True)
    for line in lines_of([finding for key, finding in new.items() if key not in old]):
        console.print(line, soft_wrap=True)
