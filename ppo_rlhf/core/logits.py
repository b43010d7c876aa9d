"""The log-probabilities and entropies of decisions, a slice at a time; and the truncating filters.

`log_softmax` of a whole batch would be a second copy of the largest tensor of all, (B, T, vocabulary), in float32. Here
each slice is widened, reduced and dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SLICE_ELEMENTS = 2**22  # 16 MiB of float32: small enough for a CPU's caches to help, large enough for a GPU to be busy
HEAD_ROWS = 128  # fewer at a time, and reading the head's weights would cost more than the products
KEPT_BYTES = 2**28  # up to so many bytes of probabilities wait for the backward pass, instead of being computed again


def head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    differentiable_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """What a language model's head says of tokens, without its logits ever being whole.

        log softmax(z)[ids] and H = −Σ p·log p in nats, of z = (hidden · weightᵀ + bias) ÷ temperature

    hidden (N, d), weight (V, d), bias (V,), ids (N,) → (N,) and (N,), float32 (float64 stays). Products are taken in
    hidden's type, everything after them in float32.

    A slice of tokens at a time is multiplied, reduced and dropped. Its probabilities wait for the backward pass where
    all of them fit in KEPT_BYTES, and are computed again where not. The entropy has a gradient only where asked.
    """
    return _HeadLogprobs.apply(hidden, weight, bias, ids, temperature, differentiable_entropy)


class _HeadLogprobs(torch.autograd.Function):
    """∂ log p[id] / ∂z = onehot − p,   ∂H / ∂z = −p·(log p + H)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, temperature: float, entropic: bool
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy = (torch.empty(len(hidden), dtype=wide, device=hidden.device) for _ in range(2))
        narrow = weight.to(hidden.dtype)
        kept = None
        if any(ctx.needs_input_grad[:3]) and len(hidden) * len(weight) * hidden.element_size() <= KEPT_BYTES:
            kept = hidden.new_empty(len(hidden), len(weight))
        for rows in _row_slices(len(hidden), len(weight), SLICE_ELEMENTS):
            logits = _head_logits(hidden[rows], narrow, bias, temperature)
            if kept is not None and kept.dtype == wide:
                probabilities = torch.softmax(logits, -1, out=kept[rows])
            else:
                probabilities = logits.softmax(-1)
            # the largest probability is at least 1/V: its logarithm is exact where the chosen one's may be −∞
            partition = logits.amax(1) - probabilities.amax(1).log()
            logprobs[rows] = logits.gather(1, ids[rows, None]).squeeze(1) - partition
            with torch.autocast(hidden.device.type, enabled=False):  # which would take this product in 16 bits
                entropy[rows] = partition - torch.linalg.vecdot(probabilities, logits)
            if kept is not None and kept.dtype != wide:
                kept[rows] = probabilities
        ctx.save_for_backward(hidden, narrow, bias, ids, logprobs, entropy)
        ctx.temperature, ctx.kept, ctx.weight_dtype = temperature, kept, weight.dtype
        ctx.set_materialize_grads(False)
        if not entropic:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logprobs: Tensor | None, of_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, logprobs, entropy = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_hidden, grad_weight, grad_bias = torch.empty_like(hidden) if needs_hidden else None, None, None
        kept, ctx.kept = ctx.kept, None  # written over below: a second backward pass computes it again
        zero = torch.zeros_like(logprobs)
        of_logprobs, of_entropy = (zero if g is None else g / ctx.temperature for g in (of_logprobs, of_entropy))
        for rows in _row_slices(len(hidden), len(weight), SLICE_ELEMENTS if kept is None else kept.numel()):
            if kept is None:
                gradient = _head_logits(hidden[rows], weight, bias, ctx.temperature).softmax(-1).to(hidden.dtype)
            else:
                gradient = kept[rows]
            g, e = of_logprobs[rows, None], of_entropy[rows, None]
            chosen, uncertainty = logprobs[rows, None], entropy[rows, None]
            if of_entropy is zero:
                gradient.mul_(-g)
            else:
                log = gradient.log().clamp_(min=_least_log(gradient.dtype))
                gradient.mul_(log.add_(uncertainty).mul_(-e).sub_(g))
            # −p·g at the chosen token and then + g would round 1 − p away in bf16
            at_chosen = -torch.expm1(chosen) * g - chosen.exp() * (chosen + uncertainty) * e
            gradient.scatter_(1, ids[rows, None], at_chosen.to(gradient.dtype))
            if grad_hidden is not None:
                torch.mm(gradient, weight, out=grad_hidden[rows])
            if grad_weight is not None and grad_weight.dtype == gradient.dtype:
                grad_weight.addmm_(gradient.t(), hidden[rows])
            elif needs_weight:
                grad_weight = _sum_of(grad_weight, gradient.t() @ hidden[rows], ctx.weight_dtype)
            if needs_bias:
                grad_bias = _sum_of(grad_bias, gradient.sum(0), bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _sum_of(total: Tensor | None, term: Tensor, dtype: torch.dtype) -> Tensor:
    return term.to(dtype) if total is None else total.add_(term)


def _head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """(n, V) in float32, for a slice of tokens."""
    logits = _widened(hidden @ weight.t())
    if bias is not None:
        logits = logits + bias
    return _divided(logits, temperature)


def _row_slices(num_rows: int, width: int, elements: int) -> list[slice]:
    """Slices of rows of about so many elements, and of HEAD_ROWS at least."""
    size = max(HEAD_ROWS, elements // max(1, width))
    return [slice(start, start + size) for start in range(0, num_rows, size)]


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
        return -(logprobs.exp() * logprobs.clamp(min=_least_log(logprobs.dtype))).sum(-1)

    return _by_slices(piece, logits)


def _by_slices(function: Callable[..., Tensor], logits: Tensor, *others: Tensor) -> Tensor:
    rows = max(1, SLICE_ELEMENTS // max(1, logits[0].numel())) if len(logits) else 1
    pieces = zip(logits.split(rows), *(other.split(rows) for other in others), strict=True)
    return torch.cat([function(_widened(piece), *rest) for piece, *rest in pieces])


def _widened(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _least_log(dtype: torch.dtype) -> float:
    """Below the logarithm of any probability but 0, which it stands for: p·log p is 0 then, and its gradient is too.

    −∞ or the least finite number would not do: a gradient above 1 makes −∞ of the latter, and 0·∞ is NaN.
    """
    return 2 * math.log(torch.finfo(dtype).tiny)


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
