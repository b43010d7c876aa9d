"""What a PPO step leaves behind: metrics by their standard names, samples with their per-token numbers, and times."""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ppo_rlhf.core import Experience, explained_variance, masked_sum
from ppo_rlhf.prompts import PromptBatch
from ppo_rlhf.rollout import Rollout
from ppo_rlhf.sampling import Responses

SAMPLES_PER_STEP = 2
DIGITS = 5  # of per-token numbers in samples.jsonl


class Clock:
    """Seconds by phase of one step."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """The time since the last lap belongs to this phase."""
        now = time.perf_counter()
        self._laps[f"time/{phase}"] = now - self._last
        self._last = now

    def metrics(self, tokens: float) -> dict[str, float]:
        """Seconds by phase, and response tokens a second over all of them."""
        return {**self._laps, "tokens_per_second": tokens / (self._last - self._start)}


def rollout_metrics(
    rollout: Rollout,
    experience: Experience,
    scores: Tensor,
    gold: Tensor | None,
    rewards: Tensor,
    responses: Responses,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Means over the global batch: of responses for `objective/…` and `response/…`, in nats and tokens a response."""
    mask, device = rollout.mask, accelerator.device
    log_ratio = torch.where(mask, rollout.logprobs - rollout.ref_logprobs, 0)
    sums = {
        "objective/score": scores.sum(),
        "objective/kl": log_ratio.sum(),
        "objective/reward": masked_sum(rewards, mask),
        "response/length": mask.sum(),
        "response/stop_rate": responses.finished.sum(),
    }
    if gold is not None:
        sums["objective/gold_score"] = gold.sum()
    count = torch.tensor(len(mask), device=device)
    *totals, responses_total = accelerator.reduce(
        torch.stack([value.to(device, torch.float64) for value in [*sums.values(), count]])
    ).tolist()
    explained = explained_variance(experience.values, experience.returns, mask, sum_across=accelerator.reduce)
    return {
        **{name: total / responses_total for name, total in zip(sums, totals, strict=True)},
        "value/explained_variance": float(explained),
    }


def sample_rows(
    step: int,
    prompts: PromptBatch,
    responses: Responses,
    scores: Tensor,
    rollout: Rollout,
    rewards: Tensor,
    experience: Experience,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    """The first few responses of a rollout, with everything PPO knew of each of their tokens."""
    per_token = {
        "logprobs": rollout.logprobs,
        "ref_logprobs": rollout.ref_logprobs,
        "entropy": rollout.entropy,
        "values": experience.values,
        "rewards": rewards,
        "advantages": experience.advantages,
        "returns": experience.returns,
    }
    rows = []
    for row in range(min(SAMPLES_PER_STEP, len(prompts))):
        kept = responses.mask[row]
        rows.append(
            {
                "step": step,
                "kind": "rollout",
                "prompt": prompts.texts[row],
                "response": responses.texts[row],
                "finished": bool(responses.finished[row]),
                "score": round(float(scores[row]), DIGITS),
                "tokens": [tokenizer.decode([token]) for token in responses.ids[row][kept].tolist()],
                **{
                    name: [round(value, DIGITS) for value in tensor[row][kept].tolist()]
                    for name, tensor in per_token.items()
                },
            }
        )
    return rows
