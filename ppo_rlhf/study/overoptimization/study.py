"""The study from its first run to its page."""

from __future__ import annotations

from pathlib import Path

from ppo_rlhf.records import record_of
from ppo_rlhf.run.grid import run_grid
from ppo_rlhf.study.claims import Claim
from ppo_rlhf.study.overoptimization.curves import best_of_n_curve, ppo_curve
from ppo_rlhf.study.overoptimization.page import Results, document_of, results_of
from ppo_rlhf.study.overoptimization.plan import Plan, ppo_jobs, reward_jobs, sft_jobs, write_labels, write_prompts
from ppo_rlhf.study.overoptimization.samples import read_samples, write_samples
from ppo_rlhf.study.toy_runs import begin, write_findings


def run(folder: Path, plan: Plan, *, workers: int) -> list[Claim]:
    """Runs what is not finished, `workers` at a time, and writes results.json, README.md and the page's data.

    → the claims. Raises UserError for a folder in which another grid was begun.
    """
    begin(folder, plan)
    write_prompts(folder, plan)
    run_grid(sft_jobs(folder, plan), workers=workers, title="supervised policies")
    write_labels(folder, plan)
    run_grid(reward_jobs(folder, plan), workers=workers, title="reward models")
    write_samples(folder, plan)
    run_grid(ppo_jobs(folder, plan), workers=workers, title="PPO")
    results = measured(folder, plan)
    write_findings(folder, results, document_of(results, plan))
    return results.claims


def measured(folder: Path, plan: Plan) -> Results:
    """What the runs' folders say."""
    scores = read_samples(folder)
    curves = [best_of_n_curve(target.name, scores[target.name], scores["gold"]) for target in plan.targets]
    curves += [ppo_curve(each.target.name, each.kl_coef, folder / each.folder) for each in plan.attempts]
    accuracies = {
        target.name: record_of(folder / target.proxies[0].folder).summary["label_accuracy"]
        for target in plan.targets
        if not target.rule
    }
    return results_of(curves, accuracies, plan)
