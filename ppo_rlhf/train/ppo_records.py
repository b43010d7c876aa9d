"""What a PPO step leaves behind: metrics by their standard names, samples with their per-token numbers, and times."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_rlhf.compute import Compute, num_multiplied
from ppo_rlhf.config import PPOConfig
from ppo_rlhf.core import Experience, explained_variance, masked_moments, masked_sum
from ppo_rlhf.models import evaluating, has_plain_head
from ppo_rlhf.packing import can_pack
from ppo_rlhf.policy import PolicyWithValue, ResponseTokens
from ppo_rlhf.prompts import PromptBatch
from ppo_rlhf.rewards import Scores
from ppo_rlhf.rollout import Rollout
from ppo_rlhf.sampling import Responses

SAMPLES_PER_STEP = 2
DIGITS = 6  # of per-token numbers in samples.jsonl
REPLACEMENT = "\ufffd"  # what bytes decode to that are no character
LONGEST_RUN = 8  # tokens: two characters of four bytes


class Clock:
    """Seconds by phase of one rollout and its update."""

    def __init__(self, laps: Mapping[str, float] | None = None) -> None:
        """laps: what has passed of each phase already."""
        self.laps: dict[str, float] = dict(laps or {})
        self.go_on()

    def go_on(self) -> None:
        """What passed since the last lap belongs to no phase of this rollout."""
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """The time since the last lap belongs to this phase, and what a GPU has still to do."""
        if torch.cuda.is_initialized():  # pragma: no cover - needs a GPU, and a run that uses it
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps[phase] = now - self._last
        self._last = now

    def metrics(self, tokens: float) -> dict[str, float]:
        """Seconds by phase, and response tokens a second over all of them."""
        seconds = {f"time/{phase}": x for phase, x in self.laps.items()}
        return {**seconds, "tokens_per_second": tokens / sum(seconds.values())}


def rollout_metrics(
    rollout: Rollout,
    experience: Experience,
    scores: Scores,
    gold: Scores | None,
    rewards: Tensor,
    responses: Responses,
    config: PPOConfig,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Means over the global batch: of responses for `objective/…` and `response/…`, in nats and tokens a response.

    `objective/score_std` is the scores' standard deviation. `sampler/logprob_difference` is the mean over tokens of
    |log π as the sampler told it − log π by the policy's own forward|, in nats.
    """
    mask, device = rollout.mask, accelerator.device
    log_ratio = torch.where(mask, rollout.logprobs - rollout.ref_logprobs, 0)
    sums = {
        "objective/score": scores.total.sum(),
        "objective/kl": log_ratio.sum(),
        "objective/reward": masked_sum(rewards, mask),
        "response/length": mask.sum(),
        "response/stop_rate": responses.finished.sum(),
        "response/repetition": repetition(responses.ids, mask).sum(),
    }
    if responses.logprobs is not None:
        difference = torch.where(mask, responses.logprobs - rollout.logprobs, 0)
        sums["sampler/logprob_difference"] = difference.abs().sum()
    if len(scores.parts) > 1:
        sums |= {f"objective/score/{name}": part.sum() for name, part in scores.parts.items()}
    if gold is not None:
        sums["objective/gold_score"] = gold.total.sum()
    count = torch.tensor(len(mask), device=device)
    *totals, responses_total = accelerator.reduce(
        torch.stack([value.to(device, torch.float64) for value in [*sums.values(), count]])
    ).tolist()
    scored = torch.ones_like(scores.total, dtype=torch.bool)
    _, score_variance, _ = masked_moments(scores.total.double(), scored, sum_across=accelerator.reduce)
    metrics = {name: total / responses_total for name, total in zip(sums, totals, strict=True)}
    if responses.logprobs is not None:
        metrics["sampler/logprob_difference"] /= metrics["response/length"]
    metrics["objective/score_std"] = float(score_variance.sqrt())
    if config.has_values:
        explained = explained_variance(experience.values, experience.returns, mask, sum_across=accelerator.reduce)
        metrics["value/explained_variance"] = float(explained)
    return metrics


def repetition(ids: Tensor, mask: Tensor) -> Tensor:
    """Of each response the share of its pairs of neighbouring tokens that it had before. ids, mask (B, T) → (B,).

    0 for a response without a pair. Rises towards 1 as a response goes round in circles.
    """
    paired = mask[:, 1:] & mask[:, :-1]
    numbers = ids[:, :-1] * 2**32 + ids[:, 1:]  # one for each pair
    alone = -1 - torch.arange(paired.shape[1], device=ids.device)  # equal to no other
    ordered = torch.where(paired, numbers, alone).sort(dim=1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]).sum(1)
    return repeated / paired.sum(1).clamp(min=1)


def throughput_metrics(
    rollout: Rollout,
    metrics: dict[str, float],
    model: PolicyWithValue,
    reference: PreTrainedModel,
    config: PPOConfig,
    compute: Compute,
) -> dict[str, float]:
    """How fast this process was, from its rollout and the metrics of its clock and its update.

    sampled, trained: response tokens a second, of sampling and of the update, in which each counts once an epoch.
    matmul_share: model FLOPs of sampling, evaluation and update ÷ (their seconds · the measured peak of a product).
    padding: share of the padded batch that is no token; computed_padding: what linear layers computed of it
    after all.
    """
    tokens = ResponseTokens.of(rollout.inputs)
    real, responded = len(tokens.packing), len(tokens.cells)
    epochs = metrics["optimizer_steps"] / config.ppo.num_minibatches
    padding = 1 - real / (tokens.packing.shape[0] * (tokens.packing.shape[1] - 1))
    packed = has_plain_head(model.language_model) and can_pack(model.language_model.base_model, tokens.packing.width)
    dummies = 1 - real / tokens.packing.ids.shape[1]
    seconds = sum(metrics[f"time/{phase}"] for phase in ("sample", "evaluate", "update"))
    flops = model_flops(model, reference, num_tokens=real, num_responded=responded, num_epochs=epochs)
    return {
        "throughput/sampled": responded / metrics["time/sample"],
        "throughput/trained": responded * epochs / metrics["time/update"],
        "throughput/matmul_share": flops / (seconds * compute.peak_flops),
        "throughput/padding": padding,
        "throughput/computed_padding": dummies if packed else padding,
    }


def model_flops(
    model: PolicyWithValue, reference: PreTrainedModel, *, num_tokens: int, num_responded: int, num_epochs: float
) -> float:
    """Floating point operations that a rollout and its update need, by the weights that multiply a token:

        2·(W·N + H·K) a forward pass, three times that with its backward pass

    W: weights of a transformer's matrices, embeddings aside; H: of its head; N tokens, K of them responded. Sampling,
    the old policy and the reference are a forward pass each, an epoch is one with its backward pass, and a value model
    of its own has passes of its own. Attention's products of activations, recomputation and rewards are left out.
    """

    def forward(trunk: nn.Module, head: int) -> float:
        return 2.0 * (num_multiplied(trunk) * num_tokens + head * num_responded)

    policy = forward(model.language_model.base_model, _head_size(model.language_model))
    total = policy * (2 + 3 * num_epochs) + forward(reference.base_model, _head_size(reference))
    if model.value_model is not None:
        total += forward(model.value_model.trunk, model.value_model.head.weight.numel()) * (1 + 3 * num_epochs)
    return total


def _head_size(model: PreTrainedModel) -> int:
    head: Any = model.get_output_embeddings()
    return head.weight.numel()


def multiplied_type(accelerator: Accelerator) -> torch.dtype:
    """In which forward passes multiply."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)


@torch.no_grad()
def recorded_logprobs(policy: nn.Module, rollout: Rollout) -> Tensor:
    """log π of the responses that samples.jsonl records, by the policy as it is now. → (SAMPLES_PER_STEP, T).

    In evaluation mode, so that nothing random is drawn and a run with or without it trains the same.
    """
    with evaluating(policy):
        inputs = {name: tensor[:SAMPLES_PER_STEP] for name, tensor in rollout.inputs.items()}
        return policy(**inputs, only="decisions").logprobs


def sample_rows(
    step: int,
    prompts: PromptBatch,
    responses: Responses,
    scores: Scores,
    gold: Scores | None,
    rollout: Rollout,
    rewards: Tensor,
    experience: Experience,
    after_epochs: Sequence[Tensor],
    tokenizer: PreTrainedTokenizerBase,
    *,
    kl_coef: float,
) -> list[dict[str, Any]]:
    """The first few responses of a rollout, with everything PPO knew of each of their tokens.

    after_epochs: log π after each epoch of the update, (SAMPLES_PER_STEP, T) each.
    """
    per_token = {
        "logprobs": rollout.logprobs,
        "ref_logprobs": rollout.ref_logprobs,
        "entropy": rollout.entropy,
        "values": experience.values,
        "rewards": rewards,
        "advantages": experience.advantages,
        "returns": experience.returns,
    }
    whole = {"score": scores.total, "kl": torch.where(rollout.mask, rollout.logprobs - rollout.ref_logprobs, 0).sum(1)}
    whole |= {"gold_score": gold.total} if gold is not None else {}
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
                **{name: round(float(tensor[row]), DIGITS) for name, tensor in whole.items()},
                "kl_coef": kl_coef,
                **token_numbers(row, responses, per_token, tokenizer),
                "new_logprobs": [_rounded(logprobs[row][kept]) for logprobs in after_epochs],
            }
        )
    return rows


def token_numbers(
    row: int, responses: Responses, per_token: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """One response's ids, its tokens as text, and its share of each (B, T) tensor; `fragments` where there are some."""
    kept = responses.mask[row]
    ids = responses.ids[row][kept].tolist()
    found = fragments(ids, tokenizer)
    return {
        "ids": ids,
        "tokens": [tokenizer.decode([token]) for token in ids],
        **({"fragments": found} if found else {}),
        **{name: _rounded(tensor[row][kept]) for name, tensor in per_token.items()},
    }


def fragments(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int, str]]:
    """Runs of tokens that are characters only together, as the bytes of 你 in three: (first, how many, their text).

    A token alone reads as U+FFFD there. Bytes that make no character with any of the few that follow are left out.
    """
    found = []
    start = 0
    while start < len(ids):
        size = 1
        if REPLACEMENT in tokenizer.decode([ids[start]]):
            texts = {size: str(tokenizer.decode(ids[start : start + size])) for size in range(2, LONGEST_RUN + 1)}
            size = next((size for size, text in texts.items() if REPLACEMENT not in text), 1)
            if size > 1:
                found.append((start, size, texts[size]))
        start += size
    return found


def _rounded(numbers: Tensor) -> list[float]:
    return [round(number, DIGITS) for number in numbers.tolist()]
