"""One forward pass of decoding, `forward(ids, positions, mask, cache) -> logits`: any model's, and faster ones.

ids, positions (N, S): the tokens read; mask (N, W) bool: which of the W columns, these S the last of them, a row sees;
→ logits of the last token, (N, V).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM
from transformers.activations import NewGELUActivation

from ppo_rlhf.models import takes_position_ids

Forward = Callable[[Tensor, Tensor, Tensor, Cache], Tensor]
Function = Callable[[Tensor], Tensor]
Rotation = tuple[Tensor, Tensor]  # cosines and sines, (N, 1, S, head size) each
Embedding = Callable[[Tensor, Tensor], tuple[Tensor, Rotation | None]]  # ids, positions (N, S) → (N, S, width), …

LARGEST_COPIED_MODEL = 10**9  # parameters; a larger model is not copied into a layout of our own
MIN_PACKED_WEIGHTS = 2**19  # a smaller matrix stays in the processor's cache anyhow, and a packed product costs 20 µs
MIN_PACKED_ROWS = 4  # below, a plain product reads the weights faster
KNOWN_ORIGINS = ("torch.nn.modules.", "transformers.models.", "transformers.activations", "transformers.pytorch_utils")


def forward_of(model: PreTrainedModel, *, num_rows: int) -> Forward:
    """The fastest forward pass that is known for a model that will decode num_rows rows."""
    return functional_forward(model, num_rows=num_rows) if is_functional(model) else models_own_forward(model)


def models_own_forward(model: PreTrainedModel) -> Forward:
    """The forward pass of transformers."""
    positioned, prepared = takes_position_ids(model), _takes_prepared_masks(model)

    def forward(ids: Tensor, positions: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        inputs: dict[str, Any] = {"position_ids": positions} if positioned else {}
        inputs["attention_mask"] = attention_bias(mask, ids.shape[1], model.dtype) if prepared else mask.long()
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs)
        return output.logits[:, -1]

    return forward


def attention_bias(mask: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """What is added to the attention of the last `length` columns: (N, 1, length, W), 0 where they see, else very low.

    Not −∞: padding sees nothing at all, and must not become NaN. Nor float64's lowest: some models add it in float32.
    """
    low = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
    seen = mask[:, None, None]
    if length > 1:
        causal = torch.ones(length, mask.shape[1], dtype=torch.bool, device=mask.device)
        seen = seen & causal.tril(mask.shape[1] - length)
    return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill_(~seen, low)


def has_windows(model: PreTrainedModel) -> bool:
    """Whether some layer sees the last tokens alone."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds != {"full_attention"} or getattr(config, "sliding_window", None) is not None


def _takes_prepared_masks(model: PreTrainedModel) -> bool:
    """Models that hand attention to an interface take its mask ready made: a third of a small model's step."""
    plain = model.config._attn_implementation in ("eager", "sdpa") and not has_windows(model)
    return plain and bool(model._supports_attention_backend)


# --------------------------------------------------------------------------- GPT-2, Llama and Qwen2 as plain functions


@dataclass(frozen=True)
class Block:
    """A layer's functions of the residual stream, (N · S, width)."""

    normalize: Function
    attend: Function  # queries, keys and values side by side
    scale: float
    project: Function
    normalize_again: Function
    feed_forward: Function


def is_functional(model: PreTrainedModel) -> bool:
    """Whether `functional_forward` is what the model computes: nothing added to it that would be passed by.

    Such as adapters, hooks or sharding. On a CPU alone: a GPU's steps are compiled.
    """
    config, family = model.config, type(model)
    known = (
        (family is GPT2LMHeadModel and not config.add_cross_attention and not config.reorder_and_upcast_attn)
        or family is LlamaForCausalLM
        or (family is Qwen2ForCausalLM and not has_windows(model))
    )
    return (
        known
        and model.device.type == "cpu"
        and model.num_parameters() <= LARGEST_COPIED_MODEL
        and all(
            type(module).__module__.startswith(KNOWN_ORIGINS)
            and "forward" not in vars(module)
            and not module._forward_pre_hooks
            and all(_only_records(hook) for hook in module._forward_hooks.values())
            for module in model.modules()
        )
    )


def _only_records(hook: Callable[..., Any]) -> bool:
    """transformers leaves hooks behind wherever hidden states were once asked for."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def functional_forward(model: PreTrainedModel, *, num_rows: int) -> Forward:
    """The model as plain functions of its own parameters: a quarter of the calls of transformers' modules.

    Large matrices are copied into oneDNN's own layout, which few rows read faster. Under autocast and in bf16, products
    are in that type, and the residual stream, the attention and its cache in float32.
    """
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else model.dtype
    wide = torch.promote_types(dtype, torch.float32)
    product = functools.partial(_product, dtype=dtype, num_rows=num_rows)
    is_gpt2 = isinstance(model, GPT2LMHeadModel)
    blocks, last = (_gpt2_blocks if is_gpt2 else _llama_blocks)(model, product, wide)
    embed = (_gpt2_embedding if is_gpt2 else _llama_embedding)(model, wide)
    config: Any = model.config
    heads = config.num_attention_heads
    sizes = (heads, *2 * (getattr(config, "num_key_value_heads", heads),))
    head = product(model.lm_head)

    def forward(ids: Tensor, positions: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        rows, length = ids.shape
        bias = attention_bias(mask, length, wide)
        hidden, rotation = embed(ids, positions)
        hidden = hidden.flatten(0, 1)
        for layer, block in enumerate(blocks):
            states = block.attend(block.normalize(hidden)).to(wide).view(rows, length, sum(sizes), -1).transpose(1, 2)
            queries, keys, values = states.split(sizes, dim=1)
            if rotation is not None:
                queries, keys = _rotated(states[:, : -sizes[2]], *rotation).split(sizes[:2], dim=1)
            keys, values = cache.update(keys, values, layer)
            seen = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=bias, scale=block.scale, enable_gqa=sizes[0] != sizes[1]
            )
            hidden = hidden + block.project(seen.transpose(1, 2).reshape(rows * length, -1))
            hidden = hidden + block.feed_forward(block.normalize_again(hidden))
        return head(last(hidden.view(rows, length, -1)[:, -1]))

    return torch.autocast("cpu", enabled=False)(forward) if autocast else forward


def _gpt2_blocks(model: Any, product: Callable[..., Function], wide: torch.dtype) -> tuple[list[Block], Function]:
    """The layers, and the last normalization."""
    blocks = [
        Block(
            _normalization(block.ln_1, wide),
            product(block.attn.c_attn),
            block.attn.scaling,
            product(block.attn.c_proj),
            _normalization(block.ln_2, wide),
            _in_turn(product(block.mlp.c_fc), _fused(block.mlp.act), product(block.mlp.c_proj)),
        )
        for block in model.base_model.h
    ]
    return blocks, _normalization(model.base_model.ln_f, wide)


def _llama_blocks(model: Any, product: Callable[..., Function], wide: torch.dtype) -> tuple[list[Block], Function]:
    """The same of Llama and Qwen2."""
    blocks = [
        Block(
            _normalization(block.input_layernorm, wide),
            product(block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj),
            block.self_attn.scaling,
            product(block.self_attn.o_proj),
            _normalization(block.post_attention_layernorm, wide),
            _in_turn(
                product(block.mlp.gate_proj, block.mlp.up_proj), _gated(block.mlp.act_fn), product(block.mlp.down_proj)
            ),
        )
        for block in model.base_model.layers
    ]
    return blocks, _normalization(model.base_model.norm, wide)


def _gpt2_embedding(model: Any, wide: torch.dtype) -> Embedding:
    tokens, places = model.base_model.wte, model.base_model.wpe
    return lambda ids, positions: (
        F.embedding(ids, tokens.weight).to(wide) + F.embedding(positions, places.weight),
        None,
    )


def _llama_embedding(model: Any, wide: torch.dtype) -> Embedding:
    tokens, rotary = model.base_model.embed_tokens, model.base_model.rotary_emb

    def embed(ids: Tensor, positions: Tensor) -> tuple[Tensor, Rotation]:
        hidden = F.embedding(ids, tokens.weight).to(wide)
        cos, sin = rotary(hidden, positions)
        return hidden, (cos[:, None], sin[:, None])

    return embed


def _product(*modules: Any, dtype: torch.dtype, num_rows: int) -> Function:
    """The linear maps of modules that have the same input, their outputs side by side."""
    weights = [module.weight.t() if isinstance(module, nn.Linear) else module.weight for module in modules]
    biases = [module.bias for module in modules if module.bias is not None]
    weight = torch.cat(weights, dim=1) if len(weights) > 1 else weights[0]
    multiply = product_with(weight.to(dtype), torch.cat(biases).to(dtype) if biases else None, num_rows=num_rows)
    return lambda x: multiply(x.to(dtype))


def product_with(weight: Tensor, bias: Tensor | None, *, num_rows: int) -> Function:
    """x (M, K) ↦ x · weight + bias, weight (K, N), prepared for num_rows rows at a time."""
    large = weight.numel() >= MIN_PACKED_WEIGHTS and num_rows >= MIN_PACKED_ROWS
    if large and weight.dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous(), num_rows)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    if bias is None:
        return lambda x: x @ weight
    return lambda x: torch.addmm(bias, x, weight)


def _normalization(module: Any, dtype: torch.dtype) -> Function:
    weight = module.weight.to(dtype)
    if isinstance(module, nn.LayerNorm):
        bias = module.bias.to(dtype)
        return lambda x: F.layer_norm(x, weight.shape, weight, bias, module.eps)
    if dtype == torch.float64:  # transformers normalizes in float32 even then
        return module
    return lambda x: F.rms_norm(x, weight.shape, weight, module.variance_epsilon)


def _fused(activation: nn.Module) -> Function:
    """GPT-2's own activation is spelt out in eight kernels; PyTorch has it in one."""
    if type(activation) is NewGELUActivation:
        return lambda x: F.gelu(x, approximate="tanh")
    return activation


def _gated(activation: nn.Module) -> Function:
    def function(x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return activation(gate) * value

    return function


def _in_turn(*functions: Function) -> Function:
    def function(x: Tensor) -> Tensor:
        for each in functions:
            x = each(x)
        return x

    return function


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., 2021): pairs of dimensions, half the head apart, turn with the position."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin
