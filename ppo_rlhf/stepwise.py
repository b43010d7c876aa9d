"""PPO for those who own their loop: `generate`, `update`, and `evaluate` on explicit prompts, responses and scores.

The numbers are those of `ppo_rlhf.train.ppo`, whose functions do the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_rlhf.config import PPOConfig
from ppo_rlhf.errors import UserError
from ppo_rlhf.micro_batches import MicroBatch
from ppo_rlhf.models import right_padded, save_policy
from ppo_rlhf.optimizer import learning_rate, make_optimizer, set_learning_rate
from ppo_rlhf.prompts import PromptBatch
from ppo_rlhf.rewards import Scores
from ppo_rlhf.rollout import Rollout
from ppo_rlhf.run import LoopState, make_accelerator, whole_weights
from ppo_rlhf.sampling import Responses, responses_of, stop_ids_of
from ppo_rlhf.seeding import uniform_rows
from ppo_rlhf.train.extensions import load_extensions
from ppo_rlhf.train.inputs import policy_with_tokenizer
from ppo_rlhf.train.ppo import evaluate_fitting, improve, next_kl_coef
from ppo_rlhf.train.ppo_parts import frozen_reference, policy_with_value, ready_policy
from ppo_rlhf.train.ppo_records import rollout_metrics

Texts = Sequence[str] | Sequence[Sequence[int]]  # or their token ids, which are taken as they are


class PPO:
    """A policy with a value head on its trunk, its reference, and their optimizer, over the steps of a loop.

    >>> ppo = PPO(PPOConfig(policy="gpt2"))
    >>> responses = ppo.generate(prompts)
    >>> metrics = ppo.update(prompts, responses, scores)
    """

    def __init__(
        self,
        config: PPOConfig,
        *,
        policy: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        reference: PreTrainedModel | None = None,
    ) -> None:
        """policy with tokenizer, reference: objects that take the place of the configuration's names.

        config: of it act policy and reference (where no objects are given) with chat_template and trust_remote_code,
        lora, value_head; precision, gradient_checkpointing; sampling, sampler; score_shaping (but for normalize:
        reference), missing_eos, reward_shaping, whiten_rewards, the KL penalty (a step is batch_size episodes to
        kl_target); advantage with responses_per_prompt, gamma, gae_lambda; ppo; optimizer over num_steps, value_lr.
        `seed` decides all that is random. Nothing is written. Raises UserError for what cannot be loaded.
        """
        if config.value_model != "shared":
            raise UserError("value_model=separate: a loop of your own has the value head on the policy's trunk.")
        if config.score_shaping.normalize == "reference":
            raise UserError(
                "score_shaping.normalize=reference: a loop of your own has no held-out responses to normalise by; use "
                "running, or none."
            )
        self.config = config
        self.accelerator = make_accelerator(None, precision=config.precision, log_with=())
        set_seed(config.seed)
        policy, self.tokenizer = policy_with_tokenizer(config, policy, tokenizer, what="the policy to start from")
        ready_policy(policy, config, self.accelerator)
        if reference is None:
            reference = frozen_reference(config, policy, self.tokenizer)
        self.reference = reference.to(self.accelerator.device)
        self.policy = policy_with_value(config, policy, None, self.accelerator)
        apart = self.policy.value_parameters()
        optimizer = make_optimizer(self.policy, config.optimizer, apart=apart, lr_apart=config.value_lr)
        self._model, self._optimizer = self.accelerator.prepare(self.policy, optimizer)
        self._micro_batch = MicroBatch(config.ppo.micro_batch_size, self.accelerator, setting="ppo.micro_batch_size")
        self._extensions = load_extensions(config)
        self.state = LoopState(kl_coef=config.kl_coef)

    def generate(self, prompts: Texts) -> Responses:
        """A response to each prompt, sampled from the policy as it is; the noise is that of the loop's present step."""
        batch, settings = self._prompts(prompts), self.config.sampling
        rows = list(range(len(batch)))
        noise = uniform_rows(rows, settings.max_new_tokens, self.config.seed, "sample", self.state.step)
        with self.accelerator.autocast(), whole_weights(self._model):
            return self._extensions.sampler(self.policy.language_model, self.tokenizer, batch, settings, noise)

    def evaluate(self, prompts: Texts, responses: Responses | Sequence[Sequence[int]]) -> Rollout:
        """Log-probabilities under policy and reference, values and entropies of the responses' tokens, each (B, T)."""
        batch, said = self._prompts(prompts), self._responses(responses)
        with self.accelerator.autocast():
            return evaluate_fitting(self._model, self.reference, batch, said, self._micro_batch, self.config)

    def update(
        self, prompts: Texts, responses: Responses | Sequence[Sequence[int]], scores: Sequence[float] | Tensor
    ) -> dict[str, float]:
        """One step of PPO on the responses, each paid its score; → metrics by their standard names.

        Responses of one's own are token ids, their stop token included. Raises UserError where the counts differ, or
        ppo.num_minibatches does not divide them.
        """
        config, state, device = self.config, self.state, self.accelerator.device
        said = self._responses(responses)
        if not len(prompts) == len(said.ids) == len(scores) or len(prompts) % config.ppo.num_minibatches:
            raise UserError(
                f"{len(prompts)} prompts, {len(said.ids)} responses and {len(scores)} scores: there must be as many of "
                f"each, a multiple of ppo.num_minibatches={config.ppo.num_minibatches}."
            )
        set_learning_rate(self._optimizer, learning_rate(config.optimizer, state.step, config.num_steps))
        rollout = self.evaluate(prompts, said)
        given = Scores(torch.as_tensor(scores, dtype=torch.float32, device=device), {})
        state, rewards, experience, statistics = improve(
            rollout,
            given,
            said.finished,
            state,
            self._model,
            self._optimizer,
            self._micro_batch,
            config,
            self.accelerator,
            self._extensions,
        )
        metrics = (
            rollout_metrics(rollout, experience, given, None, rewards, said, config, self.accelerator) | statistics
        )
        metrics |= {"kl_coef": state.kl_coef, "lr": self._optimizer.param_groups[0]["lr"]}
        kl_coef = next_kl_coef(state.kl_coef, metrics["objective/kl"], config)
        self.state = replace(state, step=state.step + 1, kl_coef=kl_coef)
        return metrics

    def save(self, folder: str | Path) -> None:
        """The policy as a folder that plain transformers loads and samples from as it was trained."""
        settings, stop_ids = self.config.sampling, stop_ids_of(self.config.sampling, self.tokenizer)
        with whole_weights(self._model):
            save_policy(
                self.policy.language_model,
                self.tokenizer,
                Path(folder),
                temperature=settings.temperature,
                stop_ids=stop_ids,
                merge=self.config.lora.merge,
            )

    def _prompts(self, prompts: Texts) -> PromptBatch:
        """Left-padded."""
        given: list[Any] = list(prompts)
        encoded = [self.tokenizer(each)["input_ids"] if isinstance(each, str) else _plain(each) for each in given]
        ids, mask = (x.flip(1) for x in right_padded([line[::-1] for line in encoded], self.accelerator.device))
        texts = [each if isinstance(each, str) else str(self.tokenizer.decode(_plain(each))) for each in given]
        return PromptBatch(ids, mask, texts, list(range(len(texts))))

    def _responses(self, responses: Responses | Sequence[Sequence[int]]) -> Responses:
        if isinstance(responses, Responses):
            return responses
        encoded = [_plain(line) for line in responses]
        stops = stop_ids_of(self.config.sampling, self.tokenizer)
        finished = [line[-1] in stops for line in encoded]
        return responses_of(encoded, finished, self.tokenizer, self.accelerator.device)


def _plain(ids: Any) -> list[int]:
    return ids.tolist() if isinstance(ids, Tensor) else list(ids)
