"""The embedded task: movie reviews of our own making, a reward that is known, and simulated annotators.

It takes the place of the model hub and of people where there is neither, through the same code path as real data:

    demonstrations()              rows to imitate
    prompts()                     rows to respond to
    policy()                      an untrained model and its tokenizer
    gold(prompts, responses)      the true reward
    annotate(prompts, responses, seed=…)   comparisons by three annotators who do not always agree
"""

from ppo_rlhf.toy.annotators import annotate
from ppo_rlhf.toy.corpus import demonstrations, prompts
from ppo_rlhf.toy.model import policy
from ppo_rlhf.toy.reward import gold

__all__ = ["annotate", "demonstrations", "gold", "policy", "prompts"]
