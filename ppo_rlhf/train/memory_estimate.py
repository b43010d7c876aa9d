"""What a run will take of memory, told before any weights are loaded: `--estimate-memory`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface, PreTrainedModel, PreTrainedTokenizerBase

from ppo_rlhf.config import PPOConfig, RewardConfig, RunConfig, SFTConfig
from ppo_rlhf.core.logits import HEAD_ROWS, KEPT_BYTES, SLICE_ELEMENTS
from ppo_rlhf.errors import UserError
from ppo_rlhf.models import (
    context_length,
    disable_dropout,
    policy_without_weights,
    takes_position_ids,
    use_fused_gelu,
)
from ppo_rlhf.optimizer import optimizer_bytes
from ppo_rlhf.packing import ROW_BUCKET, fused_width
from ppo_rlhf.policy import PolicyWithValue
from ppo_rlhf.rewards import RewardFunction, RewardModel, load_reward, models_in
from ppo_rlhf.sampling.decoding import cache_room
from ppo_rlhf.settings import SamplingSettings
from ppo_rlhf.train.inputs import named
from ppo_rlhf.train.ppo_parts import load_prompts, value_model_of
from ppo_rlhf.train.reward_model import ComparisonModule, classifier_from, load_rankings
from ppo_rlhf.train.sft import load_examples
from ppo_rlhf.train.supervised import token_batches

FLOAT = 4  # bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part: of what stays, and of what one phase of a step takes besides."""

    parts: dict[str, int]
    phases: dict[str, dict[str, int]]

    @property
    def peak(self) -> int:
        """What stays and the largest phase together."""
        return sum(self.parts.values()) + max(sum(phase.values()) for phase in self.phases.values())

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {"parts": self.parts, "phases": self.phases, "peak": self.peak}

    def lines(self) -> list[str]:
        """For people."""
        lines = _lines(self.parts)
        for name, phase in self.phases.items():
            lines += [f"{name}, besides", *(f"  {line}" for line in _lines(phase, width=46))]
        return [*lines, *_lines({"at most, beside Python and its libraries": self.peak})]


def _lines(parts: dict[str, int], *, width: int = 48) -> list[str]:
    return [f"{name:<{width}}{size / 2**20:>12,.1f} MiB" for name, size in parts.items()]


def estimate_sft(config: SFTConfig) -> MemoryEstimate:
    """Of supervised fine-tuning, in one process."""
    policy, tokenizer = _policy(config, "the language model to start from")
    examples, _ = load_examples(config, None, tokenizer, min(config.max_length or 2**31, context_length(policy)))
    num_rows = config.micro_batch_size or config.batch_size
    if config.batch_tokens is not None:
        batches = token_batches(examples.lengths, config, config.batch_tokens, 1)
        num_rows = min(config.micro_batch_size or config.batch_tokens, max(map(len, batches)))
    num_learnt = num_rows * max(sum(example.learnt) for example in examples)
    update = _gradients(policy) | _activations([policy.base_model], num_rows, max(examples.lengths), config)
    return MemoryEstimate(
        {"policy": weight_bytes(policy), "optimizer": optimizer_bytes(policy, config.optimizer)},
        {"update": update | _sliced_logits(num_learnt, policy)},
    )


def estimate_reward(config: RewardConfig) -> MemoryEstimate:
    """Of reward modelling, in one process."""
    policy, tokenizer = _policy(config, "the supervised policy that the reward model starts from")
    longest = min(config.max_length or 2**31, context_length(policy))
    rows, training, _ = load_rankings(config, None, tokenizer, longest)
    with torch.device("meta"):
        reward_model = RewardModel(classifier_from(policy), tokenizer)
        module = ComparisonModule(reward_model.network, policy if config.language_model_coef else None)
    num_rows = (config.micro_batch_size or config.batch_size) * max(map(len, training.encoded))
    length = max(len(line) for lines in training.encoded for line in lines)
    update = _gradients(module) | _activations([reward_model.classifier.base_model], num_rows, length, config)
    if config.language_model_coef:
        update |= _whole_logits(num_rows * length, policy)
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    sampling = _cache(policy, config.sampling, config.normalization_prompts, max(map(len, prompts)))
    return MemoryEstimate(
        {"reward model": weight_bytes(module), "optimizer": optimizer_bytes(module, config.optimizer)},
        {"sampling": {"policy": weight_bytes(policy)} | sampling, "update": update},
    )


def estimate_ppo(config: PPOConfig) -> MemoryEstimate:
    """Of PPO, in one process. What a reward function of the user's own takes is not known, a server's is elsewhere."""
    policy, tokenizer = _policy(config, "the supervised policy to start from")
    reference = policy
    if config.reference is not None:
        trusted = config.trust_remote_code
        reference, _ = policy_without_weights(config.reference, setting="reference", trust_remote_code=trusted)
    source = named(config.reward, "reward", "a reward model's folder, or module:function")
    reward = load_reward(source, setting="reward", device="meta")
    frozen = {"reference": reference} | _networks(reward, "reward model")
    if config.gold is not None:
        frozen |= _networks(load_reward(config.gold, setting="gold", device="meta"), "gold")
    prompts, eval_prompts = load_prompts(
        config, tokenizer, None, context_length(policy) - config.sampling.max_new_tokens
    )
    value_model = value_model_of(config, policy, tokenizer, reward)
    model = PolicyWithValue(policy, value_model=value_model, with_values=config.has_values)
    disable_dropout(model)

    halved = 2 if config.frozen_precision == "bf16" else 1
    parts = {"policy": weight_bytes(model) - (0 if value_model is None else weight_bytes(value_model))}
    parts |= {} if value_model is None else {"value model": weight_bytes(value_model)}
    parts |= {name: weight_bytes(module) // halved for name, module in frozen.items()}
    parts |= {"optimizer": optimizer_bytes(model, config.optimizer)}
    longest = max(map(len, [*prompts.ids, *eval_prompts.ids]))
    num_rows = min(config.ppo.micro_batch_size or config.batch_size, config.batch_size // config.ppo.num_minibatches)
    trunks = [policy.base_model] if value_model is None else [policy.base_model, value_model.trunk]
    length = longest + config.sampling.max_new_tokens
    return MemoryEstimate(
        parts,
        {
            "sampling": _cache(policy, config.sampling, config.batch_size, longest),
            "update": _gradients(model)
            | _activations(trunks, num_rows, length, config, checkpointing=config.gradient_checkpointing)
            | _sliced_logits(num_rows * config.sampling.max_new_tokens, policy),
        },
    )


def _policy(config: SFTConfig | RewardConfig | PPOConfig, what: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source = named(config.policy, "policy", what)
    if config.lora.rank:
        raise UserError("--estimate-memory knows full fine-tuning alone; leave lora.rank out to see what that takes.")
    return policy_without_weights(source, setting="policy", trust_remote_code=config.trust_remote_code)


def _networks(reward: RewardFunction, name: str) -> dict[str, nn.Module]:
    """Of the reward models in a reward, numbered in the order of its parts where there are several."""
    models = models_in(reward)
    return {name if len(models) == 1 else f"{name} {i}": each.network for i, each in enumerate(models, start=1)}


def weight_bytes(module: nn.Module) -> int:
    """Of all parameters and buffers, those that are shared counted once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in [*module.parameters(), *module.buffers()])


def _gradients(module: nn.Module) -> dict[str, int]:
    trained = (parameter for parameter in module.parameters() if parameter.requires_grad)
    return {"gradients": sum(parameter.numel() * parameter.element_size() for parameter in trained)}


def _activations(
    trunks: Sequence[Any], num_rows: int, length: int, config: RunConfig, *, checkpointing: bool = False
) -> dict[str, int]:
    """Of the transformers in turn, the largest: what a backward pass needs of a forward pass over the longest rows.

    In mixed precision they are less; but the weights are there in 16 bits as well.
    """
    length = -(-length // ROW_BUCKET) * ROW_BUCKET
    dtype = torch.float32 if config.precision == "no" else torch.bfloat16
    sizes = []
    for trunk in trunks:
        size = activation_bytes(trunk, num_rows, length, fused=length >= fused_width(dtype))
        if checkpointing:  # one layer's at a time, and what goes into each
            layers = trunk.config.num_hidden_layers
            size = size // layers + layers * num_rows * length * trunk.config.hidden_size * FLOAT
        sizes.append(size + (weight_bytes(trunk) // 2 if config.precision != "no" else 0))
    return {f"activations of {num_rows} rows of {length} tokens": max(sizes)}


def activation_bytes(trunk: Any, num_rows: int, length: int, *, fused: bool) -> int:
    """What autograd keeps of a transformer's forward pass for its backward pass, by a pass without numbers (meta)."""
    trunk.set_attn_implementation(FUSED if fused else "eager")
    use_fused_gelu(trunk)
    ids = torch.zeros(num_rows, length, dtype=torch.int64, device="meta")
    positions = {"position_ids": ids} if takes_position_ids(trunk) else {}
    weights = {parameter.untyped_storage()._cdata for parameter in trunk.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no other takes its number

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    mask = torch.zeros(1, 1, length, length, device="meta")  # four dimensions: transformers leaves it alone
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        trunk(input_ids=ids, attention_mask=mask, use_cache=False, **positions)
    return sum(storage.nbytes() for storage in kept.values())


def _fused_attention(
    _: nn.Module, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any
) -> tuple[Tensor, None]:
    """A CPU's fused attention for tensors without numbers, which PyTorch would give the plain one."""
    mixed, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, is_causal=True)
    return mixed.transpose(1, 2), None


FUSED = "ppo_rlhf_fused"  # its name among the attentions of transformers
AttentionInterface.register(FUSED, _fused_attention)


def _whole_logits(num_tokens: int, policy: PreTrainedModel) -> dict[str, int]:
    """Of all tokens at once, and their gradient."""
    return {"logits": 2 * num_tokens * policy.config.vocab_size * FLOAT}


def _sliced_logits(num_tokens: int, policy: PreTrainedModel) -> dict[str, int]:
    """What `head_logprobs` keeps of all tokens, and logits and probabilities of a slice."""
    width = policy.config.vocab_size
    kept = num_tokens * width * FLOAT
    sliced = 2 * max(HEAD_ROWS * width, SLICE_ELEMENTS) * FLOAT
    return {"logits": (kept if kept <= KEPT_BYTES else 0) + min(sliced, 2 * kept)}


def _cache(policy: PreTrainedModel, sampling: SamplingSettings, num_prompts: int, longest: int) -> dict[str, int]:
    """Keys and values of the rows that are decoded together, and their logits, probabilities and running sums."""
    config = policy.config
    num_rows, num_columns = cache_room(sampling, num_prompts, longest)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "key-value cache": 2 * config.num_hidden_layers * num_rows * num_columns * heads * size * FLOAT,
        "logits": 3 * num_rows * config.vocab_size * FLOAT,
    }
