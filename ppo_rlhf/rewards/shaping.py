"""From the scores that a reward gave to those that are paid: normalised, clipped, lowered by length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ppo_rlhf.core import masked_moments, merged_moments
from ppo_rlhf.core.masked import EPSILON, SumAcross
from ppo_rlhf.errors import UserError
from ppo_rlhf.reward_settings import ScoreShaping
from ppo_rlhf.rewards.functions import Scores

ScoreMoments = tuple[float, float, float]  # mean, variance, and the number of scores that they are of


def reference_moments(before: Mapping[str, float], count: int) -> ScoreMoments:
    """Those of the starting policy, from its evaluation on `count` held-out prompts.

    Raises UserError for scores without spread, by which nothing can be scaled.
    """
    mean, std = before["eval/score"], before["eval/score_std"]
    if is_constant(mean, std):
        raise UserError(
            f"score_shaping.normalize=reference: the starting policy's {count} held-out scores are all {mean:g}, and "
            "have no standard deviation to divide by; use none, or running."
        )
    return mean, std**2, count


def is_constant(mean: float, std: float) -> bool:
    """Whether scores of this mean and standard deviation differ by no more than what float32 rounds."""
    return std <= 1e-6 * max(1.0, abs(mean))


def with_batch(moments: ScoreMoments, scores: Tensor, *, sum_across: SumAcross) -> ScoreMoments:
    """The moments with those of a batch of scores (B,), over all processes; what is not finite is left out."""
    batch = masked_moments(scores.double(), scores.isfinite(), sum_across=sum_across)
    mean, variance, count = (batch[0].new_tensor(number) for number in moments)
    mean, variance, count = merged_moments((mean, variance, count), batch)
    return float(mean), float(variance), float(count)


def shaped(scores: Scores, lengths: Tensor, settings: ScoreShaping, moments: ScoreMoments) -> Scores:
    """(score − mean) / √(variance + 1e-8), clipped, less the penalty of each token beyond the free ones.

    lengths (B,) in tokens. A dense reward is scaled alike, and keeps its shape over the response: what the score was
    shifted, clipped and lowered by is for its last token to settle (`kl_shaped_rewards`).
    """
    total, dense = scores.total, scores.dense
    if settings.normalize != "none":
        mean, variance, _ = moments
        scale = (variance + EPSILON) ** -0.5
        total = (total - mean) * scale
        dense = None if dense is None else dense * scale
    if settings.clip is not None:
        total = total.clamp(-settings.clip, settings.clip)
    total = total - settings.length_penalty * (lengths - settings.free_length).clamp(min=0)
    return replace(scores, total=total, dense=dense)
