"""What a reward is made of, as frozen dataclasses free of torch (read by `ppo_rlhf.rewards`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ppo_rlhf.settings import Argument, require


@dataclass(frozen=True)
class RewardPart:
    """One of several rewards that are added up: Σ weight · score."""

    reward: str | tuple[str, ...]
    """A reward model's folder, module:function, or the URL of an HTTP scorer; several of them are an ensemble."""
    weight: float = 1.0
    """What its scores are multiplied by; negative: a penalty."""
    name: str | None = None
    """What it is called in the logs; null: the function's own name."""
    arguments: dict[str, Argument] = field(default_factory=dict)
    """Keyword arguments: of the function, of `RewardModel.load`, or of `HTTPReward`."""
    ensemble: Literal["mean", "min", "lower_bound"] = "mean"
    """How an ensemble's scores become one (Coste et al., 2024): their mean, the least, or mean − deviations · std."""
    deviations: float = 1.0
    """Standard deviations that lower_bound takes off for disagreement."""

    def __post_init__(self) -> None:
        require(self.reward not in ("", ()), "reward: a part names no reward.")
        require(self.deviations >= 0, f"deviations={self.deviations} must not be negative.")


RewardSource = str | tuple[RewardPart, ...]


@dataclass(frozen=True)
class ScoreShaping:
    """What becomes of a score before it is paid: normalised, clipped, lowered by the response's length, in turn."""

    normalize: Literal["none", "running", "reference"] = "none"
    """(score − mean) / std. reference: those of the starting policy's responses to held-out prompts (Ziegler et al.,
    2019, section 2.2); running: those of all responses of the run so far."""
    clip: float | None = None
    """Scores are clipped to ± this; null: not at all."""
    length_penalty: float = 0.0
    """Taken off for each token beyond free_length (Yu et al., 2025, eq. 13, is 1/cache length)."""
    free_length: int = 0
    """Tokens of a response that cost nothing."""

    def __post_init__(self) -> None:
        require(self.clip is None or self.clip > 0, f"score_shaping.clip={self.clip} must be above 0, or null.")
        require(self.length_penalty >= 0, f"score_shaping.length_penalty={self.length_penalty} must not be negative.")
        require(self.free_length >= 0, f"score_shaping.free_length={self.free_length} must not be negative.")
