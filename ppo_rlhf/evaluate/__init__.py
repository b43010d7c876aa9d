"""How good a policy is: its score, KL, diversity, perplexity and win rate, each with an interval.

prompts ► sample ► score ► KL to the reference ► estimates over prompts
"""

from ppo_rlhf.evaluate.evaluation import BestOfN, Evaluation, evaluate
from ppo_rlhf.evaluate.show import show
from ppo_rlhf.statistics import Estimate

__all__ = ["BestOfN", "Estimate", "Evaluation", "evaluate", "show"]
