"""Does a long run grow? PPO steps of a tiny model, with this process's memory and open files after each.

    python examples/benchmarks/soak.py --steps 300          a minute or two on one core; 2000 steps: ten

Prints one object: memory after a hundred steps and at the end (means of fifty steps, MiB), the growth between the two
in per cent, and open files at both places. Exit code 1 where memory grew by 5 % or more, or a file stayed open. Linux
only.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import fmean

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ppo_rlhf import toy
from ppo_rlhf.config import PPOConfig
from ppo_rlhf.settings import OptimizerSettings, PPOSettings, SamplingSettings
from ppo_rlhf.toy.model import tokenizer as toy_tokenizer
from ppo_rlhf.train import ppo

WARM = 100  # steps in which allocators and caches fill
WINDOW = 50
LARGEST_GROWTH = 0.05


def resident_mib() -> float:
    """The memory that this process really holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> int:
    """→ the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help=f"PPO steps, at least {WARM + 2 * WINDOW}")
    steps = parser.parse_args().steps
    if steps < WARM + 2 * WINDOW:
        parser.error(f"--steps must be at least {WARM + 2 * WINDOW}.")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = toy_tokenizer()
    shape = {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    policy = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape, **ids))

    memory: list[float] = []
    files: list[int] = []

    def measure(step, metrics):
        memory.append(resident_mib())
        files.append(len(os.listdir("/proc/self/fd")))

    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=f"{folder}/run",
            num_steps=steps,
            batch_size=16,
            eval_every=50,
            save_every=25,
            max_eval_prompts=16,
            sampling=SamplingSettings(max_new_tokens=12),
            ppo=PPOSettings(num_epochs=2, num_minibatches=2),
            optimizer=OptimizerSettings(lr=1e-4),
        )
        ppo.train(
            config, policy=policy, tokenizer=tokenizer, reward=toy.gold, prompts=toy.prompts(), callbacks=[measure]
        )
    before, after = fmean(memory[WARM : WARM + WINDOW]), fmean(memory[-WINDOW:])
    growth = after / before - 1
    outcome = {
        "steps": steps,
        "memory_mib": [round(before, 1), round(after, 1)],
        "growth_percent": round(100 * growth, 2),
        "open_files": [files[WARM], files[-1]],
    }
    print(json.dumps(outcome))
    return int(growth >= LARGEST_GROWTH or files[-1] > files[WARM])


if __name__ == "__main__":
    sys.exit(main())
