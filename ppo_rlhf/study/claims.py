"""What is said to be so, held against numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ppo_rlhf.document import Table


@dataclass(frozen=True)
class Claim:
    """A sentence that a study is about, and whether its numbers bear it out."""

    text: str
    holds: bool | None  # None: the numbers cannot tell
    evidence: str


def lines_of(claims: Sequence[Claim]) -> list[str]:
    """The claims with their evidence, for a terminal."""
    marks = {True: "✓", False: "✗", None: "?"}
    return [f"{marks[claim.holds]} {claim.text}\n    {claim.evidence}" for claim in claims]


def table_of(claims: Sequence[Claim]) -> Table:
    """The claims with their evidence, for a page."""
    words = {True: "yes", False: "no", None: "cannot be told"}
    rows = [[claim.text, words[claim.holds], claim.evidence] for claim in claims]
    return Table(["finding", "borne out", "numbers"], rows)
