"""What the token inspector shows: responses over a run, with what PPO knew of each of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ppo_rlhf.records import Record
from ppo_rlhf.report.curves import points_of, spread

TOKENS = 20_000  # in one page, all runs together: some two megabytes
FEWEST = 3  # steps, however long their responses are: early, middle and late
DIGITS = 5
COLUMNS = ("logprobs", "ref_logprobs", "entropy", "rewards", "values", "advantages", "returns")
OF_VALUES = ("values", "returns")  # columns that say nothing where there is no value function


def inspected(records: Sequence[Record], names: Sequence[str]) -> list[dict[str, Any]]:
    """What the page's script needs of each PPO run; steps evenly spread where all would be too much for one page."""
    runs = [(record, name) for record, name in zip(records, names, strict=True) if record.stage == "ppo"]
    share = TOKENS // max(1, len(runs))
    found = [_inspected(record, name, share) for record, name in runs]
    return [run for run in found if run["held_out"] or run["rollouts"]]


def _inspected(record: Record, name: str, most: int) -> dict[str, Any]:
    beta = points_of(record, "kl_coef")
    advantage = record.setting("advantage", "gae")
    columns = [name for name in COLUMNS if advantage not in ("rloo", "grpo") or name not in OF_VALUES]
    kinds = {}
    for kind in ("held-out", "rollout"):
        rows = [row for row in record.samples if row.get("kind") == kind]
        kinds[kind] = [_row(row, beta, columns) for row in _thinned(rows, most // 2)]
    return {
        "name": name,
        "advantage": advantage if isinstance(advantage, str) else advantage["name"],
        "gamma": record.setting("gamma", 1.0),
        "lambda": record.setting("gae_lambda", 0.95),
        "clip": record.setting("ppo.clip_range"),
        "dual_clip": record.setting("ppo.dual_clip"),
        "held_out": kinds["held-out"],
        "rollouts": kinds["rollout"],
    }


def _thinned(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """The rows of as many steps as hold `most` tokens, first and last among them."""
    steps = sorted({row["step"] for row in rows})
    tokens = sum(len(row.get("tokens", ())) for row in rows)
    kept = spread(len(steps), max(FEWEST, len(steps) * most // max(most, tokens, 1)))
    chosen = {steps[place] for place in kept}
    return [row for row in rows if row["step"] in chosen]


def _row(row: dict[str, Any], beta: dict[int, float], names: Sequence[str]) -> dict[str, Any]:
    """One response, with these columns. Those that an older run did not write are absent."""
    columns = {name: [_short(number) for number in row[name]] for name in names if name in row}
    numbers = {name: row[name] for name in ("score", "gold_score", "kl") if name in row}
    return {
        "step": row["step"],
        "prompt": row["prompt"],
        "response": row["response"],
        "finished": row["finished"],
        "kl_coef": row.get("kl_coef", beta.get(row["step"])),
        **{name: _short(number) for name, number in numbers.items()},
        **({"tokens": row["tokens"]} if columns else {}),
        **({"fragments": row["fragments"]} if "fragments" in row else {}),
        **columns,
        **({"new": [[_short(x) for x in epoch] for epoch in row["new_logprobs"]]} if "new_logprobs" in row else {}),
    }


def _short(number: float | None) -> float | None:
    return None if number is None else round(number, DIGITS)
