"""`ColumnCache`: the keys and values of the rows that are being decoded, in place, in buffers made once.

Every row ends at the same column, the one before `column`, where the next token of all of them goes: a shorter row
starts later (left padding). So a step writes one column and reads the columns from the first that a row still needs.
A row that ends is overwritten by the last one; a new prompt is read apart, from its shared prefix on, and put into the
columns before `column`. Where the columns run out, the rows move back to the first one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


@dataclass
class Window:
    """Where the next forward pass reads and writes. All layers share it."""

    num_rows: int
    num_columns: int
    static: bool  # every step reads all rows and columns, so that its shapes never change
    position: Tensor  # () int64 on the device: `column`, for steps of fixed shape
    used: int = 0  # the rows [0, used) are decoded
    first: int = 0  # the first column that any of them needs
    column: int = 0  # where the next token goes
    reading: bool = False  # a prompt is read, apart from the rows
    slots: Tensor | None = None  # (k,) the rows that it is for; None: a prefix that all prompts share
    source: Tensor | None = None  # (k,) which of the distinct prompts each row has
    prefix_length: int = 0


class ColumnLayer(CacheLayerMixin):
    """One layer's buffers: (rows, heads, columns, head size)."""

    is_sliding = False
    keys: Any
    values: Any

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window
        self.is_compileable = window.static
        self.prefix: tuple[Tensor, Tensor] | None = None  # (1, heads, prefix, head size) each

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the buffers. Zeros: what is hidden must still be finite."""
        rows, columns = self.window.num_rows, self.window.num_columns
        self.keys, self.values = (
            states.new_zeros(rows, states.shape[1], columns, states.shape[3]) for states in (key_states, value_states)
        )
        if self.window.static:  # a CUDA graph keeps their addresses
            torch._dynamo.mark_static_address(self.keys)
            torch._dynamo.mark_static_address(self.values)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens just read, (N, heads, S, head size) each → all that these tokens attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window = self.window
        if window.reading:
            return self._read_prompt(key_states, value_states)
        if window.static:
            self.keys.index_copy_(2, window.position[None], key_states)
            self.values.index_copy_(2, window.position[None], value_states)
            return self.keys, self.values
        rows, columns = slice(window.used), slice(window.first, window.column + 1)
        self.keys[rows, :, window.column] = key_states[:, :, 0]
        self.values[rows, :, window.column] = value_states[:, :, 0]
        return self.keys[rows, :, columns], self.values[rows, :, columns]

    def _read_prompt(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        window = self.window
        if self.prefix is not None:
            keys, values = (
                torch.cat([prefix.expand(len(states), -1, -1, -1), states], dim=2)
                for prefix, states in zip(self.prefix, (keys, values), strict=True)
            )
        if window.slots is None:
            self.prefix = keys, values
            return keys, values
        columns = slice(window.column - keys.shape[2], window.column)
        self.keys[window.slots, :, columns] = keys[window.source]
        self.values[window.slots, :, columns] = values[window.source]
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns the tokens read next attend to, and the first one's number."""
        window = self.window
        if window.reading:
            return window.prefix_length + query_length, 0
        return window.num_columns if window.static else window.column + 1 - window.first, 0

    def get_seq_length(self) -> Any:
        """How many of those columns come before the tokens read next."""
        window = self.window
        if window.reading:
            return window.prefix_length
        return window.position if window.static else window.column - window.first

    def get_max_length(self) -> int:
        return -1  # the sampler asks for as many columns as it needs


class ColumnCache(Cache):
    """The cache of a model's every layer; a forward pass of transformers takes it as `past_key_values`."""

    def __init__(
        self, num_layers: int, num_rows: int, num_columns: int, column: int, *, device: torch.device, static: bool
    ) -> None:
        """column: where the first token goes, at least the length of the longest prompt that will be read."""
        position = torch.tensor(column, device=device)
        self.window = Window(num_rows, num_columns, static, position, num_rows if static else 0, column, column)
        self.visible = torch.zeros(num_rows, num_columns, dtype=torch.bool, device=device)  # which columns a row sees
        self.free_mark = num_columns + 1  # a row without tokens may start at num_columns
        self.starts = torch.full((num_rows,), self.free_mark, device=device)  # each row's first column
        self.longest = column
        super().__init__(layers=[ColumnLayer(self.window) for _ in range(num_layers)])

    @contextmanager
    def reading(self, slots: Tensor | None, source: Tensor | None, mask: Tensor) -> Iterator[None]:
        """Within it a forward pass reads prompts into the rows `slots`; None: the prefix that all of them share.

        source (k,) says which line of mask (N, W), the prompts left-padded with their prefix, each row gets.
        """
        window = self.window
        window.reading, window.slots, window.source = True, slots, source
        yield
        window.reading = False
        if slots is None:
            window.prefix_length = mask.shape[1]
            return
        self.visible[slots] = False
        self.visible[slots, window.column - mask.shape[1] : window.column] = mask[source]
        padding = (mask.cumsum(1) == 0).sum(1)
        self.starts[slots] = window.column - mask.shape[1] + padding[source]
        self._narrow()

    def open_column(self) -> Tensor:
        """Makes room for one token in each row → which columns each sees with it, (rows, columns) bool."""
        window = self.window
        if window.column == window.num_columns:
            self._move_back()
        self.visible[: window.used, window.column] = True
        window.position.fill_(window.column)
        if window.static:
            return self.visible
        return self.visible[: window.used, window.first : window.column + 1]

    def close_column(self) -> None:
        """The token of every row is in."""
        self.window.column += 1

    def free(self, slots: Tensor) -> None:
        """These rows have ended."""
        self.starts[slots] = self.free_mark
        self._narrow()

    def close_ranks(self, ended: Tensor) -> tuple[Tensor, Tensor]:
        """The last rows take the places of those that ended → the places, and the rows that they had before.

        ended (used,) bool. So a row that ends costs the copy of one row, and the rows that are decoded stay [0, used).
        """
        window = self.window
        window.used -= int(ended.sum())
        new = ended[: window.used].nonzero().squeeze(1)
        old = (~ended[window.used :]).nonzero().squeeze(1) + window.used
        columns = slice(window.first, window.column)
        for buffer in self._buffers():
            buffer[new, :, columns] = buffer[old, :, columns]
        self.visible[new], self.starts[new] = self.visible[old], self.starts[old]
        self.starts[window.used :] = self.free_mark
        self._narrow()
        return new, old

    def _narrow(self) -> None:
        self.window.first = min(int(self.starts.min()), self.window.column)

    def _move_back(self) -> None:
        """To the first columns, with room for the longest prompt that may still come."""
        window = self.window
        width = window.column - window.first
        column = max(width, self.longest)
        old, new = slice(window.first, window.column), slice(column - width, column)
        for buffer in self._buffers():
            buffer[: window.used, :, new] = buffer[: window.used, :, old].clone()
        self.visible[:, new] = self.visible[:, old].clone()
        self.visible[:, : new.start] = self.visible[:, column:] = False
        taken = self.starts < self.free_mark
        self.starts[taken] -= window.column - column
        window.first, window.column = new.start, column

    def _buffers(self) -> Iterator[Tensor]:
        layers: Any = self.layers
        for layer in layers:
            if layer.is_initialized:
                yield from (layer.keys, layer.values)
