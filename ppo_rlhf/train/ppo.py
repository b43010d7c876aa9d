"""PPO on a language model: prompts ► sample ► evaluate ► score ► shape ► gae ► whiten ► update ► adapt ► log ► save."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_rlhf.compute import Compute, peak_memory_gib, set_up_products, use_products
from ppo_rlhf.config import PPOConfig
from ppo_rlhf.core import (
    Experience,
    adapt_kl_coef_proportional,
    approx_kl,
    kl_shaped_rewards,
    unit_variance,
    whiten,
)
from ppo_rlhf.data import stream
from ppo_rlhf.optimizer import learning_rate, make_optimizer, set_learning_rate
from ppo_rlhf.rewards import RewardFunction, score
from ppo_rlhf.rollout import Rollout, evaluate
from ppo_rlhf.run import LoopState, Run, begin, share_of, whole_weights
from ppo_rlhf.sampling import sample, warn_of_truncation
from ppo_rlhf.seeding import keyed_generator, uniform_rows
from ppo_rlhf.train import Callback
from ppo_rlhf.train.bad_samples import bad_samples
from ppo_rlhf.train.ppo_credit import missing_eos_rule, response_gae
from ppo_rlhf.train.ppo_evaluation import evaluate_held_out, summary_of
from ppo_rlhf.train.ppo_parts import Parts, load_parts
from ppo_rlhf.train.ppo_records import (
    Clock,
    multiplied_type,
    recorded_logprobs,
    rollout_metrics,
    sample_rows,
    throughput_metrics,
)
from ppo_rlhf.update import ppo_update


def train(
    config: PPOConfig,
    *,
    policy: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reference: PreTrainedModel | None = None,
    reward: RewardFunction | None = None,
    gold: RewardFunction | None = None,
    prompts: Iterable[dict[str, Any]] | None = None,
    callbacks: Iterable[Callback] = (),
) -> dict[str, Any]:
    """Tunes the policy to the reward, held near the reference by a per-token KL penalty; → the run's summary.

    policy with tokenizer, reference, reward, gold, prompts (rows): objects that take the place of the configuration's
    names. callbacks: called after each step with its number and metrics.

    Raises UserError for what is wrong with the configuration, the data, or what the reward function returns.
    """
    start = begin(config, "ppo")
    if start is None:
        return {"finished": config.output_dir}
    warn_of_truncation(config.sampling)
    accelerator = start.accelerator
    compute = set_up_products(config.matmul_precision, accelerator.device, multiplied_type(accelerator))
    parts = load_parts(config, accelerator, policy, tokenizer, reference, reward, gold, prompts)
    # Before the folder is made: a reward function that fails leaves nothing behind.
    before = None if config.resume else evaluate_held_out(parts, config, accelerator, kl_coef=config.kl_coef)
    model, optimizer = accelerator.prepare(parts.model, make_optimizer(parts.model, config.optimizer))
    with start.run(num_steps=config.num_steps) as run:
        state = run.resume()
        if state is None:
            before = before or evaluate_held_out(parts, config, accelerator, kl_coef=config.kl_coef)
            state = LoopState(kl_coef=config.kl_coef, before=before.metrics, matmul_precision=compute.precision)
            run.log(0, before.metrics)
            run.log_held_out(0, before.rows)
        elif state.matmul_precision not in ("", compute.precision):  # measured otherwise: go on as the run began
            compute = replace(compute, precision=use_products(state.matmul_precision))
        run.progress.tell(compute.message)

        while state.step < config.num_steps:
            clock = Clock()
            set_learning_rate(optimizer, learning_rate(config.optimizer, state.step, config.num_steps))
            metrics, samples, bad = ppo_step(state, model, optimizer, parts, config, accelerator, clock, compute)
            run.log_samples(samples)
            run.log_bad_samples(bad)
            kl_coef = next_kl_coef(state.kl_coef, metrics["objective/kl"], config)
            state = replace(state, step=state.step + 1, kl_coef=kl_coef)
            state = evaluate_and_save(run, state, metrics, parts, config)
            for callback in callbacks:
                callback(state.step, metrics)
            run.stop_if_asked(state)

        with whole_weights(model):
            run.save_model("policy", lambda path: parts.save_policy(path, config))
        return run.finish(summary_of(state.before, state.after))


def ppo_step(
    state: LoopState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: Parts,
    config: PPOConfig,
    accelerator: Accelerator,
    clock: Clock,
    compute: Compute,
) -> tuple[dict[str, float], list[dict[str, Any]], list[dict[str, Any]]]:
    """One rollout and its update; → the step's metrics, rows for samples.jsonl, and those that spoilt the update."""
    step, size = state.step, config.batch_size
    mine = share_of(size, accelerator)
    rows = stream(len(parts.prompts), step * size, (step + 1) * size, config.seed)[mine].tolist()
    prompts = parts.prompts.batch(rows, accelerator.device)
    noise = uniform_rows(list(range(size))[mine], config.sampling.max_new_tokens, config.seed, "sample", step)
    with accelerator.autocast():
        with whole_weights(model):
            responses = sample(parts.model.language_model, parts.tokenizer, prompts, config.sampling, noise)
        clock.lap("sample")
        rollout = evaluate(
            model,
            parts.reference,
            prompts,
            responses,
            temperature=config.sampling.temperature,
            batch_size=config.ppo.micro_batch_size or size,
        )
        clock.lap("evaluate")
    columns = parts.prompts.columns_of(rows)

    def scored(reward: RewardFunction) -> Tensor:
        # One that is not finite makes all advantages NaN, and all of the update's steps are skipped.
        found = score(reward, prompts.texts, responses.texts, columns, must_be_finite=False)
        return found.total.to(accelerator.device)

    scores = scored(parts.reward)
    gold = scored(parts.gold) if parts.gold is not None else None
    clock.lap("score")

    kl = approx_kl(rollout.logprobs, rollout.ref_logprobs, "k1")  # unbiased in the reward, where no gradient flows
    paid = missing_eos_rule(scores, responses.finished, config.missing_eos)
    rewards = kl_shaped_rewards(paid, kl, rollout.mask, kl_coef=state.kl_coef)
    experience = experience_of(rollout, rewards, config, accelerator)
    after_epochs: list[Tensor] = []
    statistics = ppo_update(
        model,
        optimizer,
        experience,
        config.ppo,
        accelerator=accelerator,
        generator=keyed_generator(config.seed, "shuffle", step, accelerator.process_index),
        after_epoch=lambda: after_epochs.append(recorded_logprobs(model, rollout)),
    )
    clock.lap("update")

    metrics = rollout_metrics(rollout, experience, scores, gold, rewards, responses, accelerator)
    metrics |= statistics | clock.metrics(metrics["response/length"] * size)
    metrics |= throughput_metrics(rollout, metrics, parts.model, parts.reference, config, compute)
    metrics["memory/peak_gib"] = peak_memory_gib(accelerator.device)
    metrics |= {"kl_coef": state.kl_coef, "lr": optimizer.param_groups[0]["lr"], "episodes": (step + 1) * size}
    known = (rollout, rewards, experience, after_epochs)
    samples = sample_rows(step + 1, prompts, responses, scores, gold, *known, parts.tokenizer, kl_coef=state.kl_coef)
    bad = bad_samples(step + 1, prompts, responses, scores, rollout, experience) if metrics["skipped_steps"] else []
    return metrics, samples, bad


def experience_of(rollout: Rollout, rewards: Tensor, config: PPOConfig, accelerator: Accelerator) -> Experience:
    """Rewards ► advantages and returns ► whitened advantages, over all processes."""
    mask = rollout.mask
    if config.whiten_rewards:
        rewards = unit_variance(rewards, mask, sum_across=accelerator.reduce)
    advantages, returns = response_gae(rewards, rollout.values, mask, gamma=config.gamma, lam=config.gae_lambda)
    return Experience(
        inputs=rollout.inputs,
        logprobs=rollout.logprobs,
        values=rollout.values[:, :-1],
        advantages=whiten(advantages, mask, sum_across=accelerator.reduce),
        returns=returns,
        mask=mask,
    )


def next_kl_coef(kl_coef: float, kl: float, config: PPOConfig) -> float:
    """β of the next step: fixed, or adapted to the target KL by the global batch's mean KL to the reference."""
    if config.kl_target is None or not math.isfinite(kl):
        return kl_coef
    return adapt_kl_coef_proportional(
        kl_coef, kl, target=config.kl_target, horizon=config.kl_horizon, num_episodes=config.batch_size
    )


def evaluate_and_save(
    run: Run, state: LoopState, metrics: dict[str, float], parts: Parts, config: PPOConfig
) -> LoopState:
    """The end of a step: evaluation where one is due, the best policy kept, metrics logged, a checkpoint where due."""
    last = state.step == config.num_steps
    if last or (config.eval_every and state.step % config.eval_every == 0):
        outcome = evaluate_held_out(parts, config, run.accelerator, kl_coef=state.kl_coef, must_be_finite=False)
        metrics |= outcome.metrics
        run.log_held_out(state.step, outcome.rows)
        state = replace(state, after=outcome.metrics)
        if outcome.quality > state.best:
            state = replace(state, best=outcome.quality)
            with whole_weights(parts.model):
                run.save_model("best", lambda path: parts.save_policy(path, config))
    run.log(state.step, metrics)
    if last or (config.save_every and state.step % config.save_every == 0):
        run.save_checkpoint(state)
    return state
