"""Rows and their columns: other names for them, their texts, held-out splits, the order of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ppo_rlhf.errors import UserError, did_you_mean
from ppo_rlhf.seeding import permutation

Row = dict[str, Any]
Rows = Sequence[Row]


def renamed(rows: Sequence[Row], columns: Mapping[str, str | None], *, setting: str) -> list[Row]:
    """The rows with columns under other names: {"question": "prompt"}; a column without a new name is left out.

    Raises UserError for a column that no row has, or where two would bear one name.
    """
    found = dict.fromkeys(name for row in rows for name in row)
    for column in columns:
        if column not in found:
            hint = did_you_mean(column, found)
            raise UserError(f"columns: {setting} has no column {column!r}, only {', '.join(sorted(found))}.{hint}")
    names = [columns.get(name, name) for name in found]
    for name in names:
        if name is not None and names.count(name) > 1:
            raise UserError(f"columns: {setting} has two columns for {name!r}; leave one out: '{{{name}: null}}'.")
    kept = {name: new for name, new in zip(found, names, strict=True) if new is not None}
    return [{kept[name]: value for name, value in row.items() if name in kept} for row in rows]


def text_column(rows: Rows, column: str, *, setting: str, empty: bool = False) -> list[str]:
    """The column's texts. Raises UserError for one that is missing, not text, or blank where `empty` is False."""
    texts: list[Any] = [row.get(column) for row in rows]
    for index, text in enumerate(texts):
        if column not in rows[index]:
            found, hint = ", ".join(sorted(rows[index])), did_you_mean(column, rows[index])
            raise UserError(f"{setting}: row {index} has no column {column!r}, only {found}.{hint}")
        if not isinstance(text, str):
            raise UserError(f"{setting}: row {index}, column {column!r} is {type(text).__name__}, not text.")
        if not empty and not text.strip():
            raise UserError(f"{setting}: row {index}, column {column!r} is blank; remove the row.")
    return texts


def held_out(rows: Rows, fraction: float, seed: int, *, setting: str) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows), see `held_out_numbers`."""
    training, held = held_out_numbers(rows, fraction, seed, setting=setting)
    return [rows[number] for number in training], [rows[number] for number in held]


def held_out_numbers(rows: Rows, fraction: float, seed: int, *, setting: str) -> tuple[list[int], list[int]]:
    """Numbers of (training rows, held-out rows): about `fraction` of the distinct prompts, with all their rows.

    Rows that share a prompt stay on one side: two opinions of one pair must not meet over the split. Raises UserError
    where a side would be empty.
    """
    keys = list(dict.fromkeys(str(row.get("prompt", index)) for index, row in enumerate(rows)))
    count = round(fraction * len(keys))
    if count == 0 or count == len(keys):
        raise UserError(
            f"{setting}={fraction} holds out {count} of {len(keys)} prompts; both sides need at least one: "
            "change the fraction, or give held-out data of its own."
        )
    chosen = {keys[index] for index in permutation(len(keys), seed, "held out")[:count].tolist()}
    sides: tuple[list[int], list[int]] = ([], [])
    for index, row in enumerate(rows):
        sides[str(row.get("prompt", index)) in chosen].append(index)
    return sides


def stream(num_rows: int, start: int, stop: int, seed: int) -> Tensor:
    """Row numbers at positions start … stop−1 of the data read over and over, freshly shuffled each time. (stop−start,)

    A function of the position alone: a resumed run reads on where it was.
    """
    first, last = start // num_rows, (stop - 1) // num_rows
    passes = torch.cat([permutation(num_rows, seed, "pass", number) for number in range(first, last + 1)])
    return passes[start - first * num_rows : stop - first * num_rows]
