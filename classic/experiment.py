"""Variants of one configuration over environments and seeds: run side by side, and scored on one scale."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from classic.config import ExperimentConfig, TrainConfig
from classic.envs import make_environments
from classic.evaluate import play
from classic.many_runs import folder_of, refuse_runs, train_all
from classic.ppo import new_policy
from classic.variants import Variant, changed
from ppo_rlhf.errors import UserError
from ppo_rlhf.run import new_folder, write_text
from ppo_rlhf.seeding import keyed_seed

RANDOM_EPISODES = 100  # of the untrained policy, whose mean return is score 0


@dataclass(frozen=True)
class Experiment:
    """What is compared, and by what."""

    name: str  # of the command, and of the files
    variants: Mapping[str, Variant]
    base: Callable[[str, int | None], TrainConfig]  # environment, steps → what each variant changes a part of
    outcome: Callable[[Path], float]  # a finished run's return


@dataclass(frozen=True)
class Results:
    """What all runs came to, in raw returns."""

    returns: Mapping[str, Mapping[str, Sequence[float]]]  # by variant and environment: a number a seed
    random: Mapping[str, float]  # by environment: the untrained policy's mean return

    @property
    def best(self) -> dict[str, float]:
        """By environment: of all runs of all variants."""
        return {
            env_id: max(max(by_environment[env_id]) for by_environment in self.returns.values())
            for env_id in self.random
        }

    def scores(self, variant: str) -> list[np.ndarray]:
        """(return − random) / (best − random) of the variant's runs: a stratum an environment, a number a seed.

        Raises UserError for an environment on which no run did better than the untrained policy.
        """
        for env_id, best in self.best.items():
            if best <= self.random[env_id]:
                raise UserError(
                    f"no run on {env_id} did better than the untrained policy: no scale. Leave it out, by --resume "
                    "with the other --envs; or train longer, by more --num-steps into another --output-dir."
                )
        return [
            (np.array(returns) - self.random[env_id]) / (self.best[env_id] - self.random[env_id])
            for env_id, returns in self.returns[variant].items()
        ]

    def as_dict(self) -> dict[str, Any]:
        """The raw numbers."""
        return {"random": dict(self.random), "best": self.best, "returns": self.returns}


def carry_out(experiment: Experiment, config: ExperimentConfig) -> tuple[Path, Results]:
    """Trains every variant with every seed on every environment, some at a time; → the folder, and the results.

    A run that is finished is not repeated, one that was interrupted goes on.

    Raises UserError, before anything is written, for an environment that cannot be made, a folder in use, or runs in it
    that trained otherwise, or variants that are the same; and at the end where a run failed.
    """
    folder = new_folder(config.output_dir, experiment.name, resume=config.resume)
    planned = runs_of(experiment, config, folder)
    refuse_runs(planned)
    for env_id in config.env_ids:
        _refuse_twins(experiment, config, env_id)
    train_all(folder, config, planned, outcome=experiment.outcome)
    random = {env_id: random_return(folder, experiment.base(env_id, config.num_steps)) for env_id in config.env_ids}
    returns = {
        variant: {
            env_id: [experiment.outcome(folder_of(folder, env_id, variant, seed)) for seed in config.seeds]
            for env_id in config.env_ids
        }
        for variant in config.variants
    }
    return folder, Results(returns, random)


def runs_of(experiment: Experiment, config: ExperimentConfig, folder: Path) -> dict[Path, TrainConfig]:
    """The configurations of all runs by their folders, seed by seed, so that what is finished early can be compared.

    Raises UserError for settings that do not go together.
    """
    return {
        folder_of(folder, env_id, variant, seed): changed(
            replace(experiment.base(env_id, config.num_steps), seed=seed, device="cpu", log_with=(), pictures=0),
            experiment.variants[variant].changes,
        )
        for seed in config.seeds
        for env_id in config.env_ids
        for variant in config.variants
    }


def _refuse_twins(experiment: Experiment, config: ExperimentConfig, env_id: str) -> None:
    """Raises UserError for variants that are the same on an environment: its preset may have what one of them sets."""
    base = experiment.base(env_id, config.num_steps)
    settings = {name: changed(base, experiment.variants[name].changes) for name in config.variants}
    for one, other in itertools.combinations(settings, 2):
        if settings[one] == settings[other]:
            raise UserError(f"on {env_id} {other} is the same as {one}: leave one of them out by --variants.")


def random_return(folder: Path, config: TrainConfig) -> float:
    """The mean return of 100 episodes with the untrained policy, its actions sampled; kept in <folder>/random.json."""
    path = folder / "random.json"
    known: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if config.env_id not in known:
        envs = make_environments(config.env_id, num_envs=RANDOM_EPISODES, **config.environment.arguments())
        try:
            seed = keyed_seed(config.seed, "random")
            outcome = play(envs, new_policy(config, envs), episodes=RANDOM_EPISODES, seed=seed, deterministic=False)
        finally:
            envs.close()
        known[config.env_id] = outcome.metrics["eval/return"]
        write_text(path, json.dumps(known, indent=1))
    return known[config.env_id]


def returns_table(experiment: Experiment, config: ExperimentConfig, results: Results) -> list[str]:
    """Markdown: the mean return over seeds, of each variant on each environment."""
    rows = {experiment.variants[name].text: results.returns[name] for name in config.variants}
    means = {text: {env_id: float(np.mean(found)) for env_id, found in row.items()} for text, row in rows.items()}
    means |= {"the best run (score 1)": results.best, "the untrained policy (score 0)": dict(results.random)}
    return [
        f"| return | {' | '.join(config.env_ids)} |",
        "|---" + "|---:" * len(config.env_ids) + "|",
        *(
            f"| {text} | {' | '.join(f'{row[env_id]:,.1f}' for env_id in config.env_ids)} |"
            for text, row in means.items()
        ),
    ]


def command_line(experiment: Experiment, config: ExperimentConfig) -> str:
    """What runs the same again."""
    steps = [] if config.num_steps is None else ["--num-steps", str(config.num_steps)]
    lists = {"--envs": config.env_ids, "--variants": config.variants, "--seeds": config.seeds}
    given = [str(word) for option, values in lists.items() for word in (option, *values)]
    return " ".join(["python -m classic", experiment.name, *given, *steps])
