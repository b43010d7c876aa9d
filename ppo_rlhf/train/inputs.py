"""What the stages start from: objects that the caller gives, else what the configuration names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_rlhf.config import PPOConfig, RewardConfig, SFTConfig
from ppo_rlhf.data import Row, load_rows, with_chat_template
from ppo_rlhf.errors import UserError
from ppo_rlhf.models import load_policy, tokenizer_with_pad
from ppo_rlhf.reward_settings import RewardSource

T = TypeVar("T")


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
    """The given policy and tokenizer, else those that the configuration names. Raises UserError for one of the two."""
    if (policy is None) != (tokenizer is None):
        raise UserError("policy and tokenizer go together: give both, or neither, and `policy` in the configuration.")
    if policy is None or tokenizer is None:
        source = named(config.policy, "policy", what)
        trusted, bits = config.trust_remote_code, config.lora.base_bits
        policy, tokenizer = load_policy(source, setting="policy", trust_remote_code=trusted, base_bits=bits)
    else:
        tokenizer = tokenizer_with_pad(policy, tokenizer, setting="tokenizer")
    return policy, with_chat_template(tokenizer, config.chat_template)


def load_reference(
    source: str, tokenizer: PreTrainedTokenizerBase, *, setting: str, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model that KL is measured to, token by token. Raises UserError for another vocabulary than the policy's."""
    reference, its_tokenizer = load_policy(source, setting=setting, trust_remote_code=trust_remote_code)
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{setting}: {source} has another vocabulary than the policy, but KL is measured token by token; give one "
            "with the policy's tokenizer."
        )
    return reference


def training_and_held_out(
    config: SFTConfig | RewardConfig,
    data: Iterable[Row] | None,
    *,
    what: str,
    read: Callable[[list[Row], str], T],
    split: Callable[[T], tuple[T, T]],
) -> tuple[T, T]:
    """What to train on, given or of the configuration's data, and what to evaluate on: data of its own, or a share.

    read: makes of the rows of a setting what the stage reads; before the split, so that messages count all rows.
    """

    def loaded(source: str | Iterable[Row], setting: str) -> T:
        return read(load_rows(source, required=(), setting=setting, columns=config.columns), setting)

    training = loaded(data if data is not None else named(config.data, "data", what), "data")
    return split(training) if config.eval_data is None else (training, loaded(config.eval_data, "eval_data"))
