"""What is run: supervised policies, proxy reward models of several sizes and label counts, and PPO against them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ppo_rlhf.config import ComparisonConfig, PipelineConfig
from ppo_rlhf.data import held_out
from ppo_rlhf.pipeline import compare
from ppo_rlhf.records import read_lines
from ppo_rlhf.reward_settings import RewardPart, RewardSource
from ppo_rlhf.run.grid import Job
from ppo_rlhf.study.toy_runs import demo_settings, stage_job, write_rows
from ppo_rlhf.toy import prompts

TRUNKS = {name: f"{__package__}.trunks:{name}" for name in ("narrow", "middle")} | {"wide": "ppo_rlhf.toy:policy"}
LABELS_PER_PROMPT = 1.25  # `toy.annotate` has every fourth pair judged twice
Rule = Literal["mean", "min", "lower_bound"]  # of an ensemble, see `rewards.Ensemble`
RULES: tuple[Rule, ...] = get_args(Rule)


@dataclass(frozen=True)
class Proxy:
    """A reward model that stands in for the gold reward."""

    size: str  # of its trunk, one of TRUNKS
    num_labels: int
    seed: int  # of its training

    @property
    def folder(self) -> str:
        """Of its run, in that of the study."""
        return f"{self.size}/reward-{self.num_labels}-seed-{self.seed}"


@dataclass(frozen=True)
class Target:
    """What is optimised in place of the gold reward: a proxy, or an ensemble of some."""

    proxies: tuple[Proxy, ...]
    rule: Rule | None = None  # of the ensemble; None: there is one proxy

    @property
    def name(self) -> str:
        """That of its files and columns."""
        first = self.proxies[0]
        return f"{first.size}-{first.num_labels}" + (f"-{self.rule}" if self.rule else "")

    def reward(self, folder: Path) -> RewardSource:
        """The setting `reward` of a run."""
        models = tuple(str(folder / proxy.folder / "reward_model") for proxy in self.proxies)
        return (RewardPart(models, ensemble=self.rule, name="ensemble"),) if self.rule else models[0]


@dataclass(frozen=True)
class Attempt:
    """PPO against a target."""

    target: Target
    kl_coef: float

    @property
    def folder(self) -> str:
        """Of its run, in that of the study."""
        return f"ppo/{self.target.name}-kl-{self.kl_coef}"


@dataclass(frozen=True)
class Plan:
    """The grid. The last size is that of the policy which is tuned."""

    seed: int = 0
    sizes: tuple[str, ...] = tuple(TRUNKS)
    label_counts: tuple[int, ...] = (100, 400, 1600)
    kl_coefs: tuple[float, ...] = (0.05, 0.15, 0.45)  # besides 0, against each size with most labels
    num_members: int = 4  # of the ensembles, of the first size with most labels (Coste et al., 2024: 5)
    num_best_of: int = 256  # responses to each prompt, of which the best is taken
    num_best_of_prompts: int = 100
    num_eval_prompts: int = 200
    num_eval_labels: int = 500
    sft_epochs: float = 2.0
    reward_steps: int = 150  # of each reward model, whatever its labels: the best by held-out labels is kept
    num_steps: int = 40
    eval_every: int = 2
    lr: float = 5e-4  # constant: a run is one curve from the supervised policy outwards

    @property
    def proxies(self) -> list[Proxy]:
        """One for each size and label count."""
        return [Proxy(size, count, self.seed) for size in self.sizes for count in self.label_counts]

    @property
    def members(self) -> tuple[Proxy, ...]:
        """Of the ensembles: equal but for the seed of their training. The first is one of `proxies`."""
        seeds = range(self.seed, self.seed + self.num_members)
        return tuple(Proxy(self.sizes[0], self.label_counts[-1], seed) for seed in seeds)

    @property
    def targets(self) -> list[Target]:
        """The proxies, and the ensembles by each rule."""
        return [Target((proxy,)) for proxy in self.proxies] + [Target(self.members, rule) for rule in RULES]

    @property
    def attempts(self) -> list[Attempt]:
        """Without a penalty against every target; with one against each size's proxy of most labels."""
        most = [target for target in self.targets if target.proxies[0].num_labels == self.label_counts[-1]]
        penalised = [target for target in most if not target.rule]
        return [
            *(Attempt(target, 0.0) for target in self.targets),
            *(Attempt(target, kl_coef) for target in penalised for kl_coef in self.kl_coefs),
        ]


QUICK = Plan(
    sizes=("narrow",),
    label_counts=(60,),
    kl_coefs=(0.1,),
    num_members=2,
    num_best_of=8,
    num_best_of_prompts=4,
    num_eval_prompts=8,
    num_eval_labels=20,
    sft_epochs=0.05,
    reward_steps=2,
    num_steps=4,
    eval_every=1,
    lr=3e-3,
)


def write_prompts(folder: Path, plan: Plan) -> None:
    """prompts.jsonl, to learn from, and held_out.jsonl, to evaluate on, in the demo's shares."""
    parts = held_out(prompts(), demo_settings()["ppo"]["eval_fraction"], plan.seed, setting="eval_fraction")
    for name, rows in zip(("prompts", "held_out"), parts, strict=True):
        write_rows(folder / f"{name}.jsonl", rows)


def sft_jobs(folder: Path, plan: Plan) -> list[Job]:
    """A supervised policy of each size."""
    changes = {"num_epochs": plan.sft_epochs, "eval_every": 0, "seed": plan.seed}
    return [stage_job("sft", folder / size / "sft", {**changes, "policy": TRUNKS[size]}) for size in plan.sizes]


def write_labels(folder: Path, plan: Plan) -> None:
    """labels-N.jsonl, each the beginning of the next larger, and labels-held-out.jsonl, by the annotators' noisy taste.

    All judge pairs of the tuned policy's samples.
    """
    most = max(plan.label_counts)
    comparisons = ComparisonConfig(
        prompts=str(folder / "prompts.jsonl"),
        annotator="ppo_rlhf.toy:annotate",
        num_prompts=round((most + plan.num_eval_labels) / LABELS_PER_PROMPT),
    )
    source = folder / plan.sizes[-1]
    compare(PipelineConfig(seed=plan.seed, comparisons=comparisons), source)
    rows = read_lines(source / "comparisons.jsonl")
    for count in plan.label_counts:
        write_rows(folder / f"labels-{count}.jsonl", rows[:count])
    write_rows(folder / "labels-held-out.jsonl", rows[-plan.num_eval_labels :])


def reward_jobs(folder: Path, plan: Plan) -> list[Job]:
    """The proxies."""
    batch_size = demo_settings()["reward"]["batch_size"]
    common: dict[str, Any] = {
        "eval_data": str(folder / "labels-held-out.jsonl"),
        "prompts": str(folder / "prompts.jsonl"),
        "eval_every": 25,
    }
    return [
        stage_job(
            "reward",
            folder / proxy.folder,
            {
                **common,
                "seed": proxy.seed,
                "policy": str(folder / proxy.size / "sft" / "policy"),
                "data": str(folder / f"labels-{proxy.num_labels}.jsonl"),
                "num_epochs": plan.reward_steps * batch_size / proxy.num_labels,
            },
        )
        for proxy in dict.fromkeys([*plan.proxies, *plan.members])
    ]


def ppo_jobs(folder: Path, plan: Plan) -> list[Job]:
    """PPO from the tuned policy. Scores are brought to one scale, so that a kl_coef means the same of every proxy."""
    common: dict[str, Any] = {
        "seed": plan.seed,
        "policy": str(folder / plan.sizes[-1] / "sft" / "policy"),
        "prompts": str(folder / "prompts.jsonl"),
        "eval_prompts": str(folder / "held_out.jsonl"),
        "max_eval_prompts": plan.num_eval_prompts,
        "num_steps": plan.num_steps,
        "eval_every": plan.eval_every,
        "score_shaping.normalize": "reference",
        "optimizer.lr": plan.lr,
        "optimizer.schedule": "constant",
    }
    jobs = []
    for attempt in plan.attempts:
        reward = attempt.target.reward(folder)
        changes = {
            "kl_coef": attempt.kl_coef,
            "reward": reward if isinstance(reward, str) else list(map(asdict, reward)),
        }
        jobs.append(stage_job("ppo", folder / attempt.folder, common | changes))
    return jobs
