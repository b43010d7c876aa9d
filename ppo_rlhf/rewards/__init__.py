"""Rewards: functions of prompts and responses as text, models and servers that are called the same way, sums and
ensembles of them, and verifiers, which are ready functions.
"""

from ppo_rlhf.rewards.combinations import Ensemble, Weighted, WeightedSum, models_in
from ppo_rlhf.rewards.functions import RewardFunction, Scores, score, wants_tokens
from ppo_rlhf.rewards.http_reward import HTTPReward
from ppo_rlhf.rewards.load import load_reward
from ppo_rlhf.rewards.model import RewardModel, ScoringNetwork
from ppo_rlhf.rewards.shaping import ScoreMoments, is_constant, reference_moments, shaped, with_batch
from ppo_rlhf.rewards.verifiers import arithmetic, exact_match, json_schema, regular_expression

__all__ = [
    "Ensemble",
    "HTTPReward",
    "RewardFunction",
    "RewardModel",
    "ScoreMoments",
    "Scores",
    "ScoringNetwork",
    "Weighted",
    "WeightedSum",
    "arithmetic",
    "exact_match",
    "is_constant",
    "json_schema",
    "load_reward",
    "models_in",
    "reference_moments",
    "regular_expression",
    "score",
    "shaped",
    "wants_tokens",
    "with_batch",
]
