"""The outcome of runs: in a line for the terminal, in a sentence and a few numbers for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ppo_rlhf.records import Record, records_of
from ppo_rlhf.report.groups import Group


@dataclass(frozen=True)
class Tile:
    """One number of the outcome."""

    label: str
    before: str  # empty: there is no before
    after: str
    note: str = ""


def outcome_lines(folder: Path) -> list[str]:
    """The outcome of a finished run, or of a pipeline's stages, a line each; empty while it is not finished."""
    if not (folder / "summary.json").exists():
        return []
    return [f"{_line(record)}  ({record.summary['seconds']:.0f} s)" for record in records_of(folder)]


def _line(record: Record) -> str:
    numbers = record.summary

    def shown(name: str, digits: str) -> str:
        return shown_number(numbers[name], digits)

    if record.stage == "sft":
        return f"sft:    held-out loss {shown('loss_before', '.3f')} → {shown('loss_after', '.3f')} nats a token"
    if record.stage == "reward":
        return (
            f"reward: held-out pairs ordered right {shown('pairwise_accuracy', '.1%')}, "
            f"calibration error {shown('calibration_error', '.3f')}"
        )
    gold = ""
    if "gold_score_before" in numbers:
        gold = f", gold score {shown('gold_score_before', '.2f')} → {shown('gold_score_after', '.2f')}"
    return (
        f"ppo:    score {shown('score_before', '.2f')} → {shown('score_after', '.2f')}{gold}, "
        f"KL {shown('kl', '.1f')} nats a response, stop rate {shown('stop_rate', '.1%')}"
    )


def shown_number(number: float | None, digits: str) -> str:
    """The number, or what stands for one that was not finite, which the run folder holds as null."""
    return "not finite" if number is None else format(number, f"z{digits}").replace("-", "−")


def sentence_of(group: Group) -> str:
    """What came of a group's runs, in one sentence; their means where there are several."""
    numbers = means_of(group)
    if not numbers:
        step = max(record.step for record in group.records)
        return f"The {group.stage} run has not finished: this is what it wrote up to step {step}."
    runs = "" if len(group.records) == 1 else f" (means of {len(group.records)} runs)"
    if group.stage == "sft":
        return f"Fine-tuning took the held-out loss {_from_to(numbers, 'loss')} nats a token{runs}."
    if group.stage == "reward":
        right = shown_number(numbers["pairwise_accuracy"], ".1%")
        return f"The reward model puts {right} of the held-out pairs in the right order{runs}."
    if "score_after" not in numbers:
        return f"The {group.stage} run has finished{runs}."
    return f"{_ppo_sentence(numbers)}{runs}."


def _ppo_sentence(numbers: dict[str, float | None]) -> str:
    moved = f"PPO {_moved(numbers, 'score')} the reward model’s score {_from_to(numbers, 'score')}"
    way = f", {shown_number(numbers['kl'], '.1f')} nats a response away from where it started"
    if "gold_score_after" not in numbers:
        return moved + way
    rose = _moved(numbers, "score") == "raised"
    fell = _moved(numbers, "gold_score") == "lowered"
    gold = f"the gold score, which it never saw, {_from_to(numbers, 'gold_score')}"
    if rose and fell:
        return f"{moved} but lowered {gold}{way}: it learnt what the reward model overrates"
    return f"{moved} and {'' if rose != fell else _moved(numbers, 'gold_score') + ' '}{gold}{way}"


def _moved(numbers: dict[str, float | None], name: str) -> str:
    before, after = numbers[f"{name}_before"], numbers[f"{name}_after"]
    if before is None or after is None:
        return "took"
    return "lowered" if after < before else "raised"


def _from_to(numbers: dict[str, float | None], name: str) -> str:
    return f"from {shown_number(numbers[f'{name}_before'], '.2f')} to {shown_number(numbers[f'{name}_after'], '.2f')}"


def means_of(group: Group) -> dict[str, float | None]:
    """The numbers of the group's summaries, each its mean over the runs that have finished; None: not finite."""
    finished = [record.summary for record in group.records if record.finished]
    means: dict[str, float | None] = {}
    for name, value in finished[0].items() if finished else ():
        values = [summary.get(name) for summary in finished]
        if isinstance(value, int | float) or value is None:
            known = [each for each in values if each is not None]
            means[name] = fmean(known) if len(known) == len(values) else None
    return means


def tiles_of(group: Group) -> list[Tile]:
    """The few numbers that sum a group up."""
    numbers = means_of(group)
    return [
        _tile(numbers, label, name, digits, note)
        for label, name, digits, note in (
            ("held-out loss", "loss", ".2f", "nats a token"),
            ("reward model’s score", "score", ".2f", "raw, on held-out prompts"),
            ("gold score", "gold_score", ".2f", "never trained on"),
            ("KL to the reference", "kl", ".1f", "nats a response"),
            ("responses that stop", "stop_rate", ".0%", "by themselves"),
            ("response length", "length", ".0f", "tokens"),
            ("mean return", "return", ",.1f", "of evaluated episodes"),
            ("best mean return", "return_best", ",.1f", "of an evaluation"),
            ("environment steps", "steps", ",.0f", ""),
            ("distinct word pairs", "distinct_2", ".0%", "of all word pairs"),
            ("pairs ordered right", "pairwise_accuracy", ".1%", "held-out"),
            ("calibration error", "calibration_error", ".3f", "of its preferences"),
        )
        if name in numbers or f"{name}_after" in numbers
    ]


def _tile(numbers: dict[str, float | None], label: str, name: str, digits: str, note: str) -> Tile:
    if f"{name}_after" in numbers:
        before, after = (shown_number(numbers[f"{name}_{when}"], digits) for when in ("before", "after"))
        return Tile(label, before, after, note)
    return Tile(label, "", shown_number(numbers[name], digits), note)


def comparison_of(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """The same numbers of several groups side by side: (label, each group's)."""
    tiles = [{tile.label: tile for tile in tiles_of(group)} for group in groups]
    labels = dict.fromkeys(label for each in tiles for label in each)
    return [(label, [_cell(each.get(label)) for each in tiles]) for label in labels]


def _cell(tile: Tile | None) -> str:
    if tile is None:
        return "–"
    return f"{tile.before} → {tile.after}" if tile.before else tile.after


def samples_of(record: Record) -> list[list[tuple[str, str, str]]]:
    """A row for each held-out sample, as it was before and after the run: cells of (heading, text, numbers)."""
    rows = [row for row in record.samples if row.get("kind") == "held-out"]
    if not rows:
        return []
    before, after = ([row for row in rows if row["step"] == step] for step in (rows[0]["step"], rows[-1]["step"]))
    return [_cells(*sides) for sides in zip(before, after, strict=False)]  # a run cut short may have written fewer


def _cells(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str]]:
    prompt = ("prompt", before["prompt"], "")
    if "chosen" in before:
        return [prompt, *(_judged(side, before, after) for side in ("chosen", "rejected"))]
    demonstration = [("demonstration", before["demonstration"], "")] if "demonstration" in before else []
    responses = [(when, row["response"], _numbers_of(row)) for when, row in (("before", before), ("after", after))]
    return [prompt, *demonstration, *responses]


def _judged(side: str, before: dict[str, Any], after: dict[str, Any]) -> tuple[str, str, str]:
    scores = [shown_number(row[f"{side}_score"], ".2f") for row in (before, after)]
    return side, before[side], f"score {' → '.join(scores)}"


def _numbers_of(response: dict[str, Any]) -> str:
    numbers = [
        f"{label} {shown_number(response[name], digits)}{unit}"
        for name, label, digits, unit in (
            ("score", "score", ".2f", ""),
            ("gold_score", "gold", ".2f", ""),
            ("kl", "KL", ".1f", " nats"),
        )
        if name in response
    ]
    return ", ".join(numbers if response["finished"] else [*numbers, "cut off"])
