"""Rows of data from everything `datasets` loads, or from a database of preferences, checked where they enter.

Held-out splits; the order of training.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from datasets import Dataset, DatasetDict, disable_progress_bars, load_dataset, load_from_disk
from torch import Tensor

from ppo_rlhf.errors import UserError, did_you_mean
from ppo_rlhf.references import call, is_reference
from ppo_rlhf.seeding import permutation

if TYPE_CHECKING:
    from ppo_rlhf.preferences import Store

DATABASES = ("sqlite", "postgresql", "postgres", "mysql", "mariadb")
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}

Rows = Sequence[dict[str, Any]]


def load_rows(source: str | Iterable[dict[str, Any]], *, required: Sequence[str], setting: str) -> list[dict[str, Any]]:
    """The rows of a source, each with the required columns, none of them missing.

    source: a JSONL, JSON, CSV, Parquet or text file, a folder saved by `datasets`, a data set's name on the Hub (its
    "train" split), `module:function` or `file.py:function` that returns rows, the URL of a database of preferences, or
    the rows themselves. setting: the configuration's name for it, for messages.

    Raises UserError for a missing file, no rows, a missing column, or a missing value.
    """
    rows = [dict(row) for row in (_from_source(source, setting) if isinstance(source, str) else source)]
    name = source if isinstance(source, str) else "the given rows"
    if not rows:
        raise UserError(f"{setting}: {name} has no rows.")
    for index, row in enumerate(rows):
        for column in required:
            if column not in row:
                hint = did_you_mean(column, row)
                raise UserError(f"{setting}: {name} has no column {column!r}, only {', '.join(sorted(row))}.{hint}")
            if row[column] is None:
                raise UserError(f"{setting}: row {index} of {name} has no value in column {column!r}.")
    return rows


def _from_source(source: str, setting: str) -> Iterable[dict[str, Any]]:
    if is_database(source):
        return _preferences(source, setting)
    if is_reference(source):
        return call(source)
    path = Path(source)
    disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is told below, in one line
    try:
        if path.is_dir():
            loaded = load_from_disk(source)
        elif path.suffix in LOADERS:
            if not path.is_file():
                raise UserError(f"{setting}: there is no file {source}.")
            if path.stat().st_size == 0:
                raise UserError(f"{setting}: {source} is empty.")
            loaded = Dataset.from_list(list(load_dataset(LOADERS[path.suffix], data_files=source, split="train")))
        else:
            loaded = load_dataset(source, split="train")
    except UserError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        first = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise UserError(f"{setting}: {source} cannot be loaded: {first}") from error
    if not isinstance(loaded, DatasetDict):
        return loaded
    if "train" not in loaded:
        raise UserError(f"{setting}: {source} has no split 'train', only {', '.join(loaded)}; give one split's folder.")
    return loaded["train"]


def is_database(source: str) -> bool:
    """Whether the source is a database's URL, such as sqlite:///preferences.db."""
    scheme, colon, _ = source.partition("://")
    return bool(colon) and scheme.partition("+")[0] in DATABASES


def preferences_store(url: str, *, setting: str, create: bool = False) -> Store:
    """The database of preferences at a URL. Raises UserError where it cannot be opened."""
    check_preferences(url, setting=setting)
    from ppo_rlhf.preferences import Store

    return Store.open(url, setting=setting, create=create)


def check_preferences(url: str, *, setting: str) -> None:
    """Raises UserError for an address that can be no database of preferences, or where its package is missing."""
    try:
        from ppo_rlhf.preferences import check_address
    except ModuleNotFoundError as error:
        raise UserError(
            f"{setting}: {url} needs a package that is not installed: install 'ppo-rlhf[label]'."
        ) from error
    check_address(url, setting=setting)


def _preferences(url: str, setting: str) -> Rows:
    """The choices that people made: prompt, responses, ranks, margin, annotator."""
    store = preferences_store(url, setting=setting)
    from ppo_rlhf.preferences import ranked_rows

    try:
        return ranked_rows(store.choices())
    finally:
        store.close()


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


def held_out(rows: Rows, fraction: float, seed: int, *, setting: str) -> tuple[list[Any], list[Any]]:
    """(training rows, held-out rows): about `fraction` of the distinct prompts, with all their rows, are held out.

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
    sides: tuple[list[Any], list[Any]] = ([], [])
    for index, row in enumerate(rows):
        sides[str(row.get("prompt", index)) in chosen].append(row)
    return sides


def stream(num_rows: int, start: int, stop: int, seed: int) -> Tensor:
    """Row numbers at positions start … stop−1 of the data read over and over, freshly shuffled each time. (stop−start,)

    A function of the position alone: a resumed run reads on where it was.
    """
    first, last = start // num_rows, (stop - 1) // num_rows
    passes = torch.cat([permutation(num_rows, seed, "pass", number) for number in range(first, last + 1)])
    return passes[start - first * num_rows : stop - first * num_rows]
