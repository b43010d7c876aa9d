"""What is said to be so, held against numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """A sentence that a study is about, and whether its numbers bear it out."""

    text: str
    holds: bool
    evidence: str


def lines_of(claims: Sequence[Claim]) -> list[str]:
    """The claims with their evidence, for a terminal."""
    return [f"{'✓' if claim.holds else '✗'} {claim.text}\n    {claim.evidence}" for claim in claims]
