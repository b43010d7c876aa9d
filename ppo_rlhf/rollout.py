"""Prompts and responses evaluated: log-probabilities under policy and reference, and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ppo_rlhf.core import Evaluation
from ppo_rlhf.policy import Inputs, response_logprobs
from ppo_rlhf.prompts import PromptBatch
from ppo_rlhf.sampling import Responses


@dataclass(frozen=True)
class Rollout:
    """What PPO knows of its responses before they are scored."""

    inputs: Inputs  # name → (B, …): the policy's keyword arguments
    logprobs: Tensor  # (B, T) under the policy that sampled
    ref_logprobs: Tensor  # (B, T) under the reference
    values: Tensor  # (B, T+1), the last column 0, for nothing follows a response, but what it is worth to go on
    entropy: Tensor  # (B, T)
    mask: Tensor  # (B, T)


def inputs_of(prompts: PromptBatch, responses: Responses) -> Inputs:
    """The policy's keyword arguments: prompts left-padded, responses right-padded."""
    return {
        "prompt_ids": prompts.ids,
        "prompt_mask": prompts.mask,
        "response_ids": responses.ids,
        "response_mask": responses.mask,
    }


def in_pieces(inputs: Inputs, size: int | None) -> list[Inputs]:
    """The same in pieces of so many rows each, for memory alone; None: in one."""
    rows = len(inputs["response_ids"])
    size = size or rows
    return [{name: x[start : start + size] for name, x in inputs.items()} for start in range(0, rows, size)]


@torch.no_grad()
def evaluate(
    policy: Callable[..., Evaluation],
    reference: PreTrainedModel,
    prompts: PromptBatch,
    responses: Responses,
    *,
    temperature: float,
    batch_size: int,
    bootstrap: bool = False,
) -> Rollout:
    """Evaluates the responses in batches, by the same forward that the update uses, so that its first ratio is 1.

    bootstrap: the value after the last token of a response that was cut off is wanted too.
    """
    inputs, width = inputs_of(prompts, responses), responses.mask.shape[1]
    evaluations, ref_logprobs = [], []
    for piece, finished in zip(in_pieces(inputs, batch_size), responses.finished.split(batch_size), strict=True):
        evaluations.append(policy(**(one_more(piece, ~finished) if bootstrap else piece)))
        ref_logprobs.append(response_logprobs(reference, piece, temperature=temperature))
    values = torch.cat([evaluation.values for evaluation in evaluations])
    return Rollout(
        inputs=inputs,
        logprobs=torch.cat([evaluation.logprobs[:, :width] for evaluation in evaluations]),
        ref_logprobs=torch.cat(ref_logprobs),
        values=values if bootstrap else F.pad(values, (0, 1)),
        entropy=torch.cat([evaluation.entropy[:, :width] for evaluation in evaluations]),
        mask=responses.mask,
    )


def one_more(inputs: Inputs, cut_off: Tensor) -> Inputs:
    """The same with a token more behind each response that was cut off (B,): never read, but predicted from the state
    after the last token, whose value so is computed. A response that was cut off fills all T places.
    """
    return {
        **inputs,
        "response_ids": F.pad(inputs["response_ids"], (0, 1)),
        "response_mask": torch.cat([inputs["response_mask"], cut_off[:, None]], dim=1),
    }
