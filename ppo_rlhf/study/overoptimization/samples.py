"""Responses of the supervised policy, many to each prompt, scored by every reward: what best-of-n chooses from."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ppo_rlhf.data import load_rows
from ppo_rlhf.models import context_length, load_policy
from ppo_rlhf.prompts import Prompts
from ppo_rlhf.records import read_lines
from ppo_rlhf.rewards import load_reward
from ppo_rlhf.run.progress import StepProgress
from ppo_rlhf.seeding import uniform_rows
from ppo_rlhf.settings import SamplingSettings
from ppo_rlhf.study.overoptimization.plan import Plan
from ppo_rlhf.study.toy_runs import write_rows
from ppo_rlhf.toy import gold
from ppo_rlhf.train.measured import measure

SAMPLING = SamplingSettings()  # as the runs sample


def write_samples(folder: Path, plan: Plan) -> None:
    """best_of_n.jsonl: for each prompt the scores of its responses, by target and by gold; once a study."""
    target = folder / "best_of_n.jsonl"
    if target.exists():
        return
    policy, tokenizer = load_policy(str(folder / plan.sizes[-1] / "sft" / "policy"), setting="policy")
    rewards = {each.name: load_reward(each.reward(folder), setting=each.name) for each in plan.targets}
    rows = load_rows(str(folder / "held_out.jsonl"), required=("prompt",), setting="held_out")
    longest = context_length(policy) - SAMPLING.max_new_tokens
    prompts = Prompts(rows[: plan.num_best_of_prompts], tokenizer, longest=longest, setting="held_out")
    progress = StepProgress("best of n", len(prompts), enabled=True)
    found = []
    for number, text in enumerate(prompts.texts):
        places = range(number * plan.num_best_of, (number + 1) * plan.num_best_of)
        measured = measure(
            prompts,
            [number] * plan.num_best_of,
            uniform_rows(list(places), SAMPLING.max_new_tokens, plan.seed, "best of n"),
            policy,
            tokenizer,
            SAMPLING,
            reference=None,
            rewards=rewards | {"gold": gold},
            must_be_finite=True,
        )
        scores = {name: each.total.tolist() for name, each in measured.scores.items()}
        found.append({"prompt": text, "scores": scores})
        progress.show(number + 1, {})
    progress.close()
    write_rows(target, found)


def read_samples(folder: Path) -> dict[str, Tensor]:
    """Scores (prompts, responses) by target, and by gold."""
    rows = [row["scores"] for row in read_lines(folder / "best_of_n.jsonl")]
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}
