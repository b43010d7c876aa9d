"""Prompts: tokenised once, checked against the model's context, batched with left padding, in a resumable order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ppo_rlhf.data import Rows, prompt_texts_and_ids
from ppo_rlhf.errors import UserError
from ppo_rlhf.settings import TooLong


@dataclass(frozen=True)
class PromptBatch:
    """Prompts that are sampled from together."""

    ids: Tensor  # (B, P) int64, left-padded
    mask: Tensor  # (B, P) bool, True on the prompt
    texts: list[str]  # [B]
    rows: list[int]  # [B] source indices

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: slice) -> PromptBatch:
        return PromptBatch(self.ids[rows], self.mask[rows], self.texts[rows], self.rows[rows])


class Prompts:
    """All prompts of a run, with their other columns for the reward function."""

    def __init__(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        *,
        longest: int,
        setting: str,
        too_long: TooLong = "refuse",
    ) -> None:
        """Tokenises the column `prompt`: texts, or conversations, which the column `messages` then keeps as given.

        longest: tokens; too_long: what becomes of longer prompts, all of which are counted. A prompt that is cut is cut
        in tokens, and its text is that of the tokens which are left.

        Raises UserError for a prompt that is blank, or nothing but special tokens, a longer one that is refused, and
        where no prompt is left.
        """
        texts, encoded = prompt_texts_and_ids(rows, tokenizer, setting=setting)
        special = set(tokenizer.all_special_ids)
        for index, ids in enumerate(encoded):
            if special.issuperset(ids):
                raise UserError(
                    f"{setting}: the tokenizer finds no token in prompt {index}, {texts[index]!r}, or special ones "
                    "alone; give it some text, or remove the row."
                )
            if len(ids) > longest and too_long == "refuse":
                raise UserError(
                    f"{setting}: prompt {index} has {len(ids)} tokens; {longest} fit beside the response in "
                    "the model's context: shorten or drop it, or lower sampling.max_new_tokens."
                )
        over = {index for index, ids in enumerate(encoded) if len(ids) > longest}
        dropped = over if too_long == "drop" else set()
        if len(dropped) == len(encoded):
            raise UserError(f"{setting}: each prompt is longer than {longest} tokens, and too_long=drop leaves none.")
        for index in over - dropped:
            encoded[index] = encoded[index][-longest:] if too_long == "left" else encoded[index][:longest]
            texts[index] = str(tokenizer.decode(encoded[index]))
        self.kept = [index for index in range(len(encoded)) if index not in dropped]  # of the rows
        self.num_dropped, self.num_cut = len(dropped), len(over - dropped)
        self.texts = [texts[index] for index in self.kept]
        self.ids: list[list[int]] = [encoded[index] for index in self.kept]
        self.columns = {name: [rows[index].get(name) for index in self.kept] for name in rows[0] if name != "prompt"}
        if isinstance(rows[0]["prompt"], list):
            self.columns.setdefault("messages", [rows[index]["prompt"] for index in self.kept])
        self.pad_id = int(tokenizer.pad_token_id)

    def __len__(self) -> int:
        return len(self.texts)

    def told(self) -> list[str]:
        """A line for what was dropped for its length, or for what was cut."""
        total = len(self) + self.num_dropped
        dropped = f"{self.num_dropped} of {total} prompts are too long and were dropped."
        cut = f"{self.num_cut} of {total} prompts were cut."
        return [dropped] * bool(self.num_dropped) + [cut] * bool(self.num_cut)

    def batch(self, rows: Sequence[int], device: torch.device) -> PromptBatch:
        """The prompts of some rows on the device."""
        width = max(len(self.ids[row]) for row in rows)
        ids = torch.full((len(rows), width), self.pad_id)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for line, row in enumerate(rows):
            length = len(self.ids[row])
            ids[line, width - length :] = torch.tensor(self.ids[row])
            mask[line, width - length :] = True
        return PromptBatch(ids.to(device), mask.to(device), [self.texts[row] for row in rows], list(rows))

    def columns_of(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        """The other columns of some rows, as keyword arguments for a reward function."""
        return {name: [values[row] for row in rows] for name, values in self.columns.items()}
