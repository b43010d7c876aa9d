"""Responses to prompts with what is measured of them, as the evaluation in a run and the one after it do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_rlhf.policy import response_logprobs
from ppo_rlhf.prompts import PromptBatch, Prompts
from ppo_rlhf.rewards import RewardFunction, Scores
from ppo_rlhf.rollout import in_pieces, inputs_of
from ppo_rlhf.sampling import Responses, sample
from ppo_rlhf.settings import SamplingSettings
from ppo_rlhf.train.scoring import scores_of


@dataclass(frozen=True)
class Measured:
    """Responses, a row each."""

    prompts: PromptBatch
    responses: Responses
    scores: dict[str, Scores]  # by each reward, under its name
    logprobs: Tensor | None  # (B, T) under the policy, where there is a reference
    ref_logprobs: Tensor | None  # (B, T) under the reference

    @property
    def log_ratio(self) -> Tensor | None:
        """log(π/π_ref) of each token, (B, T), where there is a reference; its sum is a response's KL."""
        if self.logprobs is None or self.ref_logprobs is None:
            return None
        return torch.where(self.responses.mask, self.logprobs - self.ref_logprobs, 0)

    def rows(self) -> list[dict[str, Any]]:
        """Each response as a row of samples.jsonl. Scores are raw, KL is in nats."""
        responses, log_ratio = self.responses, self.log_ratio
        kl = None if log_ratio is None else log_ratio.sum(1).tolist()
        lengths, finished = responses.mask.sum(1).tolist(), responses.finished.tolist()
        found: list[dict[str, Any]] = []
        for row, response in enumerate(responses.texts):
            scores: dict[str, Any] = {}
            for name, each in self.scores.items():
                scores[name] = float(each.total[row])
                if name == "score" and len(each.parts) > 1:
                    scores["score_parts"] = each.parts_of(row)
            found.append(
                {
                    "prompt": self.prompts.texts[row],
                    "response": response,
                    **scores,
                    **({} if kl is None else {"kl": kl[row]}),
                    "length": lengths[row],
                    "finished": finished[row],
                }
            )
        return found


@torch.no_grad()
def measure(
    prompts: Prompts,
    numbers: Sequence[int],
    noise: Tensor,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: SamplingSettings,
    *,
    reference: PreTrainedModel | None,
    rewards: Mapping[str, RewardFunction],
    must_be_finite: bool,
    micro_batch_size: int | None = None,
) -> Measured:
    """Samples a response to each of these prompts by its line of noise, and scores it by each of the rewards.

    must_be_finite: a score that is not raises UserError. micro_batch_size: responses of one forward, for memory alone;
    None: all.
    """
    batch = prompts.batch(numbers, policy.device)
    responses = sample(policy, tokenizer, batch, sampling, noise)
    columns = prompts.columns_of(numbers)
    scores = {
        name: scores_of(reward, batch.texts, responses, columns, tokenizer, must_be_finite=must_be_finite)
        for name, reward in rewards.items()
    }
    if reference is None:
        return Measured(batch, responses, scores, None, None)
    pieces = in_pieces(inputs_of(batch, responses), micro_batch_size)
    logprobs, ref_logprobs = (
        torch.cat([response_logprobs(model, piece, temperature=sampling.temperature) for piece in pieces])
        for model in (policy, reference)
    )
    return Measured(batch, responses, scores, logprobs, ref_logprobs)
