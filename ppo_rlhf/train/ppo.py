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
from ppo_rlhf.config import MissingEOS, PPOConfig
from ppo_rlhf.core import (
    Experience,
    adapt_kl_coef_proportional,
    approx_kl,
    gae,
    group_normalized,
    kl_shaped_rewards,
    leave_one_out,
    unit_variance,
    whiten,
)
from ppo_rlhf.optimizer import learning_rate, make_optimizer, set_learning_rate
from ppo_rlhf.rewards import RewardFunction, Scores, reference_moments, shaped, with_batch
from ppo_rlhf.rollout import Rollout, evaluate
from ppo_rlhf.run import LoopState, Run, begin, share_of, whole_weights
from ppo_rlhf.sampling import Responses, sample, warn_of_truncation
from ppo_rlhf.seeding import keyed_generator, uniform_rows
from ppo_rlhf.train import Callback
from ppo_rlhf.train.averaging import averaged, moving_average
from ppo_rlhf.train.bad_samples import bad_samples
from ppo_rlhf.train.ppo_evaluation import evaluate_held_out, summary_of
from ppo_rlhf.train.ppo_parts import Parts, load_parts
from ppo_rlhf.train.ppo_records import Clock, multiplied_type, rollout_metrics, sample_rows, throughput_metrics
from ppo_rlhf.train.pretraining import pretraining_of
from ppo_rlhf.train.scoring import scores_of
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
    before = None if config.resume else evaluate_held_out(parts, config, accelerator, LoopState())
    model, optimizer = accelerator.prepare(parts.model, make_optimizer(parts.model, config.optimizer))
    with start.run(num_steps=config.num_steps) as run:
        state = run.resume()
        if state is None:
            before = before or evaluate_held_out(parts, config, accelerator, LoopState())
            state = LoopState(kl_coef=config.kl_coef, before=before.metrics, matmul_precision=compute.precision)
            if config.score_shaping.normalize == "reference":
                state = replace(state, score_moments=reference_moments(before.metrics, len(before.rows)))
            state = with_average(state, model, parts, config)
            run.log(0, before.metrics)
            run.log_held_out(0, before.rows)
        elif state.matmul_precision not in ("", compute.precision):  # measured otherwise: go on as the run began
            compute = replace(compute, precision=use_products(state.matmul_precision))
        run.progress.tell(compute.message)

        while state.step < config.num_steps:
            clock = Clock()
            set_learning_rate(optimizer, learning_rate(config.optimizer, state.step, config.num_steps))
            state, metrics, samples, bad = ppo_step(state, model, optimizer, parts, config, accelerator, clock, compute)
            run.log_samples(samples)
            run.log_bad_samples(bad)
            kl_coef = next_kl_coef(state.kl_coef, metrics["objective/kl"], config)
            state = with_average(replace(state, step=state.step + 1, kl_coef=kl_coef), model, parts, config)
            state = evaluate_and_save(run, state, metrics, parts, config)
            for callback in callbacks:
                callback(state.step, metrics)
            run.stop_if_asked(state)

        with whole_weights(model), averaged(parts.model.language_model, state.tensors):
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
) -> tuple[LoopState, dict[str, float], list[dict[str, Any]], list[dict[str, Any]]]:
    """One rollout and its update; → the state with what was learnt of the scores, the step's metrics, rows for
    samples.jsonl, and those that spoilt the update.
    """
    step, size = state.step, config.batch_size
    mine = share_of(size, accelerator)
    rows = parts.rows_of(step, config)[mine]
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
            bootstrap=config.missing_eos.rule == "bootstrap",
        )
        clock.lap("evaluate")
    columns = parts.prompts.columns_of(rows)

    def scored(reward: RewardFunction) -> Scores:
        # One that is not finite makes all advantages NaN, and all of the update's steps are skipped.
        return scores_of(reward, prompts, responses, columns, parts.tokenizer, must_be_finite=False)

    scores = scored(parts.reward)
    gold = scored(parts.gold) if parts.gold is not None else None
    clock.lap("score")

    state, rewards = rewards_of(scores, rollout, responses, state, config, accelerator)
    experience = experience_of(rollout, rewards, responses.finished, config, accelerator)
    statistics = ppo_update(
        model,
        optimizer,
        experience,
        config.ppo,
        accelerator=accelerator,
        generator=keyed_generator(config.seed, "shuffle", step, accelerator.process_index),
        reference_kl_coef=0.0 if config.kl_penalty == "reward" else state.kl_coef,
        reference_kl_estimator="k3" if config.kl_penalty == "k3" else "k2",
        auxiliary_losses=pretraining_of(model, parts.texts, step, config, accelerator),
    )
    clock.lap("update")

    metrics = rollout_metrics(rollout, experience, scores, gold, rewards, responses, config, accelerator)
    if parts.texts:
        statistics["loss/pretraining"] = statistics.pop("loss/auxiliary") / config.pretraining.coef
    metrics |= statistics | clock.metrics(metrics["response/length"] * size)
    metrics |= throughput_metrics(rollout, metrics, parts.model, parts.reference, config, compute)
    metrics["memory/peak_gib"] = peak_memory_gib(accelerator.device)
    metrics |= {"kl_coef": state.kl_coef, "lr": optimizer.param_groups[0]["lr"], "episodes": (step + 1) * size}
    samples = sample_rows(step + 1, prompts, responses, scores.total, rollout, rewards, experience, parts.tokenizer)
    bad = []
    if metrics["skipped_steps"]:
        bad = bad_samples(step + 1, prompts, responses, scores.total, rollout, experience)
    return state, metrics, samples, bad


def rewards_of(
    scores: Scores,
    rollout: Rollout,
    responses: Responses,
    state: LoopState,
    config: PPOConfig,
    accelerator: Accelerator,
) -> tuple[LoopState, Tensor]:
    """Scores ► shaped ► the rule for a missing eos ► a reward for each token, with its KL penalty where it acts there.

    → the state, in which running normalisation knows of these scores too, and the rewards (B, T).
    """
    if config.score_shaping.normalize == "running":
        moments = with_batch(state.score_moments, scores.total, sum_across=accelerator.reduce)
        state = replace(state, score_moments=moments)
    paid = shaped(scores, rollout.mask.sum(1), config.score_shaping, state.score_moments)
    total = missing_eos_rule(paid.total, responses.finished, config.missing_eos, paid.dense)
    kl = approx_kl(rollout.logprobs, rollout.ref_logprobs, "k1")  # unbiased in the reward, where no gradient flows
    kl_coef = state.kl_coef if config.kl_penalty == "reward" else 0.0
    return state, kl_shaped_rewards(total, kl, rollout.mask, kl_coef=kl_coef, dense=paid.dense)


def experience_of(
    rollout: Rollout, rewards: Tensor, finished: Tensor, config: PPOConfig, accelerator: Accelerator
) -> Experience:
    """Rewards ► advantages and returns ► whitened advantages, over all processes.

    A response is terminated at its last generated token, whether it stopped or was cut off; with the rule `bootstrap`
    only where it stopped. Against the other responses to its prompt, all tokens of a response have one advantage.
    """
    mask = rollout.mask
    if config.whiten_rewards:
        rewards = unit_variance(rewards, mask, sum_across=accelerator.reduce)
    if config.advantage == "gae":
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = positions == torch.where(mask, positions, -1).max(dim=1, keepdim=True).values
        terminated = last & finished[:, None] if config.missing_eos.rule == "bootstrap" else last
        advantages, returns = gae(rewards, rollout.values, terminated, last, gamma=config.gamma, lam=config.gae_lambda)
        advantages = whiten(advantages, mask, sum_across=accelerator.reduce)
    else:
        relative = leave_one_out if config.advantage == "rloo" else group_normalized
        advantages = relative(rewards.sum(1), group_size=config.responses_per_prompt)[:, None].expand_as(rewards)
        returns = rollout.values[:, :-1]  # there is no value function to learn them
    return Experience(
        inputs=rollout.inputs,
        logprobs=rollout.logprobs,
        values=rollout.values[:, :-1],
        advantages=advantages,
        returns=returns,
        mask=mask,
        ref_logprobs=rollout.ref_logprobs,
    )


def missing_eos_rule(scores: Tensor, finished: Tensor, rule: MissingEOS, dense: Tensor | None = None) -> Tensor:
    """The scores as paid: those of responses that were cut off are set to a value, lowered by it, or not paid. (B,).

    dense (B, T): what was paid before the end, which a score that is not paid leaves as it is.
    """
    if rule.rule == "set":
        return torch.where(finished, scores, rule.value)
    if rule.rule == "subtract":
        return torch.where(finished, scores, scores - rule.value)
    if rule.rule == "bootstrap":
        return torch.where(finished, scores, 0.0 if dense is None else dense.sum(1))
    return scores


def with_average(state: LoopState, model: nn.Module, parts: Parts, config: PPOConfig) -> LoopState:
    """The state with the moving average of the policy's weights, where one is wanted."""
    if config.ema_decay is None:
        return state
    with whole_weights(model):
        return replace(state, tensors=moving_average(state.tensors, parts.model.language_model, config.ema_decay))


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
        outcome = evaluate_held_out(parts, config, run.accelerator, state, must_be_finite=False)
        metrics |= outcome.metrics
        run.log_held_out(state.step, outcome.rows)
        state = replace(state, after=outcome.metrics)
        if outcome.quality > state.best:
            state = replace(state, best=outcome.quality)
            with whole_weights(parts.model), averaged(parts.model.language_model, state.tensors):
                run.save_model("best", lambda path: parts.save_policy(path, config))
    run.log(state.step, metrics)
    if last or (config.save_every and state.step % config.save_every == 0):
        run.save_checkpoint(state)
    return state
