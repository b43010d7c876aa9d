"""Examples in tokens: which are learnt, what becomes of those that are too long, and their cache on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, overload

from datasets import Dataset, Features, List, Value, disable_progress_bars
from datasets.exceptions import DatasetGenerationError

from ppo_rlhf.data.rows import Row, Rows, held_out_numbers
from ppo_rlhf.errors import UserError
from ppo_rlhf.settings import TooLong

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONVERSION = 1  # to be raised when rows become other tokens than before: an older cache is then not read
PLACES = ("length", "start", "end")  # of an example: how long it is, and where the learnt tokens begin and end
FEATURES = Features(
    {"ids": List(Value("int32")), "learnt": List(Value("bool"))} | dict.fromkeys(PLACES, Value("int64"))
)


@dataclass(frozen=True)
class Example:
    """A text in tokens, and which of them are learnt: those that the policy is to write."""

    ids: list[int]
    learnt: list[bool]

    @property
    def start(self) -> int:
        """The place of the first token that is learnt; the length where none is."""
        return self.learnt.index(True) if True in self.learnt else len(self.ids)

    def cut(self, longest: int, side: TooLong) -> Example:
        """Its last tokens (left) or its first ones (right), where it has more than `longest`.

        The first token of what is left is not learnt: nothing predicts it.
        """
        kept = slice(-longest, None) if side == "left" else slice(longest)
        return Example(self.ids[kept], [False, *self.learnt[kept][1:]])


class Examples(Sequence[Example]):
    """Examples that lie on disk, each read when it is asked for, and cut where it is too long."""

    def __init__(
        self,
        data: Rows,
        table: Dataset,
        *,
        longest: int,
        too_long: TooLong,
        setting: str,
        numbers: Sequence[int] | None = None,
    ) -> None:
        """table: of the data's rows in tokens; longest: tokens of an example; too_long: what becomes of longer ones,
        all of which are counted; numbers: of the rows that are meant, by default all.

        Raises UserError for a longer one that is refused, or of which nothing to learn would be left; and where every
        example is dropped.
        """
        whole, starts, ends = (list(table[name]) for name in PLACES)
        numbers = range(len(whole)) if numbers is None else numbers
        over = [row for row in numbers if whole[row] > longest]
        for row in over:
            # Cut on the left, its first token is not learnt.
            nothing = {"right": starts[row] >= longest, "left": ends[row] <= whole[row] - longest + 1}
            if too_long == "refuse" or nothing.get(too_long):
                raise UserError(
                    f"{setting}: demonstration {row} has {whole[row]} tokens ({starts[row]} before any is learnt), but "
                    f"{longest} fit: set max_length and too_long, to drop or cut what is longer."
                )
        dropped = set(over) if too_long == "drop" else set()
        if len(dropped) == len(numbers):
            raise UserError(f"{setting}: all demonstrations exceed {longest} tokens, and too_long=drop leaves none.")
        self._data, self._table, self._longest, self._too_long, self._setting = data, table, longest, too_long, setting
        self._numbers = [row for row in numbers if row not in dropped]  # rows of the data, one an example
        self.lengths = [min(whole[row], longest) for row in self._numbers]
        self.num_dropped = len(dropped)
        self.num_cut = 0 if dropped else len(over)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        found = self._table[self._numbers[index]]
        example = Example(found["ids"], found["learnt"])
        return example if len(example.ids) <= self._longest else example.cut(self._longest, self._too_long)

    def row(self, index: int) -> Row:
        """The row of the data of which the example was made."""
        return self._data[self._numbers[index]]

    def rows(self, count: int) -> list[Row]:
        """The rows of the first few examples."""
        return [self._data[number] for number in self._numbers[:count]]

    def told(self, noun: str) -> list[str]:
        """A line for what was dropped and one for what was cut."""
        total, limit = len(self) + self.num_dropped, f"max_length={self._longest} tokens"
        dropped = f"{self.num_dropped} of {total} {noun} are longer than {limit} and were dropped."
        cut = f"{self.num_cut} of {total} {noun} were cut on the {self._too_long} to {limit}."
        return [dropped] * bool(self.num_dropped) + [cut] * bool(self.num_cut)

    def split(self, fraction: float, seed: int, *, setting: str) -> tuple[Examples, Examples]:
        """Examples to train on and held-out ones, see `held_out_numbers`."""
        training, held_out = held_out_numbers(self._data, fraction, seed, setting=setting)
        return self._of(training), self._of(held_out)

    def _of(self, numbers: Sequence[int]) -> Examples:
        settings: dict[str, Any] = {"longest": self._longest, "too_long": self._too_long, "setting": self._setting}
        return Examples(self._data, self._table, numbers=numbers, **settings)


def stored(make: Callable[[], Iterable[Example]], key: str) -> Dataset:
    """The examples as a table in the cache of `datasets`, where the same key finds them again without making them.

    Raises UserError where the cache cannot be written.
    """

    def rows() -> Iterator[dict[str, Any]]:
        for example in make():
            places = (len(example.ids), example.start, len(example.ids) - example.learnt[::-1].index(True))
            yield {"ids": example.ids, "learnt": example.learnt, **dict(zip(PLACES, places, strict=True))}

    disable_progress_bars()
    try:
        return Dataset.from_generator(rows, features=FEATURES, fingerprint=key)
    except (DatasetGenerationError, OSError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError):
            raise UserError(f"the cache of datasets cannot be written: {cause}; set HF_DATASETS_CACHE.") from error
        raise cause from None


def key_of(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of all that the tokens of rows depend on."""
    digest = hashlib.blake2b(digest_size=16)
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    kind = (CONVERSION, FEATURES, version("transformers"), type(tokenizer).__name__)
    digest.update(repr((kind, tokenizer.chat_template, tokenizer.special_tokens_map, vocabulary)).encode())
    for row in rows:
        digest.update(json.dumps(row, default=repr).encode())
    return digest.hexdigest()
