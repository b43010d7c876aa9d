"""Reward model overoptimisation on the embedded task (Gao et al., 2023): a policy that is tuned to a proxy of the gold
reward gains gold at first, and loses it as the proxy goes on rising.
"""

from ppo_rlhf.study.overoptimization.plan import QUICK, Plan
from ppo_rlhf.study.overoptimization.study import run

__all__ = ["QUICK", "Plan", "run"]
