"""What a PPO run works with: loaded and checked before anything is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_rlhf.config import PPOConfig
from ppo_rlhf.data import held_out, load_rows, stream
from ppo_rlhf.errors import UserError
from ppo_rlhf.models import (
    context_length,
    disable_dropout,
    frozen_copy,
    load_policy,
    save_policy,
    use_quick_kernels,
)
from ppo_rlhf.policy import PolicyWithValue, TokenValues
from ppo_rlhf.prompts import Prompts
from ppo_rlhf.rewards import RewardFunction, RewardModel, load_reward, models_in
from ppo_rlhf.sampling import stop_ids_of
from ppo_rlhf.train.inputs import named, policy_with_tokenizer
from ppo_rlhf.train.pretraining import load_texts
from ppo_rlhf.train.sft import Demonstration


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
    texts: list[Demonstration]  # of PPO-ptx

    def rows_of(self, step: int, config: PPOConfig) -> list[int]:
        """The prompts of a step's rollout, each as often as it gets responses, in a row."""
        group = config.responses_per_prompt
        size = config.batch_size // group
        return stream(len(self.prompts), step * size, (step + 1) * size, config.seed).repeat_interleave(group).tolist()

    def save_policy(self, path: Path, config: PPOConfig) -> None:
        """The policy as a folder that plain transformers loads and samples from as the run did."""
        save_policy(
            self.model.language_model,
            self.tokenizer,
            path,
            temperature=config.sampling.temperature,
            stop_ids=stop_ids_of(config.sampling, self.tokenizer),
        )


def load_parts(
    config: PPOConfig,
    accelerator: Accelerator,
    policy: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    reference: PreTrainedModel | None,
    reward: RewardFunction | None,
    gold: RewardFunction | None,
    prompts: Iterable[dict[str, Any]] | None,
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
    use_quick_kernels(policy).to(accelerator.device)
    disable_dropout(policy)
    loaded: list[nn.Module] = []  # frozen models that nobody else holds
    if reference is None:
        start = policy
        if config.reference is not None:
            trusted = config.trust_remote_code
            start, _ = load_policy(config.reference, setting="reference", trust_remote_code=trusted)
        reference = frozen_copy(start)
        loaded.append(reference)
    if reward is None:
        source = named(config.reward, "reward", "a reward model's folder, or module:function")
        reward = load_reward(source, setting="reward", device=accelerator.device)
        loaded += [model.network for model in models_in(reward)]
    if gold is None and config.gold is not None:
        gold = load_reward(config.gold, setting="gold", device=accelerator.device)
        loaded += [model.network for model in models_in(gold)]
    longest = context_length(policy) - config.sampling.max_new_tokens
    longest -= config.missing_eos.rule == "bootstrap"  # for the token after the last
    texts = load_texts(config, tokenizer, longest=context_length(policy))
    train_prompts, eval_prompts = load_prompts(config, tokenizer, prompts, longest)
    value_model = value_model_of(config, policy, tokenizer, reward)  # in float32, whatever the reward model becomes
    if config.frozen_precision == "bf16":
        for each in loaded:
            each.to(torch.bfloat16)
    model = PolicyWithValue(
        policy,
        value_model=value_model,
        temperature=config.sampling.temperature,
        differentiable_entropy=config.ppo.entropy_coef != 0,
        with_values=config.advantage == "gae",
    )
    if config.gradient_checkpointing:
        model.checkpoint_activations()
    model.to(accelerator.device).train()  # dropout is 0; gradient checkpointing acts in this mode alone
    return Parts(
        model=model,
        tokenizer=tokenizer,
        reference=reference.to(accelerator.device),
        reward=reward,
        gold=gold,
        prompts=train_prompts,
        eval_prompts=eval_prompts,
        texts=texts,
    )


def value_model_of(
    config: PPOConfig, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reward: RewardFunction
) -> TokenValues | None:
    """A value model of its own where asked: it starts from the reward model, or from the policy with a zero head."""
    if config.value_model == "shared":
        return None
    if isinstance(reward, RewardModel):
        classifier = frozen_copy(reward.classifier)
        if reward.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise UserError(
                "value_model=separate starts from the reward model, but its vocabulary is not the policy's; "
                "use value_model=shared."
            )
        values = TokenValues.from_reward_model(classifier, mean=reward.mean, scale=reward.scale)
    else:
        trunk = frozen_copy(policy).base_model
        head = nn.Linear(policy.get_output_embeddings().weight.shape[1], 1, device=policy.device)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        values = TokenValues(trunk, head)
    disable_dropout(values)
    return values.requires_grad_(True)


def load_prompts(
    config: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[dict[str, Any]] | None,
    longest: int,
) -> tuple[Prompts, Prompts]:
    """Prompts to train on and held-out ones."""
    source = prompts if prompts is not None else named(config.prompts, "prompts", "rows with a column `prompt`")
    rows = load_rows(source, required=("prompt",), setting="prompts")
    if config.eval_prompts is None:
        rows, eval_rows = held_out(rows, config.eval_fraction, config.seed, setting="eval_fraction")
    else:
        eval_rows = load_rows(config.eval_prompts, required=("prompt",), setting="eval_prompts")
    if config.batch_size // config.responses_per_prompt > len(rows):
        raise UserError(f"batch_size={config.batch_size} is larger than the {len(rows)} prompts to train on; lower it.")
    if longest < 1:
        raise UserError(
            f"sampling.max_new_tokens={config.sampling.max_new_tokens} fills the model's context and leaves no room "
            "for a prompt; lower it."
        )
    return (
        Prompts(rows, tokenizer, longest=longest, setting="prompts"),
        Prompts(eval_rows[: config.max_eval_prompts], tokenizer, longest=longest, setting="eval_prompts"),
    )
