"""Peak memory of PPO with policy, reference, value and reward model of GPT-2's size (124M): adapters on one base beside
four models of their own.

    python examples/benchmarks/lora_memory.py [--rank 16] [--micro-batch-size 4]

Models with random weights, made here; prompts of 8 to 32 tokens, responses of 64, two steps of one epoch. Each side is
a process of its own; its peak is the system's, of the whole process with all its libraries.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from lm_speed import NEVER, RESPONSE, SHAPES, peak_gib, write_inputs


def write_adapter(folder: Path, rank: int) -> None:
    """A reward model on the policy's base: reward_adapter/."""
    from ppo_rlhf.adapters import train_adapter
    from ppo_rlhf.models import load_policy
    from ppo_rlhf.rewards import RewardModel
    from ppo_rlhf.settings import LoRASettings
    from ppo_rlhf.train.reward_model import classifier_from

    policy, tokenizer = load_policy(str(folder / "policy"), setting="policy")
    classifier = classifier_from(policy)
    train_adapter(classifier, LoRASettings(rank=rank, merge=False), heads=["score"])
    RewardModel(classifier, tokenizer).save(folder / "reward_adapter")


def train(folder: Path, rank: int, micro_batch_size: int) -> None:
    """One process; prints its peak. rank 0: full fine-tuning."""
    from ppo_rlhf.config import PPOConfig
    from ppo_rlhf.settings import LoRASettings, PPOSettings, SamplingSettings
    from ppo_rlhf.train import ppo

    shape = SHAPES["gpt2"]
    config = PPOConfig(
        policy=str(folder / "policy"),
        reward=str(folder / ("reward_adapter" if rank else "reward")),
        value_model="separate",
        output_dir=str(folder / f"run-{rank}"),
        num_steps=2,
        batch_size=shape["batch_size"],
        max_eval_prompts=2,
        save_every=0,
        log_with=(),
        lora=LoRASettings(rank=rank, merge=False),
        sampling=SamplingSettings(max_new_tokens=RESPONSE, stop_token_ids=(NEVER,)),
        ppo=PPOSettings(num_epochs=1, num_minibatches=shape["num_minibatches"], micro_batch_size=micro_batch_size),
    )
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    ppo.train(config, prompts=[{"prompt": prompt} for prompt in prompts])
    print(peak_gib())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        train(Path(arguments.worker), arguments.rank, arguments.micro_batch_size)
        return
    with tempfile.TemporaryDirectory() as name:
        write_inputs(Path(name), "gpt2", mean=None)
        write_adapter(Path(name), arguments.rank)
        peaks = []
        for rank in (0, arguments.rank):
            words = ["--worker", name, "--rank", str(rank), "--micro-batch-size", str(arguments.micro_batch_size)]
            done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
            peaks.append(float(done.stdout.strip().splitlines()[-1]))
    full, adapters = peaks
    print(f"full fine-tuning {full:.2f} GiB, adapters of rank {arguments.rank} {adapters:.2f}: {adapters / full:.2f}")


if __name__ == "__main__":
    main()
