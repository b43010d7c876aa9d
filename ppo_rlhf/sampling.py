"""`sample`: batched decoding of responses with a key–value cache; finished rows leave the batch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ppo_rlhf.core import top_k_filter, top_p_filter
from ppo_rlhf.models import evaluating, model_inputs, takes_position_ids
from ppo_rlhf.prompts import PromptBatch
from ppo_rlhf.settings import SamplingSettings

__all__ = ["Responses", "SamplingSettings", "draw", "sample", "stop_ids_of", "warn_of_truncation"]

COMPACTION_SHARE = 0.75  # the cache is copied without its finished rows when fewer than this share still run


@dataclass(frozen=True)
class Responses:
    """What the model said. Token in, token out: these ids are trained on, the texts are for rewards and for eyes."""

    ids: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) bool, True through the stop token
    finished: Tensor  # (B,) bool: stopped by itself, not cut off
    texts: list[str]  # [B]


@torch.no_grad()
def sample(
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptBatch,
    settings: SamplingSettings,
    noise: Tensor,
) -> Responses:
    """Samples one response for each prompt.

    noise: uniform numbers in [0, 1), (B, max_new_tokens): token t of row b is the inverse of the cumulative
    distribution at noise[b, t]. So a row's response depends on its prompt and its noise, not on its
    neighbours or on when they stop.

    → Responses, T being the longest response's length. The model's mode is kept; no dropout acts here.
    """
    pieces = []
    with evaluating(language_model):
        for start in range(0, len(prompts), settings.batch_size):
            rows = slice(start, start + settings.batch_size)
            pieces.append(_decode(language_model, tokenizer, prompts[rows], settings, noise[rows]))
    ids, mask, finished = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    width = int(mask.sum(1).max())
    ids, mask = ids[:, :width], mask[:, :width]
    texts = [
        str(tokenizer.decode(line[kept].tolist(), skip_special_tokens=True))
        for line, kept in zip(ids, mask, strict=True)
    ]
    return Responses(ids, mask, finished, texts)


def _decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptBatch,
    settings: SamplingSettings,
    noise: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask (B, max_new_tokens) and finished (B,) of one batch."""
    device, steps = prompts.ids.device, settings.max_new_tokens
    stop_ids = torch.tensor(stop_ids_of(settings, tokenizer), device=device)
    ids = torch.full((len(prompts), steps), int(tokenizer.pad_token_id), device=device)
    mask = torch.zeros(len(prompts), steps, dtype=torch.bool, device=device)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    noise = noise.to(device)

    cache = DynamicCache(config=model.config)
    rows = torch.arange(len(prompts), device=device)  # which row each line of the shrinking batch is
    seen = prompts.mask
    inputs = model_inputs(model, prompts.ids, prompts.mask)
    for step in range(steps):
        logits = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        tokens = draw(logits, noise[rows, step], settings)
        running = ~finished[rows]
        ids[rows[running], step] = tokens[running]
        mask[rows[running], step] = True
        finished[rows] |= torch.isin(tokens, stop_ids)
        running = ~finished[rows]
        num_running = int(running.sum())
        if num_running == 0 or step == steps - 1:
            break
        seen = torch.cat([seen, seen.new_ones(len(seen), 1)], dim=1)
        if num_running < COMPACTION_SHARE * len(rows):
            kept = running.nonzero().squeeze(1)
            cache.batch_select_indices(kept)
            rows, tokens, seen = rows[kept], tokens[kept], seen[kept]
        inputs = {"input_ids": tokens[:, None], "attention_mask": seen.long()}
        if takes_position_ids(model):
            inputs["position_ids"] = seen.sum(1, keepdim=True) - 1
    return ids, mask, finished


def draw(logits: Tensor, noise: Tensor, settings: SamplingSettings) -> Tensor:
    """One token a row, by the inverse of the cumulative distribution. logits (B, V), noise (B,) → (B,) int64."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if settings.temperature != 1.0:
        logits = logits / settings.temperature
    if settings.top_k:
        logits = top_k_filter(logits, settings.top_k)
    if settings.top_p < 1:
        logits = top_p_filter(logits, settings.top_p)
    cumulative = logits.softmax(-1).cumsum(-1)
    threshold = noise[:, None].to(cumulative) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)


def stop_ids_of(settings: SamplingSettings, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a response: those of the settings, else the tokenizer's eos."""
    ids: Sequence[int] = settings.stop_token_ids or (tokenizer.eos_token_id,)
    return list(ids)


def warn_of_truncation(settings: SamplingSettings) -> None:
    """Warns that a truncating sampler does not sample from the distribution whose log-probabilities train."""
    if settings.top_k or settings.top_p < 1:
        warnings.warn(
            f"sampling.top_k={settings.top_k}, top_p={settings.top_p} cut the distribution that is sampled, but not "
            "the one that is trained: KL estimates are biased and may turn negative. Train with top_k=0 and top_p=1.",
            stacklevel=2,
        )
