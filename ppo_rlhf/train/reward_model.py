"""Reward modelling: comparisons → reward model."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ppo_rlhf.config import RewardConfig
from ppo_rlhf.core import bradley_terry_loss, logprobs_of
from ppo_rlhf.data import Rows, held_out, load_rows, stream, text_column
from ppo_rlhf.errors import UserError, did_you_mean
from ppo_rlhf.models import context_length, load_policy, right_padded, tokenizer_with_pad
from ppo_rlhf.prompts import Prompts
from ppo_rlhf.rewards import RewardFunction, RewardModel, ScoringNetwork, load_reward, score
from ppo_rlhf.run import Run, gathered, is_finished, make_accelerator, new_folder, share_of
from ppo_rlhf.sampling import sample
from ppo_rlhf.seeding import uniform_rows
from ppo_rlhf.train import Callback
from ppo_rlhf.train.supervised import Task, fit, num_steps_of

CALIBRATION_BINS = 10
MODEL_CARD = """# Reward model

A sequence classifier with one output: the score of prompt + response + eos, each encoded apart.

The output of plain `transformers` is the raw score. `ppo_rlhf.rewards.RewardModel.load` applies the normalisation kept
in `config.json`, (raw − reward_mean) / reward_scale, by which the policy it started from scores 0 on average:

    reward_mean  {mean:.6g}
    reward_scale {scale:.6g}

Pairwise accuracy on held-out comparisons: {accuracy:.3f}.
"""


@dataclass(frozen=True)
class Ranking:
    """K responses to one prompt, in an order of preference."""

    prompt: str
    responses: list[str]
    pairs: list[tuple[int, int]]  # (better, worse) positions in responses, without the ties
    margin: float  # of each pair

    @property
    def weight(self) -> float:
        """1 / C(K, 2): every ranking weighs the same (Ouyang et al., 2022, eq. 1)."""
        return 1 / math.comb(len(self.responses), 2)


def train(
    config: RewardConfig,
    *,
    policy: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Iterable[dict[str, Any]] | None = None,
    gold: RewardFunction | None = None,
    callbacks: Iterable[Callback] = (),
) -> dict[str, Any]:
    """Trains a reward model on comparisons by the Bradley–Terry likelihood; → the run's summary.

    It starts as the policy with a new head N(0, 1/√(d+1)) (Stiennon et al., 2020), and ends normalised so that the
    policy's own samples score 0 on average with standard deviation 1. policy with tokenizer, data, gold: objects that
    take the place of the configuration's names. Raises UserError for what is wrong with the configuration or the data.
    """
    started = time.monotonic()
    folder = new_folder(config.output_dir, "reward", resume=config.resume)
    if is_finished(folder):
        return {"finished": str(folder)}
    accelerator = make_accelerator(folder, precision=config.precision, log_with=config.log_with)
    set_seed(config.seed)
    if policy is None or tokenizer is None:
        if config.policy is None:
            raise UserError("policy is not set: the supervised policy that the reward model starts from.")
        policy, tokenizer = load_policy(config.policy, setting="policy", trust_remote_code=config.trust_remote_code)
    else:
        tokenizer = tokenizer_with_pad(policy, tokenizer, setting="tokenizer")
    if data is None and config.data is None:
        raise UserError("data is not set: comparisons with `prompt`, `chosen` and `rejected`.")
    rows = load_rows(data if data is not None else str(config.data), required=("prompt",), setting="data")
    if config.eval_data is None:
        rows, eval_rows = held_out(rows, config.eval_fraction, config.seed, setting="eval_fraction")
    else:
        eval_rows = load_rows(config.eval_data, required=("prompt",), setting="eval_data")
    rankings, eval_rankings = rankings_of(rows, setting="data"), rankings_of(eval_rows, setting="eval_data")
    if gold is None and config.gold is not None:
        gold = load_reward(config.gold, setting="gold")

    policy.to(accelerator.device)
    prompt_rows = rows if config.prompts is None else load_rows(config.prompts, required=("prompt",), setting="prompts")
    own_texts = policy_samples(policy, tokenizer, prompt_rows, config)
    reward_model = RewardModel(classifier_from(policy), tokenizer)
    given = len(rankings) + len(eval_rankings)
    rankings, encoded = fitting(reward_model, rankings, setting="data")
    eval_rankings, eval_encoded = fitting(reward_model, eval_rankings, setting="eval_data")
    num_steps = num_steps_of(config, len(rankings), accelerator)
    gold_orders = [gold_pairs(ranking, gold) for ranking in eval_rankings] if gold is not None else None
    module = ComparisonModule(reward_model.network, policy if config.language_model_coef else None)
    module.to(accelerator.device)
    del policy

    run = Run(folder, config, kind="reward", accelerator=accelerator, num_steps=num_steps, started=started)
    num_left_out = given - len(rankings) - len(eval_rankings)
    if num_left_out:
        run.progress.tell(f"{num_left_out} of {given} comparisons have a response longer than the context: left out.")

    def loss(wrapped: nn.Module, batch: Sequence[int], count: Tensor) -> Tensor:
        scores, text_nll = wrapped(*right_padded([line for row in batch for line in encoded[row]], accelerator.device))
        better, worse, weights, margins = pair_tensors([rankings[row] for row in batch], scores.device)
        total = bradley_terry_loss(scores[better], scores[worse], margins, weight=weights, count=count)
        if config.language_model_coef:
            shares = [1 / len(rankings[row].responses) for row in batch for _ in rankings[row].responses]
            text_loss = (text_nll * torch.tensor(shares, device=scores.device)).sum() / count
            total = total + config.language_model_coef * text_loss
        return total

    def evaluate(_: nn.Module) -> dict[str, float]:
        mine = share_of(len(eval_rankings), accelerator)
        with accelerator.autocast():
            flat = reward_model.raw_scores([line for lines in eval_encoded[mine] for line in lines]).tolist()
        gathered_scores = iter(gathered(flat))
        scores = [[next(gathered_scores) for _ in ranking.responses] for ranking in eval_rankings]
        return held_out_metrics(scores, eval_rankings, gold_orders)

    task = Task(
        lengths=[max(len(line) for line in lines) for lines in encoded],
        weight=len,
        loss=loss,
        evaluate=evaluate,
        quality=lambda metrics: -metrics["eval/loss"],
        save=lambda _, path: reward_model.save(path),
    )
    state = fit(module, task, config, config.optimizer, run, num_steps=num_steps, callbacks=callbacks)

    best = RewardModel.load(folder / "best", setting="best", device=accelerator.device)
    raw = best.raw_scores(best.encode(*own_texts))
    best.set_normalization(float(raw.mean()), max(float(raw.std(correction=0)), 1e-8))
    accuracy = state.after["eval/gold_accuracy" if gold is not None else "eval/accuracy"]

    def save(path: Path) -> None:
        best.save(path)
        card = MODEL_CARD.format(mean=best.mean, scale=best.scale, accuracy=accuracy)
        (path / "README.md").write_text(card, encoding="utf-8")

    run.save_model("reward_model", save)
    summary = run.finish(
        {
            "pairwise_accuracy": accuracy,
            "label_accuracy": state.after["eval/accuracy"],
            "calibration_error": state.after["eval/calibration_error"],
            "loss_before": state.before["eval/loss"],
            "loss_after": state.after["eval/loss"],
            "mean": best.mean,
            "scale": best.scale,
        }
    )
    run.remove("best")  # last: a run that ends before its summary needs it again
    return summary


class ComparisonModule(nn.Module):
    """What is trained: the scoring network, and where asked a language-modelling head on the same trunk."""

    def __init__(self, network: ScoringNetwork, policy: PreTrainedModel | None) -> None:
        """policy: lends its output embeddings, tied to the trunk's input embeddings where its own are."""
        super().__init__()
        self.network = network
        self.language_head: Any = None
        if policy is not None:
            self.language_head = copy.deepcopy(policy.get_output_embeddings())
            if policy.config.tie_word_embeddings:
                self.language_head.weight = network.classifier.get_input_embeddings().weight

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids, mask (N, S) → raw scores (N,), and each text's mean negative log-likelihood (N,), 0 without a head."""
        scores, hidden = self.network(ids, mask)
        if self.language_head is None:
            return scores, torch.zeros_like(scores)
        logprobs = logprobs_of(self.language_head(hidden[:, :-1]), ids[:, 1:])
        nll = torch.where(mask[:, 1:], -logprobs, 0).sum(1) / mask[:, 1:].sum(1).clamp(min=1)
        return scores, nll


def classifier_from(policy: PreTrainedModel) -> PreTrainedModel:
    """A sequence classifier on the policy's trunk, its head drawn from N(0, 1/√(d+1)) (Stiennon et al., 2020)."""
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    classifier = AutoModelForSequenceClassification.from_config(config)
    classifier.base_model.load_state_dict(policy.base_model.state_dict())
    width = classifier.score.weight.shape[1]
    nn.init.normal_(classifier.score.weight, std=1 / math.sqrt(width + 1))
    return classifier.to(policy.device)


def rankings_of(rows: Rows, *, setting: str) -> list[Ranking]:
    """Rankings from `chosen` and `rejected` [, `margin`], or from `responses` and `ranks`, 1 the best, equal for a tie.

    Raises UserError for rows that are neither, ranks that do not fit, or a row in which nothing is preferred.
    """
    prompts = text_column(rows, "prompt", setting=setting, empty=True)
    if "responses" in rows[0]:
        return [
            _ranking(prompt, row, f"{setting}: row {index}")
            for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
        ]
    missing = [name for name in ("chosen", "rejected") if name not in rows[0]]
    if missing:
        found = ", ".join(sorted(rows[0]))
        raise UserError(
            f"{setting}: no column {missing[0]!r}, only {found}; comparisons need `prompt`, `chosen`, `rejected`, or "
            f"`prompt`, `responses`, `ranks`.{did_you_mean(missing[0], rows[0])}"
        )
    chosen, rejected = (text_column(rows, name, setting=setting, empty=True) for name in ("chosen", "rejected"))
    margins = [row.get("margin") or 0.0 for row in rows]
    for index, margin in enumerate(margins):
        if not _is_number(margin):
            raise UserError(f"{setting}: row {index}, column 'margin' is {margin!r}, not a number.")
    return [
        Ranking(prompt, [better, worse], [(0, 1)], float(margin))
        for prompt, better, worse, margin in zip(prompts, chosen, rejected, margins, strict=True)
    ]


def _ranking(prompt: str, row: dict[str, Any], where: str) -> Ranking:
    responses, ranks = row.get("responses"), row.get("ranks")
    if not isinstance(responses, list) or len(responses) < 2 or not all(isinstance(text, str) for text in responses):
        raise UserError(f"{where}: `responses` must be a list of two or more texts.")
    if not isinstance(ranks, list) or len(ranks) != len(responses) or not all(map(_is_number, ranks)):
        raise UserError(f"{where}: `ranks` must be a list of {len(responses)} numbers, one a response.")
    pairs = [(a, b) for a, b in itertools.permutations(range(len(ranks)), 2) if ranks[a] < ranks[b]]
    if not pairs:
        raise UserError(f"{where}: all `ranks` are equal, so nothing is preferred; remove the row.")
    return Ranking(prompt, responses, pairs, 0.0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def pair_tensors(rankings: Sequence[Ranking], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All pairs of rankings whose responses stand in a row: better, worse (N,) positions, weights, margins (N,)."""
    better, worse, weights, margins = [], [], [], []
    start = 0
    for ranking in rankings:
        for a, b in ranking.pairs:
            better.append(start + a)
            worse.append(start + b)
            weights.append(ranking.weight)
            margins.append(ranking.margin)
        start += len(ranking.responses)
    return (
        torch.tensor(better, device=device),
        torch.tensor(worse, device=device),
        torch.tensor(weights, device=device),
        torch.tensor(margins, device=device),
    )


def fitting(
    reward_model: RewardModel, rankings: Sequence[Ranking], *, setting: str
) -> tuple[list[Ranking], list[list[list[int]]]]:
    """The rankings whose responses fit in the model's context, and their token ids, a list for each response.

    Raises UserError where none fits.
    """
    kept = [ranking for ranking in rankings if reward_model.fits(ranking.responses)]
    if not kept:
        raise UserError(f"{setting}: each comparison has a response longer than the reward model's context.")
    return kept, [reward_model.encode([ranking.prompt] * len(ranking.responses), ranking.responses) for ranking in kept]


def gold_pairs(ranking: Ranking, gold: RewardFunction) -> list[tuple[int, int]]:
    """The ranking's pairs in the order of the true reward, without its ties."""
    scores = score(gold, [ranking.prompt] * len(ranking.responses), ranking.responses, {}).total.tolist()
    return [(a, b) for a, b in itertools.permutations(range(len(scores)), 2) if scores[a] > scores[b]]


def held_out_metrics(
    scores: Sequence[Sequence[float]],
    rankings: Sequence[Ranking],
    gold_orders: Sequence[Sequence[tuple[int, int]]] | None,
) -> dict[str, float]:
    """Loss, accuracy and calibration error over the held-out pairs, and accuracy against a known gold order."""
    differences = torch.tensor(
        [line[a] - line[b] for line, ranking in zip(scores, rankings, strict=True) for a, b in ranking.pairs]
    )
    metrics = {
        "eval/loss": float(bradley_terry_loss(differences, torch.zeros_like(differences))),
        "eval/accuracy": accuracy_of(differences),
        "eval/calibration_error": calibration_error(differences),
    }
    if gold_orders is not None:
        against_gold = [line[a] - line[b] for line, order in zip(scores, gold_orders, strict=True) for a, b in order]
        metrics["eval/gold_accuracy"] = accuracy_of(torch.tensor(against_gold))
    return metrics


def accuracy_of(differences: Tensor) -> float:
    """Share of pairs ordered right, (N,) score differences; a tie counts half."""
    return float(((differences > 0).float() + 0.5 * (differences == 0).float()).mean())


def calibration_error(differences: Tensor) -> float:
    """Expected calibration error: |accuracy − confidence| over ten bins of confidence σ(|difference|), weighted."""
    confidence, right = differences.abs().sigmoid(), 0.5 * (differences.sign() + 1)  # a tie is half right
    bins = ((confidence - 0.5) * 2 * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    total = 0.0
    for number in bins.unique():
        inside = bins == number
        total += float((right[inside].mean() - confidence[inside].mean()).abs() * inside.float().mean())
    return total


def policy_samples(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, config: RewardConfig
) -> tuple[list[str], list[str]]:
    """Prompts of the data and the starting policy's responses to them, on which the reward's mean and scale are set."""
    longest = context_length(policy) - config.sampling.max_new_tokens
    distinct = [{"prompt": text} for text in dict.fromkeys(row["prompt"] for row in rows)]
    prompts = Prompts(distinct, tokenizer, longest=longest, setting="prompts")
    chosen = stream(len(prompts), 0, config.normalization_prompts, config.seed).tolist()
    noise = uniform_rows(list(range(len(chosen))), config.sampling.max_new_tokens, config.seed, "normalization")
    batch = prompts.batch(chosen, policy.device)
    return batch.texts, sample(policy, tokenizer, batch, config.sampling, noise).texts
