"""Evaluations as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ppo_rlhf.evaluate.evaluation import BestOfN, Evaluation
from ppo_rlhf.statistics import Estimate

LABELS = {
    "score": "score",
    "gold_score": "gold score",
    "kl": "KL to the reference, nats a response",
    "length": "length, tokens",
    "stop_rate": "stopped by itself",
    "distinct_1": "distinct words",
    "distinct_2": "distinct word pairs",
    "distinct_3": "distinct word triples",
    "perplexity": "perplexity on the text",
}


def show(evaluations: Sequence[Evaluation], console: Console) -> None:
    """One table with a column for each policy, and one of the best of n for each reference that was sampled for it."""
    table = Table("95 % intervals", *(escape(each.policy) for each in evaluations))
    for name in dict.fromkeys(name for each in evaluations for name in each.numbers):
        table.add_row(LABELS.get(name, escape(name)), *(_told(each.numbers.get(name)) for each in evaluations))
    for judge in dict.fromkeys(judge for each in evaluations for judge in each.win_rates):
        label = escape(f"wins against {evaluations[0].against}, by {judge}")
        table.add_row(label, *(_told(each.win_rates.get(judge)) for each in evaluations))
    console.print(table)
    shown: list[tuple[str, list[BestOfN]]] = []
    for each in evaluations:
        curve = each.reference or each.policy, each.best_of_n
        if each.best_of_n and curve not in shown:
            shown.append(curve)
            console.print(_best_of_n(*curve))


def _best_of_n(policy: str, curve: list[BestOfN]) -> Table:
    table = Table(title=escape(f"the best of n of {policy}, by score"))
    names = list(curve[0].scores)
    for heading in ("n", "KL, nats", *(LABELS[name] for name in names)):
        table.add_column(heading, justify="right")
    for each in curve:
        table.add_row(str(each.n), f"{each.kl:.2f}", *(_told(each.scores[name]) for name in names))
    return table


def _told(estimate: Estimate | None) -> str:
    if estimate is None:
        return "—"
    return f"{estimate.value:.3f}  {estimate.interval(3)}"
