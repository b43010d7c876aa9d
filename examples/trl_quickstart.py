"""TRL's quick start, one step of PPO on one prompt, here. A minute with GPT-2; or name another model's folder."""

import sys

from ppo_rlhf.config import PPOConfig
from ppo_rlhf.settings import SamplingSettings
from ppo_rlhf.stepwise import PPO

policy = sys.argv[1] if sys.argv[1:] else "gpt2"
ppo = PPO(PPOConfig(policy=policy, batch_size=1, sampling=SamplingSettings(max_new_tokens=20)))
prompts = ["This morning I went to the "]
responses = ppo.generate(prompts)
print(responses.texts[0])
metrics = ppo.update(prompts, responses, scores=[1.0])
print(metrics)
