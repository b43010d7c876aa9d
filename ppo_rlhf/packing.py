"""Padding-free forwards: the real tokens of a padded batch in one row, through any transformer that lets attention be
replaced.

Every linear layer, norm and embedding sees (1, N) real tokens. Attention alone needs to know which sequence a token is
of: it lays queries, keys and values out as left-aligned rows, where plain causality also hides the padding behind them,
and takes the real ones back. Rows of like length make a block, so that a long one does not make the others pay for its
square. transformers hands a function of ours the tensors of each layer, and with them whatever keyword arguments the
model was called with: the `Packing` travels so.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

ATTENTION = "ppo_rlhf"  # the name of our attention among those of transformers
TOKEN_BUCKET = 64  # N is rounded up to a multiple of it, and a row of attention to one of ROW_BUCKET:
ROW_BUCKET = 8  # a CPU's matrix library compiles and keeps a kernel for every shape it meets
BLOCK_COST = 4096  # pairs of tokens, of all heads, that a CPU attends to in the time of one more block's calls


class Block(NamedTuple):
    """Rows of attention, as wide as the longest of them."""

    rows: int
    width: int
    fused: bool  # which kernel attends; a row's own length says so, or its numbers would depend on its neighbours

    @property
    def places(self) -> int:
        """How many tokens have room in it."""
        return self.rows * self.width


def fused_width(dtype: torch.dtype) -> int:
    """From which width on a CPU's fused attention is the faster one, products being in that type.

    Measured on an AMD EPYC with AVX-512: oneDNN, in 16 bits or instead of MKL, makes plain products the faster ones.
    """
    if dtype in (torch.bfloat16, torch.float16):
        return 768
    return 256 if torch.get_float32_matmul_precision() == "highest" else 512


@dataclass(frozen=True)
class Packing:
    """Where the N real tokens of a batch (B, S) are: in one row, and in the blocks of attention, (rows, width) each.

    `ids` and `position_ids` may be a few dummy tokens longer than N, which see and change nothing.
    """

    ids: Tensor  # (1, N + dummies) int64
    position_ids: Tensor  # (1, N + dummies) counted from each row's first real token
    cells: Tensor  # (N,) each token's place in the flattened batch (B · S)
    slots: Tensor  # (N,) each token's place in the flattened blocks of attention, one after the other
    order: Tensor  # (places,) the token at each place of attention, any at those that stay empty
    blocks: tuple[Block, ...]  # of attention, the widest first
    shape: tuple[int, int]  # (B, S) of the batch

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor) -> Packing:
        """ids (B, S), mask (B, S) bool, True on the tokens to pack, wherever the padding is."""
        cells = mask.flatten().nonzero().squeeze(1)
        count = len(cells)
        ranks = mask.cumsum(1) - 1
        lengths, rows = mask.sum(1).sort(descending=True, stable=True)
        blocks = _blocks_of([max(1, length) for length in lengths.tolist()], mask.device)
        widths = [block.width for block in blocks for _ in range(block.rows)]
        starts = torch.empty_like(rows)
        starts[rows] = torch.tensor([0, *itertools.accumulate(widths)][:-1], dtype=torch.int64, device=mask.device)
        slots = (starts[:, None] + ranks).flatten()[cells]
        order = torch.zeros(sum(block.places for block in blocks), dtype=torch.int64, device=mask.device)
        order[slots] = torch.arange(count, device=mask.device)
        dummies = (0, bucketed(count) - count)
        return cls(
            ids=F.pad(ids.flatten()[cells], dummies)[None],
            position_ids=F.pad(ranks.flatten()[cells], dummies)[None],
            cells=cells,
            slots=slots,
            order=order,
            blocks=blocks,
            shape=(mask.shape[0], mask.shape[1]),
        )

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def width(self) -> int:
        """Of the widest rows of attention."""
        return self.blocks[0].width

    def places_of(self, cells: Tensor) -> Tensor:
        """The places in the row of tokens of packed cells: flat indices into (B · S) → (K,)."""
        places = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.int64, device=cells.device)
        places[self.cells] = torch.arange(len(self.cells), device=cells.device)
        return places[cells]

    def padded(self, packed: Tensor) -> Tensor:
        """(N + dummies, …) → (B, S, …), 0 where nothing was packed."""
        empty = packed.new_zeros(self.shape[0] * self.shape[1], *packed.shape[1:])
        return empty.index_copy(0, self.cells, packed[: len(self)]).unflatten(0, self.shape)


def bucketed(count: int) -> int:
    """The next multiple of TOKEN_BUCKET, at least one."""
    return -(-max(1, count) // TOKEN_BUCKET) * TOKEN_BUCKET


def _blocks_of(lengths: Sequence[int], device: torch.device) -> tuple[Block, ...]:
    """Rows of these lengths, the longest first, in blocks: those that make a CPU's attention cheapest; else in one."""
    rows = Counter(-(-length // ROW_BUCKET) * ROW_BUCKET for length in lengths)
    widths = sorted(rows, reverse=True)
    if device.type != "cpu" or not widths:
        return (Block(len(lengths), max(widths, default=ROW_BUCKET), fused=True),)
    fused_from = fused_width(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
    wider = [0, *itertools.accumulate(rows[width] for width in widths)]  # rows of the widest 0, 1, … widths
    best: list[tuple[int, tuple[Block, ...]]] = [(0, ())]  # of the widest 0, 1, … widths: what they cost, and how
    for end in range(1, len(widths) + 1):
        candidates = []
        for start, (cost, blocks) in enumerate(best):
            fused = widths[start] >= fused_from
            if fused != (widths[end - 1] >= fused_from):
                continue
            block = Block(wider[end] - wider[start], widths[start], fused)
            candidates.append((cost + BLOCK_COST + block.places * block.width, (*blocks, block)))
        best.append(min(candidates))
    return best[-1][1]


def last_hidden_states(trunk: nn.Module, packing: Packing) -> Tensor:
    """The last hidden state of each token, (N + dummies, d); by a padded forward where the model cannot be packed."""
    if not can_pack(trunk, packing.width):
        return _by_padded_forward(trunk, packing)
    output = trunk(
        input_ids=packing.ids,
        position_ids=packing.position_ids,
        attention_mask=packing.ids.new_zeros(1, 1, 1, 1),  # four dimensions: a mask that transformers leaves alone
        packing=packing,
        use_cache=False,
    )
    return output.last_hidden_state.squeeze(0)


def can_pack(trunk: Any, width: int) -> bool:
    """Whether the transformer computes by our attention sequences of this length as it would by its own."""
    config: Any = trunk.config.get_text_config()
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return config._attn_implementation == ATTENTION and (window is None or window >= width)


def _by_padded_forward(trunk: Any, packing: Packing) -> Tensor:
    """Left-aligned rows and an attention mask, for a transformer with an attention of its own."""
    rows, width = packing.shape[0], packing.width
    ranks = packing.position_ids[0, : len(packing)]
    places = packing.cells // packing.shape[1] * width + ranks
    empty = packing.ids.new_zeros(rows * width)
    inputs: dict[str, Any] = {
        "input_ids": empty.index_copy(0, places, packing.ids[0, : len(packing)]).view(rows, width),
        "attention_mask": empty.index_fill(0, places, 1).view(rows, width),
    }
    if "position_ids" in inspect.signature(trunk.forward).parameters:
        inputs["position_ids"] = empty.index_copy(0, places, ranks).view(rows, width)
    hidden = trunk(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    return F.pad(hidden[places], (0, 0, 0, packing.ids.shape[1] - len(packing)))


def use_packed_attention(model: PreTrainedModel) -> bool:
    """Gives the model our attention, which padded batches and caches go through as well; False where it cannot be.

    It can where the model is one of transformers' that take any attention function and positions by ids, and where two
    sequences packed then say what they said apart.
    """
    trunk, config = model.base_model, model.config.get_text_config()
    if not model._supports_attention_backend or not type(model).__module__.startswith("transformers."):
        return False
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    bent = getattr(config, "attn_logit_softcapping", None) or getattr(config, "reorder_and_upcast_attn", False)
    if bent or kinds - {"full_attention", "sliding_attention"}:
        return False
    if "position_ids" not in inspect.signature(trunk.forward).parameters:
        return False
    before = model.config._attn_implementation
    training = model.training
    model.eval()
    apart = _of_two_sequences(trunk, before)
    model.set_attn_implementation(ATTENTION)
    difference = _of_two_sequences(trunk, ATTENTION) - apart
    same = bool(difference.abs().max() <= 0.02 * apart.abs().max())  # also in bf16
    model.train(training)
    if not same:
        model.set_attn_implementation(before)
    return same


@torch.no_grad()
def _of_two_sequences(trunk: Any, implementation: str) -> Tensor:
    """Last hidden states of the sequences (0, 1) and (1), (3, d): packed, or each apart."""
    ids, mask = torch.tensor([[0, 1], [1, 0]], device=trunk.device), torch.tensor([[True, True], [True, False]])
    if implementation == ATTENTION:
        return last_hidden_states(trunk, Packing.of(ids, mask.to(trunk.device)))[:3]
    apart = [
        trunk(input_ids=line, attention_mask=torch.ones_like(line), use_cache=False).last_hidden_state[0]
        for line in (ids[:1], ids[1:, :1])
    ]
    return torch.cat(apart)


# ------------------------------------------------------------------------------------------------------- attention


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """softmax(q·kᵀ·scaling + mask)·v: query (B, H, S, d), key and value (B, H or fewer, S, d) → (B, S, H, d).

    With a packing B is 1 and S its tokens, and each attends to those before it in its own sequence.
    """
    if packing is not None:
        return _packed_attention(module, query, key, value, packing, scaling, dropout), None
    if query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    return _plain_attention(module, query, key, value, attention_mask, scaling, dropout), None


def attention_mask(*arguments: Any, device: Any = "cpu", **named: Any) -> Tensor | None:
    """The mask of a padded batch in the form that `attention` takes on the device."""
    make: Any = eager_mask if torch.device(device).type == "cpu" else sdpa_mask
    return make(*arguments, device=device, **named)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, attention_mask)


def _plain_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, dropout: float
) -> Tensor:
    """By plain matrix products: at the lengths that a CPU can train, PyTorch's fused attention is the slower one."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = torch.matmul(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is not None:
        scores = scores + mask
    shares = F.dropout(scores.softmax(-1).to(value.dtype), p=dropout, training=module.training)
    return torch.matmul(shares, value).transpose(1, 2)


def _packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, dropout: float
) -> Tensor:
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    dropout = dropout if module.training else 0.0
    laid_out = (_Unpack.apply(x[0], packing.order, packing.slots, packing.blocks) for x in (query, key, value))
    mixed = [
        _causal_attention(q, k, v, scaling, dropout, fused=block.fused).flatten(1, 2)
        for block, q, k, v in zip(packing.blocks, *laid_out, strict=True)
    ]
    places = mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=1)
    return _Repack.apply(places, packing.slots, packing.ids.shape[1]).transpose(0, 1)[None]


def _causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float, *, fused: bool
) -> Tensor:
    """query (H, rows, width, d), key and value (H or fewer, rows, width, d) → as the queries."""
    heads, rows, width, size = query.shape
    groups = heads // key.shape[0]
    # On a GPU no fused kernel takes float32 and fewer heads of keys.
    if groups > 1 and not (fused and (query.device.type == "cpu" or query.dtype != torch.float32)):
        key, value, groups = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0), 1
    if not fused:
        query, key, value = (x.flatten(0, 1) for x in (query, key, value))
        mask = _causal(1 << (width - 1).bit_length(), query.dtype, query.device)[:width, :width]
        scores = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=scaling)
        shares = F.dropout(scores.softmax(-1).to(value.dtype), p=dropout)
        return torch.bmm(shares, value).view(heads, rows, width, size)
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    mixed = F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=groups > 1
    )
    return mixed.transpose(0, 1)


@functools.lru_cache(maxsize=16)
def _causal(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(width, width): 0 on what a token may see, −∞ behind it."""
    return torch.full((width, width), -torch.inf, dtype=dtype, device=device).triu(1)


class _Unpack(torch.autograd.Function):
    """(H, N, d) → of each block (H, rows, width, d). Empty places repeat a token; no token sees them, so they pass no
    gradient back.
    """

    @staticmethod
    def forward(ctx: Any, packed: Tensor, order: Tensor, slots: Tensor, blocks: Sequence[Block]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(slots)
        ctx.tokens = packed.shape[1]
        parts = zip(order.split([block.places for block in blocks]), blocks, strict=True)
        return tuple(packed.index_select(1, part).unflatten(1, (block.rows, block.width)) for part, block in parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (slots,) = ctx.saved_tensors
        places = [gradient.flatten(1, 2) for gradient in gradients]
        gradient = places[0] if len(places) == 1 else torch.cat(places, dim=1)
        return _with_dummies(gradient.index_select(1, slots), ctx.tokens), None, None, None


class _Repack(torch.autograd.Function):
    """(H, places, d) → (H, N + dummies, d), 0 for the dummies."""

    @staticmethod
    def forward(ctx: Any, places: Tensor, slots: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.places = places.shape[1]
        return _with_dummies(places.index_select(1, slots), tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        gradient = gradients[0][:, : len(slots)]
        empty = gradient.new_zeros(gradient.shape[0], ctx.places, gradient.shape[2])
        return empty.index_copy_(1, slots, gradient), None, None


def _with_dummies(packed: Tensor, tokens: int) -> Tensor:
    return F.pad(packed, (0, 0, 0, tokens - packed.shape[1]))
