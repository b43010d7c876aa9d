"""What each detail of PPO is worth on the embedded task: each changed alone, the rest as in the demo.

The supervised policy and the reward model are trained once a seed, and shared. The outcome is the gold score on
held-out prompts after equally many rollouts, and the KL that it cost.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from ppo_rlhf.document import Chart, Document, Section, Series, Table
from ppo_rlhf.errors import UserError
from ppo_rlhf.models import save_value_head
from ppo_rlhf.records import record_of
from ppo_rlhf.run.grid import Job, run_grid
from ppo_rlhf.seeding import keyed_generator
from ppo_rlhf.statistics import Estimate, estimate, interquartile_mean
from ppo_rlhf.study.toy_runs import Changes, begin, begun_plan, demo_job, stage_job, write_findings

RANDOM_HEAD = "a seed's random value head"  # stands for the folder that holds it


@dataclass(frozen=True)
class Variant:
    """A detail, changed."""

    detail: str
    change: str
    settings: Changes

    @property
    def folder(self) -> str:
        """The name of its runs' folders."""
        return "-".join(f"{name}-{value}" for name, value in self.settings.items()).replace(RANDOM_HEAD, "random")


VARIANTS = (
    Variant("policy clipping", "off", {"ppo.clip_range": None}),
    Variant("advantage whitening", "off", {"ppo.whiten_advantages": "none"}),
    Variant("advantage whitening", "in each minibatch", {"ppo.whiten_advantages": "minibatch"}),
    Variant("value clipping", "off", {"ppo.value_clip_range": None}),
    Variant("reward whitening", "on", {"whiten_rewards": True}),
    Variant("score normalisation", "by the supervised policy's moments", {"score_shaping.normalize": "reference"}),
    Variant("score normalisation", "by running moments", {"score_shaping.normalize": "running"}),
    Variant("value head at the start", "N(0, 1/√(d+1)), not 0", {"value_head": RANDOM_HEAD}),
    Variant("value function", "a model of its own, from the reward model", {"value_model": "separate"}),
    Variant("learning rate", "constant, not to 0", {"optimizer.schedule": "constant"}),
    Variant("Adam's ε", "1e-8, not 1e-5", {"optimizer.epsilon": 1e-8}),
    Variant("cut-off responses", "bootstrapped, not paid −1", {"missing_eos.rule": "bootstrap"}),
    Variant("cut-off responses", "paid their score", {"missing_eos.rule": "none"}),
    Variant("epochs", "1, not 2", {"ppo.num_epochs": 1}),
    Variant("epochs", "4, not 2", {"ppo.num_epochs": 4}),
    Variant("minibatches", "1, not 2", {"ppo.num_minibatches": 1}),
    Variant("minibatches", "4, not 2", {"ppo.num_minibatches": 4}),
    Variant("λ of the advantage", "0.8, not 0.95", {"gae_lambda": 0.8}),
    Variant("λ of the advantage", "1, not 0.95", {"gae_lambda": 1.0}),
    Variant("KL penalty", "k2 in the loss, not k1 in the reward", {"kl_penalty": "k2"}),
    Variant("KL penalty", "k3 in the loss, not k1 in the reward", {"kl_penalty": "k3"}),
)


@dataclass(frozen=True)
class Plan:
    """The grid."""

    num_seeds: int = 5
    num_steps: int = 20  # half the demo's: 105 runs take their time
    details: tuple[str, ...] = tuple(dict.fromkeys(variant.detail for variant in VARIANTS))
    shared: Mapping[str, Any] = field(default_factory=dict)  # settings of the demo that all variants have

    @property
    def variants(self) -> list[Variant]:
        """Those of the plan's details."""
        return [variant for variant in VARIANTS if variant.detail in self.details]


QUICK = Plan(
    num_seeds=2,
    num_steps=1,
    details=("value head at the start", "epochs"),
    shared={
        "sft.num_epochs": 0.02,
        "comparisons.num_prompts": 40,
        "reward.num_epochs": 1,
        "reward.eval_every": 0,
        "reward.normalization_prompts": 8,
        "ppo.max_eval_prompts": 8,
        "ppo.batch_size": 8,
    },
)


@dataclass(frozen=True)
class Outcome:
    """What came of a variant."""

    detail: str
    change: str
    settings: Changes
    gold: tuple[float, ...]  # mean true reward on held-out prompts after PPO, a number a seed
    kl: tuple[float, ...]  # nats a response
    gold_estimate: Estimate  # interquartile mean over the seeds
    kl_estimate: Estimate
    gold_difference: Estimate  # to the demo's settings on the same seed's models
    kl_difference: Estimate


@dataclass(frozen=True)
class Results:
    """The whole study; the first outcome is that of the demo's own settings."""

    outcomes: list[Outcome]
    gold_before: tuple[float, ...]  # of the supervised policies, a number a seed


def run(folder: Path, plan: Plan, *, workers: int) -> Results:
    """Runs what is not finished, `workers` at a time, and writes results.json, README.md and the page's data.

    Raises UserError for a folder in which another grid was begun; more seeds may join it.
    """
    begun = begun_plan(folder, plan).num_seeds
    if plan.num_seeds < begun:
        raise UserError(
            f"--num-seeds {plan.num_seeds}: {folder} was started with {begun}; more may join them, not fewer."
        )
    begin(folder, plan, may_change=["num_seeds"])
    run_grid(shared_jobs(folder, plan), workers=workers, title="supervised policies and reward models")
    if any(RANDOM_HEAD in variant.settings.values() for variant in plan.variants):
        write_random_heads(folder, plan)
    run_grid(variant_jobs(folder, plan), workers=workers, title="variants")
    results = measured(folder, plan)
    write_findings(folder, results, document_of(results, plan))
    return results


def shared_jobs(folder: Path, plan: Plan) -> list[Job]:
    """The demo once a seed. Its last stage is the run with the demo's own settings."""
    changes = {**plan.shared, "ppo.num_steps": plan.num_steps, "ppo.eval_every": 0}
    return [demo_job(shared_folder(folder, seed), {**changes, "seed": seed}) for seed in range(plan.num_seeds)]


def variant_jobs(folder: Path, plan: Plan) -> list[Job]:
    """PPO with each detail changed, on each seed's models."""
    ours = {name.removeprefix("ppo."): value for name, value in plan.shared.items() if name.startswith("ppo.")}
    jobs = []
    for seed in range(plan.num_seeds):
        shared, head = shared_folder(folder, seed), str(random_head(folder, seed))
        for variant in plan.variants:
            changes = {
                **ours,
                "seed": seed,
                "policy": str(shared / "sft" / "policy"),
                "reward": str(shared / "reward" / "reward_model"),
                "num_steps": plan.num_steps,
                "eval_every": 0,
                **{name: head if value == RANDOM_HEAD else value for name, value in variant.settings.items()},
            }
            jobs.append(stage_job("ppo", folder / f"seed-{seed}" / variant.folder, changes))
    return jobs


def shared_folder(folder: Path, seed: int) -> Path:
    """Of a seed's demo."""
    return folder / f"seed-{seed}" / "demo"


def random_head(folder: Path, seed: int) -> Path:
    """The folder of a seed's random value head, which `value_head` can name."""
    return folder / f"seed-{seed}" / "random-head"


def write_random_heads(folder: Path, plan: Plan) -> None:
    """A value head a seed, drawn as a reward model's is: N(0, 1/√(d+1))."""
    for seed in range(plan.num_seeds):
        width = AutoConfig.from_pretrained(shared_folder(folder, seed) / "sft" / "policy").hidden_size
        head = nn.Linear(width, 1)
        with torch.no_grad():
            head.weight.normal_(std=1 / math.sqrt(width + 1), generator=keyed_generator(seed, "value head"))
            head.bias.zero_()
        random_head(folder, seed).mkdir(exist_ok=True)
        save_value_head(head, random_head(folder, seed))


def measured(folder: Path, plan: Plan) -> Results:
    """What the runs' summaries say."""
    seeds = range(plan.num_seeds)
    demos = [record_of(shared_folder(folder, seed) / "ppo").summary for seed in seeds]
    base = Variant("the demo's settings", "", {})
    outcomes = [outcome(base, demos, demos)]
    for variant in plan.variants:
        found = [record_of(folder / f"seed-{seed}" / variant.folder).summary for seed in seeds]
        outcomes.append(outcome(variant, found, demos))
    return Results(outcomes, tuple(demo["gold_score_before"] for demo in demos))


def outcome(variant: Variant, found: Sequence[Mapping[str, float]], base: Sequence[Mapping[str, float]]) -> Outcome:
    """A variant's runs beside those with the demo's settings, seed by seed. found, base: summaries of PPO."""

    def of_seeds(name: str) -> tuple[tuple[float, ...], Estimate, Estimate]:
        values = tuple(summary[name] for summary in found)
        differences = [value - summary[name] for value, summary in zip(values, base, strict=True)]
        return values, estimate([values], interquartile_mean), estimate([differences], interquartile_mean)

    gold, gold_estimate, gold_difference = of_seeds("gold_score_after")
    kl, kl_estimate, kl_difference = of_seeds("kl")
    return Outcome(
        variant.detail,
        variant.change,
        variant.settings,
        gold=gold,
        kl=kl,
        gold_estimate=gold_estimate,
        kl_estimate=kl_estimate,
        gold_difference=gold_difference,
        kl_difference=kl_difference,
    )


def document_of(results: Results, plan: Plan) -> Document:
    """The table of outcomes, and gold against KL."""
    changed = results.outcomes[1:]
    clear = [each for each in changed if _is_clear(each.gold_difference)]
    before = estimate([results.gold_before], interquartile_mean)
    rows = [
        [
            each.detail,
            each.change,
            str(each.gold_estimate),
            str(each.gold_difference) if each.change else "",
            str(each.kl_estimate),
            str(each.kl_difference) if each.change else "",
        ]
        for each in results.outcomes
    ]
    text = [
        f"PPO on the embedded task, {plan.num_steps} rollouts, {plan.num_seeds} seeds, one detail of the demo's "
        f"settings changed at a time on the same supervised policies (gold score {before}) and reward models. "
        "Interquartile means over the seeds; differences are to the demo's settings, seed by seed; in brackets 95 % "
        "percentile bootstrap intervals over the seeds.",
        f"Of the {len(changed)} intervals of the gold score's difference {len(clear)} leave out 0; one in twenty would "
        "where nothing differs, and with few seeds such intervals are too narrow.",
    ]
    columns = ["detail", "change", "gold score", "difference", "KL, nats", "difference of KL"]
    chart = Chart(
        "Gold score against KL, means over the seeds",
        tuple(
            Series(each.detail, [each.kl_estimate.value], [each.gold_estimate.value], style="dots", notes=[each.change])
            for each in results.outcomes
        ),
        x_label="KL, nats a response",
        height=420,
    )
    settings = Table(["detail", "change", "settings"], [[e.detail, e.change, _told(e.settings)] for e in changed])
    return Document(
        "What each detail of PPO is worth on the embedded task",
        text,
        [Section("Outcomes", tables=[Table(columns, rows)], charts=[chart]), Section("Settings", tables=[settings])],
    )


def lines_of(results: Results) -> list[str]:
    """Each outcome, for a terminal."""
    base, *changed = results.outcomes
    return [
        f"{base.detail}: gold score {base.gold_estimate}, KL {base.kl_estimate}",
        *(
            f"{each.detail}, {each.change}: gold score {each.gold_difference.value:+.2f} to {each.gold_estimate}"
            + (" *" if _is_clear(each.gold_difference) else "")
            for each in changed
        ),
        "*: the interval of the difference leaves out 0",
    ]


def _is_clear(difference: Estimate) -> bool:
    """Whether the interval leaves out 0."""
    low, high = difference.low, difference.high
    return low is not None and high is not None and (low > 0 or high < 0)


def _told(settings: Changes) -> str:
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in settings.items())
