"""Reward modelling: comparisons → reward model."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from ppo_rlhf.adapters import merged, train_adapter
from ppo_rlhf.compute import set_up_products
from ppo_rlhf.config import RewardConfig
from ppo_rlhf.core import bradley_terry_loss, logprobs_of
from ppo_rlhf.data import Rows, comparisons, held_out, load_rows, stream
from ppo_rlhf.model_card import model_card
from ppo_rlhf.models import context_length, right_padded
from ppo_rlhf.prompts import Prompts
from ppo_rlhf.rewards import RewardFunction, RewardModel, ScoringNetwork, is_constant, load_reward
from ppo_rlhf.run import begin
from ppo_rlhf.sampling import check_stop_ids, sample
from ppo_rlhf.seeding import uniform_rows
from ppo_rlhf.train import Callback
from ppo_rlhf.train.inputs import policy_with_tokenizer, training_and_held_out
from ppo_rlhf.train.rankings import EncodedRankings, fitting, pair_tensors, rankings_of
from ppo_rlhf.train.reward_evaluation import Order, evaluate_held_out, gold_pairs
from ppo_rlhf.train.supervised import HeldOut, Task, batch_of, evaluation_batch, fit, num_steps_of


@dataclass(frozen=True)
class Parts:
    """What a run works with: loaded and checked before anything is written."""

    reward_model: RewardModel
    module: ComparisonModule
    training: EncodedRankings
    held_out: EncodedRankings
    gold_orders: list[Order] | None  # of each held-out ranking, where the true reward is known
    own_samples: tuple[list[str], list[str]]  # prompts, and the starting policy's responses to them


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
    start = begin(config, "reward")
    if start is None:
        return {"finished": config.output_dir}
    accelerator = start.accelerator
    set_up_products(start.matmul_precision, accelerator.device, torch.float32)
    parts = load_parts(config, accelerator, policy, tokenizer, data, gold)
    num_steps = num_steps_of(config, len(parts.training), accelerator)

    def loss(wrapped: nn.Module, batch: Sequence[int], count: Tensor) -> Tensor:
        return comparison_loss(wrapped, parts.training, batch, count, config.language_model_coef)

    def evaluate() -> HeldOut:
        return evaluate_held_out(parts.reward_model, parts.held_out, parts.gold_orders, accelerator)

    lengths = [max(len(line) for line in lines) for lines in parts.training.encoded]
    task = Task(
        batch=lambda step: batch_of(step, num_steps, config, lengths),
        weight=len,
        loss=loss,
        evaluate=evaluate,
        quality=lambda metrics: -metrics["eval/loss"],
        save=lambda folder: parts.reward_model.save(folder, merge=config.lora.merge),
        example=lambda row: asdict(parts.training.rankings[row]),
    )
    with start.run(num_steps=num_steps) as run:
        for line in parts.training.told():
            run.progress.tell(line)
        state = fit(parts.module, task, config, config.optimizer, run, num_steps=num_steps, callbacks=callbacks)
        size = parts.reward_model.batch_size
        best = RewardModel.load(run.folder / "best", setting="best", device=accelerator.device, batch_size=size)
        normalize(best, parts.own_samples)
        outcome = outcome_of(state.before, state.after, best)
        run.save_model("reward_model", lambda path: save_with_card(best, path, config, outcome))
        summary = run.finish(outcome)
        run.remove("best")  # last: a run that ends before its summary needs it again
        return summary


def load_parts(
    config: RewardConfig,
    accelerator: Accelerator,
    policy: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    data: Iterable[dict[str, Any]] | None,
    gold: RewardFunction | None,
) -> Parts:
    """Loads and checks all that the configuration names, and has the starting policy respond to the prompts."""
    policy, tokenizer = policy_with_tokenizer(
        config, policy, tokenizer, what="the supervised policy that the reward model starts from"
    )
    check_stop_ids(config.sampling, tokenizer)
    longest = min(config.max_length or 2**31, context_length(policy))
    rows, training, evaluated = load_rankings(config, data, tokenizer, longest)
    if gold is None and config.gold is not None:
        gold = load_reward(config.gold, setting="gold")
    policy.to(accelerator.device)
    prompt_rows = rows if config.prompts is None else prompts_given(config.prompts, config)
    own_samples = policy_samples(policy, tokenizer, prompt_rows, config)
    classifier = classifier_from(merged(policy))
    train_adapter(classifier, config.lora, heads=["score"])
    reward_model = RewardModel(classifier, tokenizer, batch_size=evaluation_batch(config.micro_batch_size))
    module = ComparisonModule(reward_model.network, policy if config.language_model_coef else None)
    return Parts(
        reward_model=reward_model,
        module=module.to(accelerator.device),
        training=training,
        held_out=evaluated,
        gold_orders=None if gold is None else [gold_pairs(ranking, gold) for ranking in evaluated.rankings],
        own_samples=own_samples,
    )


def load_rankings(
    config: RewardConfig, data: Iterable[dict[str, Any]] | None, tokenizer: PreTrainedTokenizerBase, longest: int
) -> tuple[Rows, EncodedRankings, EncodedRankings]:
    """The rows to train on, and rankings to train on and held-out ones, in tokens; none longer than `longest`."""
    rows, eval_rows = training_and_held_out(
        config,
        data,
        what="comparisons with `prompt`, `chosen` and `rejected`",
        read=lambda rows, setting: comparisons(rows, tokenizer, setting=setting),
        split=lambda rows: held_out(rows, config.eval_fraction, config.seed, setting="eval_fraction"),
    )
    rankings = rankings_of(rows, setting="data", ties=config.ties)
    eval_rankings = rankings_of(eval_rows, setting="eval_data")
    limits: dict[str, Any] = {"longest": longest, "too_long": config.too_long}
    return (
        rows,
        fitting(rankings, tokenizer, setting="data", **limits),
        fitting(eval_rankings, tokenizer, setting="eval_data", **limits),
    )


def comparison_loss(
    wrapped: nn.Module, training: EncodedRankings, batch: Sequence[int], count: Tensor, language_model_coef: float
) -> Tensor:
    """Σ over the batch's rankings of the mean loss of their pairs [+ coef · the mean NLL of their texts], ÷ count."""
    rankings = [training.rankings[row] for row in batch]
    lines = [line for row in batch for line in training.encoded[row]]
    scores, text_nll = wrapped(*right_padded(lines, count.device))
    better, worse, weights, margins = pair_tensors(rankings, scores.device)
    total = bradley_terry_loss(scores[better], scores[worse], margins, weight=weights, count=count)
    if not language_model_coef:
        return total
    shares = [1 / len(ranking.responses) for ranking in rankings for _ in ranking.responses]
    text_loss = (text_nll * torch.tensor(shares, device=scores.device)).sum() / count
    return total + language_model_coef * text_loss


class ComparisonModule(nn.Module):
    """What is trained: the scoring network, and where asked a language-modelling head on the same trunk."""

    def __init__(self, network: ScoringNetwork, policy: PreTrainedModel | None) -> None:
        """policy: lends its output embeddings, tied to the trunk's input embeddings where its own are."""
        super().__init__()
        self.network = network
        self._no_split_modules = network.classifier._no_split_modules  # the blocks that FSDP2 shards
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


def prompts_given(source: str, config: RewardConfig) -> Rows:
    """Rows of prompts to normalise on. Of the configuration's columns they need the prompt alone."""
    columns = {name: given for name, given in config.columns.items() if given == "prompt"}
    return load_rows(source, required=("prompt",), setting="prompts", columns=columns)


def policy_samples(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, config: RewardConfig
) -> tuple[list[str], list[str]]:
    """Prompts of the data and the starting policy's responses to them, on which the reward's mean and scale are set."""
    longest = context_length(policy) - config.sampling.max_new_tokens
    distinct = list({str(row["prompt"]): row for row in rows}.values())
    prompts = Prompts(distinct, tokenizer, longest=longest, setting="prompts")
    chosen = stream(len(prompts), 0, config.normalization_prompts, config.seed).tolist()
    noise = uniform_rows(list(range(len(chosen))), config.sampling.max_new_tokens, config.seed, "normalization")
    batch = prompts.batch(chosen, policy.device)
    return batch.texts, sample(policy, tokenizer, batch, config.sampling, noise).texts


def normalize(reward_model: RewardModel, own_samples: tuple[list[str], list[str]]) -> None:
    """Gives the reward model the mean and scale by which the starting policy's own samples score 0 ± 1.

    Where these all score the same, there is no scale to divide by, and it is 1.
    """
    raw = reward_model.raw_scores(reward_model.encode(*own_samples))
    mean, std = float(raw.mean()), float(raw.std(correction=0))
    reward_model.set_normalization(mean, 1.0 if is_constant(mean, std) else std)


def outcome_of(before: dict[str, float], after: dict[str, float], reward_model: RewardModel) -> dict[str, float]:
    """The outcome of a run in numbers. Accuracy is against the gold order where there is one, else the labels."""
    return {
        "pairwise_accuracy": after.get("eval/gold_accuracy", after["eval/accuracy"]),
        "label_accuracy": after["eval/accuracy"],
        "calibration_error": after["eval/calibration_error"],
        "loss_before": before["eval/loss"],
        "loss_after": after["eval/loss"],
        "mean": reward_model.mean,
        "scale": reward_model.scale,
    }


def save_with_card(reward_model: RewardModel, path: Path, config: RewardConfig, outcome: dict[str, float]) -> None:
    """The reward model's folder, with a README that says what its numbers mean."""
    reward_model.save(path, merge=config.lora.merge)
    (path / "README.md").write_text(model_card("reward", config.policy, outcome), encoding="utf-8")
