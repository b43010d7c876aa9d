"""What an evaluation measures, as a frozen dataclass free of torch (read by `ppo_rlhf.evaluate`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ppo_rlhf.reward_settings import RewardSource
from ppo_rlhf.settings import require


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured of policies, with 95 % intervals."""

    prompts: str | None = None
    """Rows with `prompt` to respond to; null: those that the run held out."""
    num_prompts: int = 512
    """At most so many of them, the first ones (PPO's max_eval_prompts)."""
    samples: int = 1
    """Responses to each prompt."""
    reward: RewardSource | None = None
    """What scores them: all that `reward` may be in PPO (docs/rewards.md); null: the run's own."""
    gold: str | None = None
    """A true reward, likewise; null: the run's own, where it has one."""
    reference: str | None = None
    """The policy that KL is measured to; null: the one that a PPO run started from."""
    best_of: int = 0
    """What the best of 1, 2, 4, … and so many responses would score: of the reference, or of the policy where there is
    none; 0 leaves it out."""
    against: str | None = None
    """Another run or policy, for a win rate: by the reward, the gold one and the judge."""
    judge: str | None = None
    """module:function called as function(prompts, a, b) -> "a", "b" or "tie" for each, in both orders."""
    text: str | None = None
    """Held-out text for the perplexity: rows of any format that sft reads."""
    best: bool = False
    """The best policy of a PPO run's evaluations, not the final one."""
    step: int | None = None
    """The policy of the run's checkpoint of this step, not the final one."""
    temperature: float | None = None
    """Of sampling; null: the run's."""
    max_new_tokens: int | None = None
    """Tokens at which a response is cut off; null: the run's."""
    trust_remote_code: bool = False
    """Let a model's own Python code run. Only for models whose code you have read."""
    seed: int = 0
    """The samples and the bootstrap follow from it."""
    output: str | None = None
    """A JSONL file for a row of each prompt; written whole or not at all."""

    def __post_init__(self) -> None:
        require(self.num_prompts >= 2, f"num_prompts={self.num_prompts} must be at least 2, for an interval.")
        require(self.samples >= 1, f"samples={self.samples} must be at least 1.")
        require(self.best_of >= 0, f"best_of={self.best_of} must not be negative; 0 leaves it out.")
        require(self.step is None or not self.best, f"step={self.step} and best name two policies; give one of them.")
        require(self.step is None or self.step >= 0, f"step={self.step} must not be negative.")
        require(self.judge is None or self.against is not None, f"judge={self.judge} needs --against: whom to beat.")
        heat = self.temperature
        require(heat is None or 0 < heat < math.inf, f"temperature={heat} must be above 0, and finite.")
        tokens = self.max_new_tokens
        require(tokens is None or tokens >= 1, f"max_new_tokens={tokens} must be at least 1.")
        require(0 <= self.seed < 2**32, f"seed={self.seed} must lie between 0 and 2**32 - 1.")
