"""Rewards: a function of prompts and responses as text, or a trained model that is called the same way."""

from ppo_rlhf.rewards.functions import RewardFunction, Scores, load_reward, score
from ppo_rlhf.rewards.model import RewardModel, ScoringNetwork

__all__ = ["RewardFunction", "RewardModel", "Scores", "ScoringNetwork", "load_reward", "score"]
