"""What the stages start from: objects that the caller gives, else what the configuration names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_rlhf.config import PPOConfig, RewardConfig, SFTConfig
from ppo_rlhf.data import held_out, load_rows
from ppo_rlhf.errors import UserError
from ppo_rlhf.models import load_policy, tokenizer_with_pad
from ppo_rlhf.reward_settings import RewardSource


def named(value: RewardSource | None, name: str, what: str) -> Any:
    """The value of a setting that must be set. Raises UserError, which says what it is, where it is not."""
    if value is None:
        raise UserError(f"{name} is not set: {what}.")
    return value


def policy_with_tokenizer(
    config: SFTConfig | RewardConfig | PPOConfig,
    policy: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    what: str,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The given policy and tokenizer where both are given, else those that the configuration names."""
    if policy is None or tokenizer is None:
        source = named(config.policy, "policy", what)
        trusted, bits = config.trust_remote_code, config.lora.base_bits
        return load_policy(source, setting="policy", trust_remote_code=trusted, base_bits=bits)
    return policy, tokenizer_with_pad(policy, tokenizer, setting="tokenizer")


def training_and_held_out(
    config: SFTConfig | RewardConfig,
    data: Iterable[dict[str, Any]] | None,
    *,
    required: Sequence[str],
    what: str,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows to train on, given or those of the configuration, and rows to evaluate on: its own, or a share of them."""
    rows = load_rows(data if data is not None else named(config.data, "data", what), required=required, setting="data")
    if config.eval_data is None:
        return held_out(rows, config.eval_fraction, config.seed, setting="eval_fraction")
    return rows, load_rows(config.eval_data, required=required, setting="eval_data")
