"""Rows from everything `datasets` loads, or from a database of preferences, checked where they enter."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import datasets
from datasets import DatasetDict, disable_progress_bars, load_dataset, load_from_disk

from ppo_rlhf.data.rows import Row, renamed
from ppo_rlhf.errors import UserError, did_you_mean
from ppo_rlhf.references import call, is_reference

if TYPE_CHECKING:
    from ppo_rlhf.preferences import Store

DATABASES = ("sqlite", "postgresql", "postgres", "mysql", "mariadb")
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
LOADERS |= {".txt": "text"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
OPTIONS = ("name", "split", "revision", "data_dir", "streaming", "take")  # those of load_dataset, and `take`
SAVED = ("state.json", "dataset_dict.json")  # what a folder saved by `datasets` holds


def load_rows(
    source: str | Iterable[Row],
    *,
    required: Sequence[str],
    setting: str,
    columns: Mapping[str, str | None] | None = None,
) -> list[Row]:
    """The rows of a source, each with the required columns, none of them missing.

    source: a JSONL, JSON, CSV, TSV, Parquet, Arrow or text file (compressed, or several by a pattern such as
    `data/*.jsonl`), a folder of such files or one saved by `datasets`, a data set's name on the Hub,
    `module:function` or `file.py:function` that returns rows, the URL of a database of preferences, or the rows
    themselves. Options of `load_dataset` may follow a `?`: `openai/gsm8k?name=main&split=test`; `streaming=true&take=N`
    reads the first N rows and downloads no more. setting: the configuration's name for it, for messages. columns: other
    names for its columns, see `renamed`.

    Raises UserError for a missing file, no rows, a missing column, or a missing value.
    """
    name = source if isinstance(source, str) else "the given rows"
    rows = [dict(row) for row in (_from_source(source, setting) if isinstance(source, str) else source)]
    if not rows:
        raise UserError(f"{setting}: {name} has no rows.")
    rows = renamed(rows, columns or {}, setting=setting)
    for index, row in enumerate(rows):
        for column in required:
            if column not in row:
                hint = did_you_mean(column, row)
                raise UserError(f"{setting}: {name} has no column {column!r}, only {', '.join(sorted(row))}.{hint}")
            if row[column] is None:
                raise UserError(f"{setting}: row {index} of {name} has no value in column {column!r}.")
    return rows


def _from_source(source: str, setting: str) -> Iterable[Row]:
    if is_database(source):
        return _preferences(source, setting)
    if is_reference(source):
        return call(source)
    path, options = _with_options(source, setting)
    disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is told below, in one line
    take = options.pop("take", None)
    try:
        return list(itertools.islice(_loaded(path, options, setting), take))
    except UserError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        first = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise UserError(f"{setting}: {source} cannot be loaded: {first}") from error


def _with_options(source: str, setting: str) -> tuple[str, dict[str, Any]]:
    """The source without its query, and the query as options of `load_dataset`, `split` among them."""
    path, _, query = source.partition("?")
    if not query or Path(source).exists():
        return source, {"split": "train"}
    options: dict[str, Any] = dict(parse_qsl(query, keep_blank_values=True))
    for option, value in options.items():
        if option not in OPTIONS:
            hint = did_you_mean(option, OPTIONS) or f" There are {', '.join(OPTIONS)}."
            raise UserError(f"{setting}: {source} has an unknown option {option!r}.{hint}")
        if option == "take" and not (value.isdecimal() and int(value)):
            raise UserError(f"{setting}: {source}: take={value} must be a number of rows, at least 1.")
        if option == "streaming" and value not in ("true", "false"):
            raise UserError(f"{setting}: {source}: streaming={value} must be true or false.")
    if "take" in options:
        options["take"] = int(options["take"])
    return path, {"split": "train"} | options | {"streaming": options.get("streaming") == "true"}


def _loaded(path: str, options: dict[str, Any], setting: str) -> Iterable[Row]:
    """What `datasets` makes of a path or a name: one split."""
    place = Path(path)
    if any((place / file).is_file() for file in SAVED):
        return _split_of(load_from_disk(path), options["split"], path, setting)
    suffixes = [suffix for suffix in place.suffixes if suffix not in COMPRESSED]
    loader = LOADERS.get(suffixes[-1]) if suffixes and not place.is_dir() else None
    if loader is None:
        return load_dataset(path, **options)
    if "://" not in path and "*" not in path:
        if not place.is_file():
            raise UserError(f"{setting}: there is no file {path}.")
        if place.stat().st_size == 0:
            raise UserError(f"{setting}: {path} is empty.")
        if loader == "json" and place.suffix not in COMPRESSED and _begins_with_null(place):
            raise UserError(f'{setting}: {path} begins with null, not with a row, such as {{"prompt": …}}.')
    if suffixes[-1] == ".tsv":
        options = options | {"sep": "\t"}
    return load_dataset(loader, data_files=path, **options)


def _begins_with_null(file: Path) -> bool:
    """Whether the first row of JSON is null, at which pyarrow's reader ends the process (a segmentation fault)."""
    with file.open("rb") as lines:
        return next((line for line in lines if line.strip()), b"").lstrip().startswith(b"null")


def _split_of(saved: Any, split: str, path: str, setting: str) -> Iterable[Row]:
    if not isinstance(saved, DatasetDict):
        return saved
    if split not in saved:
        raise UserError(
            f"{setting}: {path} has no split {split!r}, only {', '.join(saved)}; name one of them: "
            f"'{path}?split={next(iter(saved))}'."
        )
    return saved[split]


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


def _preferences(url: str, setting: str) -> list[Row]:
    """The choices that people made: prompt, responses, ranks, margin, annotator."""
    store = preferences_store(url, setting=setting)
    from ppo_rlhf.preferences import ranked_rows

    try:
        return ranked_rows(store.choices())
    finally:
        store.close()
