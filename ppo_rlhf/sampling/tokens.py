"""One token of each row: how it is drawn, and whether it ends the response."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ppo_rlhf.core import top_k_filter, top_p_filter
from ppo_rlhf.errors import UserError
from ppo_rlhf.settings import SamplingSettings


def draw(logits: Tensor, noise: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor]:
    """One token a row, by the inverse of the cumulative distribution, and its log-probability before top-k and top-p.

    logits (B, V), noise (B,) → (B,) int64, (B,) float32.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if settings.temperature != 1.0:
        logits = logits / settings.temperature
    probabilities = kept = logits.softmax(-1)
    if settings.top_k:
        logits = top_k_filter(logits, settings.top_k)
    if settings.top_p < 1:
        logits = top_p_filter(logits, settings.top_p)
    if settings.top_k or settings.top_p < 1:
        kept = logits.softmax(-1)
    cumulative = kept.cumsum(-1)
    threshold = noise[:, None].to(cumulative) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logits.shape[-1] - 1)
    return tokens.squeeze(1), probabilities.gather(1, tokens).squeeze(1).log().float()


def stop_ids_of(settings: SamplingSettings, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a response: those of the settings, else the tokenizer's eos."""
    ids: Sequence[int] = settings.stop_token_ids or (tokenizer.eos_token_id,)
    return list(ids)


def check_stop_ids(settings: SamplingSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for a stop id that is no token's, at which nothing would ever stop."""
    for token in settings.stop_token_ids:
        if not 0 <= token < len(tokenizer):
            raise UserError(
                f"sampling.stop_token_ids: {token} is not an id of the tokenizer, whose {len(tokenizer)} tokens count "
                "from 0."
            )


def stop_strings_end(
    tokenizer: PreTrainedTokenizerBase, ids: Tensor, rows: Tensor, steps: Tensor, settings: SamplingSettings
) -> Tensor:
    """Whether each row's newest token completes a stop string, (N,) bool.

    A token has a byte at least, so the last tokens, as many as the longest string has bytes, hold it whole; with one
    more, whose leading space some tokenizers drop.
    """
    reach = 1 + max(len(string.encode()) for string in settings.stop_strings)
    columns = steps[:, None] + torch.arange(1 - reach, 1, device=ids.device)
    tails = ids[rows[:, None], columns.clamp(min=0)].tolist()
    lines = [tail[max(0, reach - 1 - step) :] for tail, step in zip(tails, steps.tolist(), strict=True)]
    texts = tokenizer.batch_decode(lines, skip_special_tokens=True)
    ends = [any(string in text for string in settings.stop_strings) for text in texts]
    return torch.tensor(ends, device=ids.device)


def warn_of_truncation(settings: SamplingSettings) -> None:
    """Warns that a truncating sampler does not sample from the distribution whose log-probabilities train."""
    if settings.top_k or settings.top_p < 1:
        warnings.warn(
            f"sampling.top_k={settings.top_k}, top_p={settings.top_p} cut the distribution that is sampled, but not "
            "the one that is trained: KL estimates are biased and may turn negative. Train with top_k=0 and top_p=1.",
            stacklevel=2,
        )
