"""`Responses`: what a model said, as token ids and as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ppo_rlhf.models import right_padded


@dataclass(frozen=True)
class Responses:
    """What the model said. Token in, token out: these ids are trained on, the texts are for rewards and for eyes."""

    ids: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) bool, True through the stop token
    finished: Tensor  # (B,) bool: stopped by itself, not cut off
    texts: list[str]  # [B]
    # (B, T) float32 at the settings' temperature, without top-k and top-p; 0 where the mask is False. None: not told
    logprobs: Tensor | None = None


def responses_of(
    lines: Sequence[Sequence[int]],
    finished: Sequence[bool],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    *,
    logprobs: Sequence[Sequence[float]] | None = None,
) -> Responses:
    """Responses of token ids, those of a stop token too. finished: stopped by themselves, not cut off."""
    ids, mask = right_padded(lines, device)
    told = None
    if logprobs is not None:
        numbers = torch.tensor([number for line in logprobs for number in line], device=device)
        told = torch.zeros(mask.shape, device=device).masked_scatter(mask, numbers)
    return Responses(ids, mask, torch.tensor(finished, device=device), texts_of(ids, mask, tokenizer), told)


def texts_of(ids: Tensor, mask: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Responses as texts, without special tokens: ids, mask (B, T) → [B]."""
    return [_text(tokenizer, line[kept].tolist()) for line, kept in zip(ids.cpu(), mask.cpu(), strict=True)]


def pieces_of(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens, piece by piece as they come."""
    ids: list[int] = []
    told, start = "", 0  # the text of ids[start:] that has been told
    for token in tokens:
        ids.append(token)
        text = _text(tokenizer, ids[start:])
        if text.endswith("\ufffd") or len(text) <= len(told):  # half a character, or nothing to see
            continue
        yield text[len(told) :]
        start, told = _last_whole(tokenizer, ids, start, text)
    yield _text(tokenizer, ids[start:])[len(told) :]


def _last_whole(tokenizer: PreTrainedTokenizerBase, ids: list[int], start: int, text: str) -> tuple[int, str]:
    """Where to decode from for the next piece: at the last token if it has a text of its own, else as before."""
    own = _text(tokenizer, ids[-1:])
    return (len(ids) - 1, own) if own and "\ufffd" not in own else (start, text)


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))
