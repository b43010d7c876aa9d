"""TRL's sentiment example here: GPT-2 learns to continue film reviews favourably, judged by a classifier.

    python examples/trl_sentiment.py [--policy NAME] [--judge NAME] [--reviews NAME] [--num-steps N] [--output-dir DIR]

Names are folders, or on the Hub. `eval/score` in the run's metrics.jsonl climbs; ppo-rlhf report DIR draws it.
"""

import argparse

from datasets import load_dataset
from transformers import pipeline

from ppo_rlhf.config import PPOConfig
from ppo_rlhf.settings import OptimizerSettings, PPOSettings, SamplingSettings
from ppo_rlhf.train import ppo

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--policy", default="lvwerra/gpt2-imdb")
parser.add_argument("--judge", default="lvwerra/distilbert-imdb")
parser.add_argument("--reviews", default="stanfordnlp/imdb", help="on the Hub, or a JSON file; with a column `text`")
parser.add_argument("--num-steps", type=int, default=100)
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--output-dir")
given = parser.parse_args()

judge = pipeline("text-classification", model=given.judge, top_k=None)
local = given.reviews.endswith(("json", "jsonl"))
reviews = load_dataset("json", data_files=given.reviews) if local else load_dataset(given.reviews)
prompts = [{"prompt": " ".join(text.split()[:5])} for text in reviews["train"]["text"]]


def favour(prompts, responses, **columns):
    """P(positive) of prompt and response, by the judge."""
    found = judge([prompt + response for prompt, response in zip(prompts, responses, strict=True)], truncation=True)
    return [next(each["score"] for each in scores if each["label"] == "POSITIVE") for scores in found]


config = PPOConfig(
    policy=given.policy,
    num_steps=given.num_steps,
    batch_size=given.batch_size,
    output_dir=given.output_dir,
    kl_coef=0.2,
    kl_target=6.0,
    sampling=SamplingSettings(max_new_tokens=16),
    ppo=PPOSettings(micro_batch_size=16),
    optimizer=OptimizerSettings(lr=1.41e-5),
)
print(ppo.train(config, prompts=prompts, reward=favour))
