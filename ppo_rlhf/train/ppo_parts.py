"""What a PPO run works with: loaded and checked before anything is written."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_rlhf.adapters import has_adapter, on_same_base, rank_of, share_weights, train_adapter
from ppo_rlhf.config import PPOConfig
from ppo_rlhf.data import Example, held_out, load_rows, stream
from ppo_rlhf.errors import UserError
from ppo_rlhf.micro_batches import MicroBatch
from ppo_rlhf.model_card import model_card
from ppo_rlhf.models import (
    context_length,
    disable_dropout,
    frozen_copy,
    load_value_head,
    save_policy,
    use_quick_kernels,
)
from ppo_rlhf.policy import PolicyWithValue, TokenValues
from ppo_rlhf.prompts import Prompts
from ppo_rlhf.references import is_reference
from ppo_rlhf.rewards import RewardFunction, RewardModel, load_reward, models_in
from ppo_rlhf.sampling import check_stop_ids, stop_ids_of
from ppo_rlhf.train.extensions import Extensions, load_extensions
from ppo_rlhf.train.inputs import load_reference, named, policy_with_tokenizer
from ppo_rlhf.train.pretraining import load_texts


@dataclass(frozen=True)
class Parts:
    """Models, prompts and rewards of a run."""

    model: PolicyWithValue
    tokenizer: PreTrainedTokenizerBase
    reference: PreTrainedModel
    reward: RewardFunction
    gold: RewardFunction | None
    prompts: Prompts
    eval_prompts: Prompts
    micro_batch: MicroBatch  # of all passes whose memory grows with the rows
    texts: Sequence[Example]  # of PPO-ptx
    extensions: Extensions

    def rows_of(self, step: int, config: PPOConfig) -> list[int]:
        """The prompts of a step's rollout, each as often as it gets responses, in a row."""
        group = config.responses_per_prompt
        size = config.batch_size // group
        return stream(len(self.prompts), step * size, (step + 1) * size, config.seed).repeat_interleave(group).tolist()

    def save_policy(self, path: Path, config: PPOConfig, outcome: Mapping[str, float]) -> None:
        """The policy as a folder that plain transformers loads and samples from as the run did, with its card."""
        save_policy(
            self.model.language_model,
            self.tokenizer,
            path,
            temperature=config.sampling.temperature,
            stop_ids=stop_ids_of(config.sampling, self.tokenizer),
            merge=config.lora.merge,
        )
        (path / "README.md").write_text(model_card("ppo", config.policy, outcome), encoding="utf-8")


def load_parts(
    config: PPOConfig,
    accelerator: Accelerator,
    policy: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    reference: PreTrainedModel | None,
    reward: RewardFunction | None,
    gold: RewardFunction | None,
    prompts: Iterable[dict[str, Any]] | None,
    extensions: Extensions | None = None,
) -> Parts:
    """Loads and checks all that the configuration names, before anything is written."""
    if config.batch_size % (accelerator.num_processes * config.ppo.num_minibatches):
        raise UserError(
            f"batch_size={config.batch_size} does not divide between {accelerator.num_processes} processes × "
            f"ppo.num_minibatches={config.ppo.num_minibatches}."
        )
    if config.batch_size % (accelerator.num_processes * config.responses_per_prompt):
        raise UserError(
            f"batch_size={config.batch_size} does not divide between {accelerator.num_processes} processes × "
            f"responses_per_prompt={config.responses_per_prompt}."
        )
    if config.pretraining.data is not None and config.pretraining.batch_size % accelerator.num_processes:
        raise UserError(
            f"pretraining.batch_size={config.pretraining.batch_size} does not divide between "
            f"{accelerator.num_processes} processes."
        )
    policy, tokenizer = policy_with_tokenizer(config, policy, tokenizer, what="the supervised policy to start from")
    check_stop_ids(config.sampling, tokenizer)
    ready_policy(policy, config, accelerator)
    loaded: list[nn.Module] = []  # frozen models that nobody else holds
    reward_models: list[RewardModel] = []
    if reference is None:
        reference = frozen_reference(config, policy, tokenizer)
        loaded.append(reference)
    if reward is None:
        source = named(config.reward, "reward", "a reward model's folder, or module:function")
        reward = load_reward(source, setting="reward", device=accelerator.device)
        reward_models += models_in(reward)
    if gold is None and config.gold is not None:
        gold = load_reward(config.gold, setting="gold", device=accelerator.device)
        reward_models += models_in(gold)
    for model in reward_models:
        model.batch_size = min(model.batch_size, config.ppo.micro_batch_size or model.batch_size)
        loaded.append(model.classifier)
    longest = context_length(policy) - config.sampling.max_new_tokens
    longest -= config.missing_eos.rule == "bootstrap"  # for the token after the last
    texts = load_texts(config, tokenizer, longest=context_length(policy))
    train_prompts, eval_prompts = load_prompts(config, tokenizer, prompts, longest)
    if has_adapter(policy):
        for each in loaded:
            share_weights(each.requires_grad_(False), policy)
    value_model = value_model_of(config, policy, tokenizer, reward)  # in float32, whatever the reward model becomes
    if config.frozen_precision == "bf16":
        for each in loaded:
            each.to(torch.bfloat16)
    return Parts(
        model=policy_with_value(config, policy, value_model, accelerator),
        tokenizer=tokenizer,
        reference=reference.to(accelerator.device),
        reward=reward,
        gold=gold,
        prompts=train_prompts,
        eval_prompts=eval_prompts,
        micro_batch=MicroBatch(config.ppo.micro_batch_size, accelerator, setting="ppo.micro_batch_size"),
        texts=texts,
        extensions=extensions or load_extensions(config),
    )


def frozen_reference(config: PPOConfig, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """What KL is measured to: the model that the configuration names, else the policy as it is now."""
    start = policy
    if config.reference is not None:
        trusted = config.trust_remote_code
        start = load_reference(config.reference, tokenizer, setting="reference", trust_remote_code=trusted)
    return frozen_copy(start)


def ready_policy(policy: PreTrainedModel, config: PPOConfig, accelerator: Accelerator) -> None:
    """In place: with the adapter that is to be trained, quick kernels, on its device, no dropout."""
    train_adapter(policy, config.lora)
    if has_adapter(policy) and config.frozen_precision == "bf16":
        raise UserError("frozen_precision=bf16 would round the weights that the policy's adapter shares; leave it out.")
    use_quick_kernels(policy).to(accelerator.device)
    disable_dropout(policy)


def policy_with_value(
    config: PPOConfig, policy: PreTrainedModel, value_model: TokenValues | None, accelerator: Accelerator
) -> PolicyWithValue:
    """The module that is trained: the policy with its value function, a head on its trunk or a model of its own."""
    model = PolicyWithValue(
        policy,
        value_model=value_model,
        temperature=config.sampling.temperature,
        differentiable_entropy=config.ppo.entropy_coef != 0,
        with_values=config.has_values,
    )
    source = config.value_head or config.policy
    if model.value_head is not None and source is not None and not is_reference(source):
        start_value_head(model.value_head, source, required=config.value_head is not None)
    if config.gradient_checkpointing:
        model.checkpoint_activations()
    return model.to(accelerator.device).train()  # dropout is 0; gradient checkpointing acts in this mode alone


@torch.no_grad()
def start_value_head(head: nn.Linear, source: str, *, required: bool) -> None:
    """Gives the value head the weights of the one in a folder, in place; without one it stays as it is.

    Raises UserError for one of another width, and where one is required for a folder without one.
    """
    found = load_value_head(source)
    if found is None:
        if required:
            raise UserError(f"value_head: {source} has no v_head.summary.weight; leave it out, to start from zero.")
        return
    weight, bias = found
    if weight.shape != head.weight.shape:
        raise UserError(
            f"value_head: {source} has one on hidden states of {weight.shape[-1]} numbers, and the policy's have "
            f"{head.in_features}; give one of such a policy."
        )
    head.weight.copy_(weight)
    head.bias.copy_(bias)


def value_model_of(
    config: PPOConfig, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reward: RewardFunction
) -> TokenValues | None:
    """A value model of its own where asked: it starts from the reward model, or from the policy with a zero head.

    Where the policy trains an adapter it does too, and head, on the memory of the model that it starts from.
    """
    if config.value_model == "shared":
        return None
    start: Any = policy
    if isinstance(reward, RewardModel):
        start = reward.classifier
        if reward.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise UserError(
                "value_model=separate starts from the reward model, but its vocabulary is not the policy's; "
                "use value_model=shared."
            )
    if has_adapter(policy):
        model = on_same_base(start)
        train_adapter(model, replace(config.lora, rank=rank_of(start) or rank_of(policy)))
    else:
        model = copy.deepcopy(start).requires_grad_(True)
    if isinstance(reward, RewardModel):
        values = TokenValues.from_reward_model(model, mean=reward.mean, scale=reward.scale)
    else:
        head = nn.Linear(policy.get_output_embeddings().weight.shape[1], 1, device=policy.device)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        values = TokenValues(model.base_model, head)
    disable_dropout(values)
    return values


def load_prompts(
    config: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[dict[str, Any]] | None,
    longest: int,
) -> tuple[Prompts, Prompts]:
    """Prompts to train on and held-out ones."""
    source = prompts if prompts is not None else named(config.prompts, "prompts", "rows with a column `prompt`")
    rows = load_rows(source, required=("prompt",), setting="prompts", columns=config.columns)
    if config.eval_prompts is None:
        rows, eval_rows = held_out(rows, config.eval_fraction, config.seed, setting="eval_fraction")
    else:
        eval_rows = load_rows(config.eval_prompts, required=("prompt",), setting="eval_prompts", columns=config.columns)
    if longest < 1:
        raise UserError(
            f"sampling.max_new_tokens={config.sampling.max_new_tokens} fills the model's context and leaves no room "
            "for a prompt; lower it."
        )
    limits: dict[str, Any] = {"longest": min(config.max_prompt_length or longest, longest), "too_long": config.too_long}
    training = Prompts(rows, tokenizer, setting="prompts", **limits)
    if config.batch_size // config.responses_per_prompt > len(training):
        raise UserError(
            f"batch_size={config.batch_size} is larger than the {len(training)} prompts to train on; lower it."
        )
    return training, Prompts(eval_rows[: config.max_eval_prompts], tokenizer, setting="eval_prompts", **limits)
