"""PPO on a language model: prompts ► sample ► evaluate ► score ► shape ► gae ► whiten ► update ► adapt ► log ► save.

`collect` goes as far as the scores, `learn` the rest of the way; `sample_ahead` collects the next rollout in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_rlhf.compute import Compute, peak_memory_gib, reset_peak_memory, set_up_products
from ppo_rlhf.config import PPOConfig
from ppo_rlhf.core import (
    Experience,
    adapt_kl_coef_proportional,
    approx_kl,
    unit_variance,
)
from ppo_rlhf.micro_batches import MicroBatch
from ppo_rlhf.models import save_value_head
from ppo_rlhf.optimizer import learning_rate, make_optimizer, set_learning_rate
from ppo_rlhf.prompts import PromptBatch
from ppo_rlhf.rewards import RewardFunction, Scores, reference_moments, with_batch
from ppo_rlhf.rollout import Rollout, evaluate
from ppo_rlhf.run import LoopState, Run, begin, share_of, whole_weights
from ppo_rlhf.sampling import Responses, Sampler, warn_of_truncation
from ppo_rlhf.seeding import keyed_generator, uniform_rows
from ppo_rlhf.train import Callback
from ppo_rlhf.train.averaging import averaged, moving_average
from ppo_rlhf.train.bad_samples import bad_samples
from ppo_rlhf.train.extensions import Extensions, load_extensions
from ppo_rlhf.train.ppo_batch import Batch, Scoring, prompts_of, restored_batch, scoring_thread, tensors_of
from ppo_rlhf.train.ppo_credit import AdvantageEstimator, RewardShaping, response_advantages
from ppo_rlhf.train.ppo_evaluation import Outcome, evaluate_held_out, summary_of
from ppo_rlhf.train.ppo_parts import Parts, load_parts
from ppo_rlhf.train.ppo_records import (
    Clock,
    multiplied_type,
    recorded_logprobs,
    rollout_metrics,
    sample_rows,
    throughput_metrics,
)
from ppo_rlhf.train.pretraining import pretraining_of
from ppo_rlhf.update import AuxiliaryLosses, ppo_update


def train(
    config: PPOConfig,
    *,
    policy: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reference: PreTrainedModel | None = None,
    reward: RewardFunction | None = None,
    gold: RewardFunction | None = None,
    prompts: Iterable[dict[str, Any]] | None = None,
    sampler: Sampler | None = None,
    reward_shaping: RewardShaping | None = None,
    advantage: AdvantageEstimator | None = None,
    callbacks: Iterable[Callback] = (),
) -> dict[str, Any]:
    """Tunes the policy to the reward, held near the reference by a per-token KL penalty; → the run's summary.

    policy with tokenizer, reference, reward, gold, prompts (rows), sampler, reward_shaping, advantage: objects that
    take the place of the configuration's names. callbacks: called after each step with its number and metrics, before
    those that the configuration names.

    Raises UserError for what is wrong with the configuration, the data, or what the reward function returns.
    """
    start = begin(config, "ppo")
    if start is None:
        return {"finished": config.output_dir}
    warn_of_truncation(config.sampling)
    accelerator = start.accelerator
    compute = set_up_products(start.matmul_precision, accelerator.device, multiplied_type(accelerator))
    extensions = load_extensions(config, sampler, reward_shaping, advantage, callbacks)
    parts = load_parts(config, accelerator, policy, tokenizer, reference, reward, gold, prompts, extensions)
    # Before the folder is made: a reward function that fails leaves nothing behind.
    first = None if config.resume else first_state(parts, config, accelerator)
    apart = parts.model.value_parameters()
    optimizer = make_optimizer(parts.model, config.optimizer, apart=apart, lr_apart=config.value_lr)
    model, optimizer = accelerator.prepare(parts.model, optimizer)
    with start.run(num_steps=config.num_steps) as run, scoring_thread() as worker:
        state = run.resume()
        if state is None:
            state, before = first or first_state(parts, config, accelerator)
            state = with_average(state, model, parts, config)
            run.log(0, before.metrics)
            run.log_held_out(0, before.rows)
        for line in (compute.message, *parts.prompts.told()):
            run.progress.tell(line)
        state, ahead = restored_batch(state, parts, config, accelerator)

        while state.step < config.num_steps:
            reset_peak_memory(accelerator.device)
            batch = ahead or collect(state.step, model, parts, config, accelerator, worker)
            ahead = None
            if config.sample_ahead and state.step + 1 < config.num_steps:
                ahead = collect(state.step + 1, model, parts, config, accelerator, worker)
            set_learning_rate(optimizer, learning_rate(config.optimizer, state.step, config.num_steps))
            state, metrics, samples, bad = learn(batch, state, model, optimizer, parts, config, accelerator, compute)
            run.log_samples(samples)
            run.log_bad_samples(bad)
            kl_coef = next_kl_coef(state.kl_coef, metrics["objective/kl"], config)
            state = replace(state, step=state.step + 1, kl_coef=kl_coef)
            state = with_average(state, model, parts, config)
            state = evaluate_and_save(run, state, metrics, ahead, parts, config)
            for callback in extensions.callbacks:
                callback(state.step, metrics)
            run.stop_if_asked(state, partial(tensors_of, ahead))

        summary = summary_of(state.before, state.after)
        save_models(run, state, model, parts, config, summary)
        return run.finish(summary)


def first_state(parts: Parts, config: PPOConfig, accelerator: Accelerator) -> tuple[LoopState, Outcome]:
    """The state before the first step, and the policy that the run starts from on the held-out prompts.

    Scores that are normalised by the reference have its moments from there on. Raises UserError where it gives none.
    """
    before = evaluate_held_out(parts, config, accelerator, LoopState(kl_coef=config.kl_coef))
    state = LoopState(kl_coef=config.kl_coef, before=before.metrics)
    if config.score_shaping.normalize == "reference":
        state = replace(state, score_moments=reference_moments(before.metrics, len(before.rows)))
    return state, before


def save_models(
    run: Run, state: LoopState, model: nn.Module, parts: Parts, config: PPOConfig, summary: dict[str, Any]
) -> None:
    """The policy, its average weights where the run keeps some, and its value head, each into a folder of the run's."""
    with whole_weights(model), averaged(parts.model.language_model, state.tensors):
        run.save_model("policy", lambda path: parts.save_policy(path, config, summary))
        if parts.model.value_head is not None:
            head = parts.model.value_head
            run.save_model("value_head", lambda path: save_value_head(head, path))


def collect(
    step: int, model: nn.Module, parts: Parts, config: PPOConfig, accelerator: Accelerator, worker: Executor
) -> Batch:
    """prompts ► sample ► evaluate ► score: a rollout of the policy as it is now. Its scores may be under way still."""
    clock = Clock()
    prompts = prompts_of(step, parts, config, accelerator)
    places = range(config.batch_size)[share_of(config.batch_size, accelerator)]
    noise = uniform_rows(list(places), config.sampling.max_new_tokens, config.seed, "sample", step)
    early = config.overlap_scoring > 0
    scoring = Scoring(prompts, parts, worker if early or config.sample_ahead else None)
    with accelerator.autocast():
        with whole_weights(model):
            responses = parts.extensions.sampler(
                parts.model.language_model,
                parts.tokenizer,
                prompts,
                config.sampling,
                noise,
                on_finished=scoring.add if early else None,
                group_size=config.overlap_scoring,
            )
        if not scoring.groups:
            scoring.add(range(len(prompts)), responses)
        clock.lap("sample")

        rollout = evaluate_fitting(model, parts.reference, prompts, responses, parts.micro_batch, config)
        clock.lap("evaluate")
    return Batch(prompts, responses, rollout, scoring.scores, clock)


def evaluate_fitting(
    model: nn.Module,
    reference: PreTrainedModel,
    prompts: PromptBatch,
    responses: Responses,
    micro_batch: MicroBatch,
    config: PPOConfig,
) -> Rollout:
    """Evaluates as many responses at once as fit in memory."""

    def evaluated(batch_size: int) -> Rollout:
        return evaluate(
            model,
            reference,
            prompts,
            responses,
            temperature=config.sampling.temperature,
            batch_size=batch_size,
            bootstrap=config.missing_eos.rule == "bootstrap",
        )

    return micro_batch.fitting(evaluated, len(prompts))


def learn(
    batch: Batch,
    state: LoopState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: Parts,
    config: PPOConfig,
    accelerator: Accelerator,
    compute: Compute,
) -> tuple[LoopState, dict[str, float], list[dict[str, Any]], list[dict[str, Any]]]:
    """shape ► gae ► whiten ► update; → the state with what was learnt of the scores, the step's metrics, rows for
    samples.jsonl, and those that spoilt the update.
    """
    prompts, responses, rollout, clock = batch.prompts, batch.responses, batch.rollout, batch.clock
    clock.go_on()
    scores, *gold_scores = (found.to(accelerator.device) for found in batch.scores())
    gold = gold_scores[0] if gold_scores else None
    clock.lap("score")
    after_epochs: list[Tensor] = []  # log π of the recorded responses
    state, rewards, experience, statistics = improve(
        rollout,
        scores,
        responses.finished,
        state,
        model,
        optimizer,
        parts.micro_batch,
        config,
        accelerator,
        parts.extensions,
        auxiliary_losses=pretraining_of(model, parts.texts, state.step, config, accelerator),
        after_epoch=lambda: after_epochs.append(recorded_logprobs(model, rollout)),
    )
    clock.lap("update")

    step = state.step + 1
    metrics = rollout_metrics(rollout, experience, scores, gold, rewards, responses, config, accelerator)
    if parts.texts:
        statistics["loss/pretraining"] = statistics.pop("loss/auxiliary") / config.pretraining.coef
    metrics |= statistics | clock.metrics(metrics["response/length"] * config.batch_size)
    metrics |= throughput_metrics(rollout, metrics, parts.model, parts.reference, config, compute)
    metrics["memory/peak_gib"] = peak_memory_gib(accelerator.device)
    metrics |= {"kl_coef": state.kl_coef, "lr": optimizer.param_groups[0]["lr"], "episodes": step * config.batch_size}
    samples = sample_rows(
        step,
        prompts,
        responses,
        scores,
        gold,
        rollout,
        rewards,
        experience,
        after_epochs,
        parts.tokenizer,
        kl_coef=state.kl_coef,
    )
    bad = []
    if metrics["skipped_steps"]:
        bad = bad_samples(step, prompts, responses, scores.total, rollout, experience)
    return state, metrics, samples, bad


def improve(
    rollout: Rollout,
    scores: Scores,
    finished: Tensor,
    state: LoopState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batch: MicroBatch,
    config: PPOConfig,
    accelerator: Accelerator,
    extensions: Extensions,
    *,
    auxiliary_losses: AuxiliaryLosses | None = None,
    after_epoch: Callable[[], None] | None = None,
) -> tuple[LoopState, Tensor, Experience, dict[str, float]]:
    """Improves the policy on a scored rollout; → the state with what was learnt of the scores, the rewards (B, T), what
    was trained on, and the update's statistics. finished (B,): responses that were not cut off.
    """
    kl = approx_kl(rollout.logprobs, rollout.ref_logprobs, "k1")  # unbiased in the reward, where no gradient flows
    if config.score_shaping.normalize == "running":
        moments = with_batch(state.score_moments, scores.total, sum_across=accelerator.reduce)
        state = replace(state, score_moments=moments)
    mask, moments = rollout.mask, state.score_moments
    rewards = extensions.reward_shaping(scores, kl, mask, finished, config, moments=moments, kl_coef=state.kl_coef)
    experience = experience_of(rollout, rewards, finished, config, accelerator, advantage=extensions.advantage)
    statistics = ppo_update(
        model,
        optimizer,
        experience,
        config.ppo,
        accelerator=accelerator,
        generator=keyed_generator(config.seed, "shuffle", state.step, accelerator.process_index),
        micro_batch=micro_batch,
        reference_kl_coef=0.0 if config.kl_penalty == "reward" else state.kl_coef,
        reference_kl_estimator="k3" if config.kl_penalty == "k3" else "k2",
        auxiliary_losses=auxiliary_losses,
        after_epoch=after_epoch,
    )
    return state, rewards, experience, statistics


def experience_of(
    rollout: Rollout,
    rewards: Tensor,
    finished: Tensor,
    config: PPOConfig,
    accelerator: Accelerator,
    *,
    advantage: AdvantageEstimator = response_advantages,
) -> Experience:
    """Rewards ► advantages and returns, by the estimator.

    A response is terminated at its last generated token, whether it stopped or was cut off; with the rule `bootstrap`
    only where it stopped.
    """
    mask, reduce = rollout.mask, accelerator.reduce
    if config.whiten_rewards:
        rewards = unit_variance(rewards, mask, sum_across=reduce)
    terminated = finished if config.missing_eos.rule == "bootstrap" else torch.ones_like(finished)
    advantages, returns = advantage(rewards, rollout.values, mask, terminated, config, sum_across=reduce)
    return Experience(
        inputs=rollout.inputs,
        logprobs=rollout.logprobs,
        values=rollout.values[:, :-1],
        advantages=advantages,
        returns=returns,
        mask=mask,
        ref_logprobs=rollout.ref_logprobs,
    )


def with_average(state: LoopState, model: nn.Module, parts: Parts, config: PPOConfig) -> LoopState:
    """The state with the moving average of the policy's weights, where one is wanted."""
    if config.ema_decay is None:
        return state
    with whole_weights(model):
        average = moving_average(state.tensors, parts.model.language_model, config.ema_decay)
    return replace(state, tensors=state.tensors | average)


def next_kl_coef(kl_coef: float, kl: float, config: PPOConfig) -> float:
    """β of the next step: fixed, or adapted to the target KL by the global batch's mean KL to the reference."""
    if config.kl_target is None or not math.isfinite(kl):
        return kl_coef
    return adapt_kl_coef_proportional(
        kl_coef, kl, target=config.kl_target, horizon=config.kl_horizon, num_episodes=config.batch_size
    )


def evaluate_and_save(
    run: Run, state: LoopState, metrics: dict[str, float], ahead: Batch | None, parts: Parts, config: PPOConfig
) -> LoopState:
    """The end of a step: evaluation where one is due, the best policy kept, metrics logged, a checkpoint where due."""
    last = state.step == config.num_steps
    if last or (config.eval_every and state.step % config.eval_every == 0):
        if ahead is not None:
            ahead.scores()  # are there then: rewards are called one after the other
        outcome = evaluate_held_out(parts, config, run.accelerator, state, must_be_finite=False)
        metrics |= outcome.metrics
        run.log_held_out(state.step, outcome.rows)
        state = replace(state, after=outcome.metrics)
        if outcome.quality > state.best:
            state = replace(state, best=outcome.quality)
            with whole_weights(parts.model), averaged(parts.model.language_model, state.tensors):
                run.save_model("best", lambda path: parts.save_policy(path, config, outcome.metrics))
    run.log(state.step, metrics)
    if last or (config.save_every and state.step % config.save_every == 0):
        run.save_checkpoint(state, partial(tensors_of, ahead))
    return state
