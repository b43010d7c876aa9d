"""Which responses of a rollout spoilt its update: for bad_samples.jsonl."""

from __future__ import annotations

from typing import Any

import torch

from ppo_rlhf.core import Experience
from ppo_rlhf.prompts import PromptBatch
from ppo_rlhf.rollout import Rollout
from ppo_rlhf.run import SAMPLES_KEPT, gathered
from ppo_rlhf.sampling import Responses


def bad_samples(
    step: int,
    prompts: PromptBatch,
    responses: Responses,
    scores: torch.Tensor,
    rollout: Rollout,
    experience: Experience,
) -> list[dict[str, Any]]:
    """The worst responses of an update with steps that were skipped, over all processes, with what is bad about each.

    Those with a number that is not finite; where all are, only a gradient was not, and the largest returns come first.
    """
    mask = rollout.mask
    finite = {
        "score": scores.isfinite(),
        "log-ratio": torch.where(mask, rollout.logprobs - rollout.ref_logprobs, 0).isfinite().all(1),
        "value": torch.where(mask, experience.values, 0).isfinite().all(1),
    }
    size = torch.where(mask, experience.returns, 0).abs().amax(1).nan_to_num(torch.inf)
    size = torch.where(torch.stack(list(finite.values())).all(0), size, torch.inf)
    rows = []
    for row in size.argsort(descending=True, stable=True)[:SAMPLES_KEPT].tolist():
        kept = mask[row]
        bad = [name for name, whole in finite.items() if not whole[row]]
        rows.append(
            {
                "step": step,
                "bad": bad or ["gradient"],
                "prompt": prompts.texts[row],
                "response": responses.texts[row],
                "score": float(scores[row]),
                "ids": responses.ids[row][kept].tolist(),
                "logprobs": rollout.logprobs[row][kept].tolist(),
                "ref_logprobs": rollout.ref_logprobs[row][kept].tolist(),
                "values": experience.values[row][kept].tolist(),
                "returns": experience.returns[row][kept].tolist(),
            }
        )
    rows = gathered(rows)
    named = [row for row in rows if row["bad"] != ["gradient"]]
    return (named or rows)[:SAMPLES_KEPT]
