"""From logits to the log-probabilities and entropies of decisions, a slice at a time; and the truncating filters.

`log_softmax` of a whole batch would be a second copy of the largest tensor of all, (B, T, vocabulary), in float32. Here
each slice is widened, reduced and dropped.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SLICE_ELEMENTS = 2**22  # 16 MiB of float32: small enough for a CPU's caches to help, large enough for a GPU to be busy


def logprobs_of(logits: Tensor, ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits ÷ temperature)[ids] in float32 (float64 stays). logits (B, T, V), ids (B, T) → (B, T)."""

    def piece(logits: Tensor, ids: Tensor) -> Tensor:
        logits = _divided(logits, temperature)
        return logits.gather(-1, ids[..., None]).squeeze(-1) - logits.logsumexp(-1)

    return _by_slices(piece, logits, ids)


def entropy_of(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """H = −Σ p·log p in nats, p = softmax(logits ÷ temperature), float32 (float64 stays). (B, T, V) → (B, T).

    Logits of −∞ add nothing.
    """

    def piece(logits: Tensor) -> Tensor:
        logprobs = _divided(logits, temperature).log_softmax(-1)
        return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)

    return _by_slices(piece, logits)


def _by_slices(function: Callable[..., Tensor], logits: Tensor, *others: Tensor) -> Tensor:
    rows = max(1, SLICE_ELEMENTS // max(1, logits[0].numel())) if len(logits) else 1
    pieces = zip(logits.split(rows), *(other.split(rows) for other in others), strict=True)
    return torch.cat([function(_widened(piece), *rest) for piece, *rest in pieces])


def _widened(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _divided(logits: Tensor, temperature: float) -> Tensor:
    """After widening: a division in bf16 would round what float32 is to keep."""
    return logits if temperature == 1.0 else logits / temperature


def top_k_filter(logits: Tensor, k: int) -> Tensor:
    """Keeps the k largest logits of each row and those equal to the k-th; the others become −∞. (…, V) → (…, V)."""
    threshold = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < threshold, -torch.inf)


def top_p_filter(logits: Tensor, p: float) -> Tensor:
    """Keeps the fewest, most likely tokens whose probability reaches p (Holtzman et al., 2020). (…, V) → (…, V).

    The others become −∞; the most likely token always stays.
    """
    if p >= 1:  # a rounded running sum reaches 1 before the tail
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    unneeded = probabilities.cumsum(-1) - probabilities >= p
    unneeded[..., 0] = False
    return logits.masked_fill(unneeded.gather(-1, order.argsort(-1)), -torch.inf)
