"""One policy evaluated: prompts ► sample ► score ► KL to the reference ► estimates over prompts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ppo_rlhf.compute import default_device
from ppo_rlhf.data import Row, demonstrations, load_rows
from ppo_rlhf.errors import UserError
from ppo_rlhf.evaluate.estimates import (
    distinct_estimate,
    mean_estimate,
    perplexity_estimate,
    share_estimate,
)
from ppo_rlhf.evaluate.subject import Subject, load_subject, source_of
from ppo_rlhf.evaluate.win_rates import check_judge, wins_by_judge, wins_by_score
from ppo_rlhf.evaluation_settings import EvaluationSettings
from ppo_rlhf.measures import best_of_n, best_of_n_kl
from ppo_rlhf.models import context_length, load_reader
from ppo_rlhf.prompts import Prompts
from ppo_rlhf.rewards import RewardFunction, load_reward
from ppo_rlhf.run import StepProgress
from ppo_rlhf.sampling import warn_of_truncation
from ppo_rlhf.saved_runs import held_out_rows, is_ppo_run, reward_source, run_settings
from ppo_rlhf.seeding import uniform_rows
from ppo_rlhf.settings import TooLong
from ppo_rlhf.statistics import Estimate
from ppo_rlhf.train.inputs import load_reference
from ppo_rlhf.train.measured import measure
from ppo_rlhf.train.sft import CompletionModule, example_losses
from ppo_rlhf.train.supervised import evaluation_batch

MEANS: tuple[str, ...] = ("score", "gold_score", "kl", "length")  # of responses
Rewards = dict[str, RewardFunction]  # by the name of their scores, `score` and `gold_score`
Rows = list[list[dict[str, Any]]]  # of each prompt, a row for each response


@dataclass(frozen=True)
class BestOfN:
    """What the best of n responses by their score would be worth."""

    n: int
    kl: float  # to the policy that was sampled, nats
    scores: dict[str, Estimate]  # `score`, and `gold_score` where there is one


@dataclass(frozen=True)
class Evaluation:
    """What was found of one policy."""

    policy: str
    reference: str | None  # that KL was measured to
    against: str | None  # that the win rates are over
    prompts: int
    samples: int  # responses to each
    numbers: dict[str, Estimate]
    win_rates: dict[str, Estimate]  # by the name of who decides
    best_of_n: list[BestOfN]  # of the reference, of the policy where there is none
    rows: list[dict[str, Any]]  # a prompt each, for --output

    def as_dict(self) -> dict[str, Any]:
        """For --json: all but the rows."""
        found: dict[str, Any] = {"policy": self.policy, "prompts": self.prompts, "samples": self.samples}
        found |= {name: asdict(number) for name, number in self.numbers.items()}
        if self.reference is not None:
            found["reference"] = self.reference
        if self.win_rates:
            rates = {name: asdict(rate) for name, rate in self.win_rates.items()}
            found["win_rate"] = {"against": self.against, **rates}
        if self.best_of_n:
            found["best_of_n"] = [
                {"n": each.n, "kl": each.kl, **{name: asdict(score) for name, score in each.scores.items()}}
                for each in self.best_of_n
            ]
        return found


def evaluate(names: Sequence[str], settings: EvaluationSettings) -> list[Evaluation]:
    """Evaluates the policies of runs, of folders, or of names on the Hub.

    A policy that is not of a PPO run is measured as the first of those named that is: by its prompts, its reward, its
    reference and its way of sampling. Raises UserError.
    """
    for name in names:
        source_of(name, settings)  # before the first is evaluated
    others = [] if settings.against is None else [settings.against]
    task = next((name for name in [*names, *others] if is_ppo_run(name)), None)
    return [evaluate_one(name, name if is_ppo_run(name) else task or name, settings) for name in names]


@torch.no_grad()
def evaluate_one(name: str, task: str, settings: EvaluationSettings) -> Evaluation:
    """Evaluates one policy; all that the settings and the PPO run `task` name is loaded before anything is sampled."""
    subject = load_subject(name, task, settings)
    rewards = load_rewards(task, settings)
    check_choices(task, settings, rewards)
    reference_name, reference = load_reference_of(subject, task, settings)
    rows = load_prompt_rows(task, settings)
    other = None
    if settings.against is not None:
        other_task = settings.against if is_ppo_run(settings.against) else task
        other = load_subject(settings.against, other_task, replace(settings, best=False, step=None))
    perplexity = {} if settings.text is None else {"perplexity": perplexity_on(settings.text, subject, settings.seed)}
    if not rows:
        return Evaluation(name, None, None, 0, 0, perplexity, {}, [], [])

    warn_of_truncation(subject.sampling)
    prompts = prompts_for(subject, rows, too_long=subject.task.get("too_long", "refuse"))
    asked = [Asked(subject, prompts, settings.samples, reference)]
    if other is not None:
        same = [rows[number] for number in prompts.kept]
        asked.append(Asked(other, prompts_for(other, same, too_long="refuse"), 1))
    if settings.best_of:
        sampled = subject if reference is None else replace(subject, policy=reference)
        asked.append(Asked(sampled, prompts, settings.best_of))
    mine, *others = respond(asked, rewards, settings.seed)
    several = others.pop() if settings.best_of else []
    theirs = others.pop() if other is not None else []
    wins = wins_of(mine, theirs, rewards, settings.judge) if theirs else {}
    return Evaluation(
        policy=name,
        reference=reference_name,
        against=settings.against,
        prompts=len(mine),
        samples=settings.samples,
        numbers=estimates_of(mine, settings.seed) | perplexity,
        win_rates={judge: share_estimate(outcomes) for judge, outcomes in wins.items()},
        best_of_n=best_of_n_of(several, rewards, settings.seed) if several else [],
        rows=rows_to_write(name, mine, theirs, several, wins),
    )


# ----------------------------------------------------------------------------------------------- what is loaded


def load_rewards(task: str, settings: EvaluationSettings) -> Rewards:
    """The rewards that score the responses, given ones in place of the run's; none where there is none."""
    own = {"reward": reward_source(task), "gold": run_settings(task).get("gold")}
    found: Rewards = {}
    for scores, option, given in (("score", "reward", settings.reward), ("gold_score", "gold", settings.gold)):
        source = given or own[option]
        if source is not None:
            setting = f"--{option}" if given else f"the {option} of {task}"
            found[scores] = load_reward(source, setting=setting, device=default_device())
    return found


def check_choices(task: str, settings: EvaluationSettings, rewards: Rewards) -> None:
    """Raises UserError for a judge that cannot be called, and where nothing could choose between two responses."""
    if settings.judge is not None:
        check_judge(settings.judge)
    if settings.best_of and "score" not in rewards:
        raise UserError(f"--best-of chooses by a score, but {task} names no reward; give one with --reward.")
    if settings.against is not None and settings.judge is None and not rewards:
        raise UserError(f"--against needs who decides, but {task} names no reward: give --reward, or --judge.")


def load_reference_of(
    subject: Subject, task: str, settings: EvaluationSettings
) -> tuple[str | None, PreTrainedModel | None]:
    """The policy that KL is measured to, and its name: the given one, else what the PPO run was held to.

    None for a policy of another vocabulary than the run's reference, to which it has no KL.
    """
    own = (subject.task.get("reference") or subject.task.get("policy")) if is_ppo_run(task) else None
    source = settings.reference or own
    if source is None:
        return None, None
    setting = "--reference" if settings.reference else f"the reference of {task}"
    trusted = settings.trust_remote_code
    if not settings.reference and subject.name != task:
        reader, _ = load_reader(source, setting=setting, trust_remote_code=trusted)
        if reader.get_vocab() != subject.tokenizer.get_vocab():
            return None, None
    reference = load_reference(source, subject.tokenizer, setting=setting, trust_remote_code=trusted)
    return source, reference.to(subject.policy.device).eval().requires_grad_(False)  # type: ignore[arg-type]


def load_prompt_rows(task: str, settings: EvaluationSettings) -> list[Row]:
    """The prompts to respond to. Empty where the run names none and the perplexity alone is asked for."""
    perplexity_alone = settings.text is not None and settings.against is None and not settings.best_of
    if settings.prompts is None and not is_ppo_run(task) and perplexity_alone:
        return []
    rows = held_out_rows(task, settings.prompts)[: settings.num_prompts]
    if len(rows) < 2:
        raise UserError("--prompts: an interval needs at least 2 prompts, and there is 1.")
    return rows


def prompts_for(subject: Subject, rows: list[Row], *, too_long: TooLong) -> Prompts:
    """The prompts as a policy reads them, no longer than in its run."""
    room = context_length(subject.policy) - subject.sampling.max_new_tokens
    if room < 1:
        raise UserError(
            f"max_new_tokens={subject.sampling.max_new_tokens} fills the context of {subject.name}; lower it."
        )
    longest = min(subject.task.get("max_prompt_length") or room, room)
    return Prompts(rows, subject.tokenizer, longest=longest, setting="--prompts", too_long=too_long)


# ------------------------------------------------------------------------------------------------ what is asked


@dataclass(frozen=True)
class Asked:
    """Prompts that a policy responds to, each `count` times."""

    subject: Subject
    prompts: Prompts
    count: int
    reference: PreTrainedModel | None = None  # that KL is measured to


def respond(several: Sequence[Asked], rewards: Rewards, seed: int) -> list[Rows]:
    """The responses with what is measured of them. The noise of a prompt's k-th response is that of anybody's k-th."""
    found: list[Rows] = []
    batches = [list(batched(asked)) for asked in several]
    with closing(StepProgress(f"evaluate {several[0].subject.name}", sum(map(len, batches)), enabled=True)) as progress:
        steps = itertools.count(1)
        for asked, own in zip(several, batches, strict=True):
            rows: Rows = [[] for _ in range(len(asked.prompts))]
            for batch in own:
                for (number, _), row in zip(batch, measured_rows(asked, batch, rewards, seed), strict=True):
                    rows[number].append(row)
                progress.show(next(steps), {})
            found.append(rows)
    return found


def batched(asked: Asked) -> Iterator[list[tuple[int, int]]]:
    """Numbers of prompts, and which response to each it is, in batches; those to one prompt lie beside each other, so
    that it is read once.
    """
    pairs = [(number, sample) for number in range(len(asked.prompts)) for sample in range(asked.count)]
    size = asked.subject.sampling.batch_size
    return (pairs[start : start + size] for start in range(0, len(pairs), size))


def measured_rows(asked: Asked, batch: list[tuple[int, int]], rewards: Rewards, seed: int) -> list[dict[str, Any]]:
    """A row for each response of a batch."""
    subject, length = asked.subject, asked.subject.sampling.max_new_tokens
    noise = torch.cat([uniform_rows([number], length, seed, "evaluate", sample) for number, sample in batch])
    measured = measure(
        asked.prompts,
        [number for number, _ in batch],
        noise,
        subject.policy,
        subject.tokenizer,
        subject.sampling,
        reference=asked.reference,
        rewards=rewards,
        must_be_finite=True,
        micro_batch_size=subject.micro_batch_size,
    )
    return measured.rows()


def perplexity_on(source: str, subject: Subject, seed: int) -> Estimate:
    """exp of the mean loss a token, of text in any format that sft reads, by its own evaluation's forward."""
    rows, longest = load_rows(source, required=(), setting="--text"), context_length(subject.policy)
    examples = demonstrations(rows, subject.tokenizer, longest=longest, too_long="left", setting="--text")
    if len(examples) < 2:
        raise UserError(f"--text: an interval needs at least 2 texts, but {source} has 1.")
    module, size = CompletionModule(subject.policy), evaluation_batch(subject.micro_batch_size)
    return perplexity_estimate(example_losses(module, examples, subject.policy.device, batch_size=size), seed)


# ------------------------------------------------------------------------------------------------ what is found


def estimates_of(rows: Rows, seed: int) -> dict[str, Estimate]:
    """The numbers of responses to each prompt. Diversity is that of the first response to each."""
    first = rows[0][0]
    numbers = {name: column(rows, name) for name in MEANS if name in first}
    for part in first.get("score_parts", {}):
        numbers[f"score/{part}"] = torch.tensor([[row["score_parts"][part] for row in several] for several in rows])
    found = {name: mean_estimate(values, seed) for name, values in numbers.items()}
    found["stop_rate"] = share_estimate(column(rows, "finished").mean(1).tolist())
    texts = [several[0]["response"] for several in rows]
    return found | {f"distinct_{n}": distinct_estimate(texts, n) for n in (1, 2, 3)}


def column(rows: Rows, name: str) -> Tensor:
    """A number of each response, (P, samples) float64."""
    return torch.tensor([[row[name] for row in several] for several in rows], dtype=torch.float64)


def wins_of(mine: Rows, theirs: Rows, rewards: Rewards, judge: str | None) -> dict[str, list[float]]:
    """Of each prompt, whether the first response beats the other policy's: 1, 0.5 or 0, by each who decides."""
    first, other = ([several[0] for several in rows] for rows in (mine, theirs))
    found = {
        decides: wins_by_score([row[name] for row in first], [row[name] for row in other])
        for decides, name in (("reward", "score"), ("gold", "gold_score"))
        if name in rewards
    }
    if judge is not None:
        prompts, responses = ([row[name] for row in first] for name in ("prompt", "response"))
        found["judge"] = wins_by_judge(judge, prompts, responses, [row["response"] for row in other])
    return found


def best_of_n_of(rows: Rows, rewards: Rewards, seed: int) -> list[BestOfN]:
    """What the best of n = 1, 2, 4, …, N by score is worth, of N responses to each prompt."""
    scores, total = column(rows, "score"), len(rows[0])
    numbers = [2**power for power in range(total.bit_length()) if 2**power < total] + [total]
    return [
        BestOfN(
            n,
            best_of_n_kl(n),
            {name: mean_estimate(best_of_n(scores, column(rows, name), n)[:, None], seed) for name in rewards},
        )
        for n in numbers
    ]


def rows_to_write(
    policy: str, mine: Rows, theirs: Rows, best_of: Rows, wins: Mapping[str, list[float]]
) -> list[dict[str, Any]]:
    """A row for each prompt: its responses with their numbers, the other policy's, who won, those to choose from."""
    found: list[dict[str, Any]] = []
    for number, several in enumerate(mine):
        row: dict[str, Any] = {"policy": policy, "prompt": several[0]["prompt"], "responses": without_prompt(several)}
        if theirs:
            (row["against"],) = without_prompt(theirs[number])
            row["wins"] = {decides: outcomes[number] for decides, outcomes in wins.items()}
        if best_of:
            row["best_of"] = without_prompt(best_of[number])
        found.append(row)
    return found


def without_prompt(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one prompt's responses, without it."""
    return [{name: value for name, value in row.items() if name != "prompt"} for row in rows]
