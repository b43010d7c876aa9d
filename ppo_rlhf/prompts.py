"""Prompts: tokenised once, checked against the model's context, batched with left padding, in a resumable order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ppo_rlhf.data import Rows, text_column
from ppo_rlhf.errors import UserError


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

    def __init__(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, *, longest: int, setting: str) -> None:
        """Tokenises the column `prompt`. Raises UserError for a prompt that is blank, or nothing but special tokens, or
        longer than `longest` tokens.
        """
        self.texts = text_column(rows, "prompt", setting=setting)
        self.columns = {name: [row.get(name) for row in rows] for name in rows[0] if name != "prompt"}
        self.pad_id = int(tokenizer.pad_token_id)
        self.ids: list[list[int]] = tokenizer(self.texts)["input_ids"]
        special = set(tokenizer.all_special_ids)
        for index, ids in enumerate(self.ids):
            if special.issuperset(ids):
                raise UserError(
                    f"{setting}: the tokenizer finds no token in prompt {index}, {self.texts[index]!r}, or special "
                    "ones alone; give it some text, or remove the row."
                )
            if len(ids) > longest:
                raise UserError(
                    f"{setting}: prompt {index} has {len(ids)} tokens; {longest} fit beside the response in "
                    "the model's context: shorten or drop it, or lower sampling.max_new_tokens."
                )

    def __len__(self) -> int:
        return len(self.texts)

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
