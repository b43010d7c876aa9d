"""`ppo_update`, `measured_kl` and the optimizer, with policies small enough to follow."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, PartialState
from torch import nn

from ppo_rlhf.core import Evaluation, Experience, exact_kl, whiten
from ppo_rlhf.errors import UserError
from ppo_rlhf.optimizer import (
    OptimizerSettings,
    learning_rate,
    make_optimizer,
    optimizer_bytes,
    set_learning_rate,
)
from ppo_rlhf.settings import PPOSettings
from ppo_rlhf.update import _gradient, _loss_gradient, _loss_settings, measured_kl, ppo_update

NUM_ACTIONS = 3
NO_CLIPPING = 1e9  # of the gradient's norm


class TinyPolicy(nn.Module):
    """An MLP over four features that keeps the contract: policy(**inputs) -> Evaluation, each (B, T)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.trunk, self.actor, self.critic = nn.Linear(4, 6), nn.Linear(6, NUM_ACTIONS), nn.Linear(6, 1)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        self.double()
        self.num_calls = 0

    def forward(self, observations, actions):
        self.num_calls += 1
        features = self.trunk(observations).tanh()
        logits = self.actor(features)
        logprobs = logits.log_softmax(-1)
        taken = logprobs.gather(-1, actions[..., None]).squeeze(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return Evaluation(taken, entropy, self.critic(features).squeeze(-1), distribution=logits)


def rollout_of(policy, lengths=(5, 1, 3, 2, 5, 4, 1, 2), *, steps=5, seed=0):
    """Decisions sampled by the policy, in rows of unequal lengths, with random advantages and returns."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), steps)
    observations = torch.randn(*shape, 4, generator=generator, dtype=torch.float64)
    actions = torch.randint(NUM_ACTIONS, shape, generator=generator)
    with torch.no_grad():
        old = policy(observations, actions)
    return Experience(
        inputs={"observations": observations, "actions": actions},
        logprobs=old.logprobs,
        values=old.values,
        advantages=torch.randn(shape, generator=generator, dtype=torch.float64),
        returns=torch.randn(shape, generator=generator, dtype=torch.float64),
        mask=torch.arange(steps) < torch.tensor(lengths)[:, None],
        distribution=old.distribution,
    )


def sgd(policy, lr=0.1):
    return torch.optim.SGD(policy.parameters(), lr=lr)


def count_steps(optimizer):
    """A list that grows by one at every real step of the optimizer."""
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    return steps


def update(policy, experience, settings=None, *, optimizer=None, seed=0, **changes):
    """One `ppo_update` in this process alone; by default one step of plain gradient descent."""
    if not isinstance(settings, PPOSettings):
        settings = PPOSettings(**{"num_epochs": 1, "max_grad_norm": NO_CLIPPING, **(settings or {})})
    return ppo_update(
        policy,
        optimizer or sgd(policy),
        experience,
        settings,
        accelerator=Accelerator(cpu=True),
        generator=torch.Generator().manual_seed(seed),
        **changes,
    )


def kl_after(policy, experience, **changes):
    return measured_kl(policy, experience, PPOSettings(), accelerator=Accelerator(cpu=True), **changes)


def parameters_of(policy):
    return [parameter.detach().clone() for parameter in policy.parameters()]


def assert_same_parameters(actual, expected, *, rtol=1e-6):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-10)


def assert_unchanged(policy, before):
    assert all(torch.equal(now, then) for now, then in zip(policy.parameters(), before, strict=True))


def assert_changed(policy, before):
    assert any(not torch.equal(now, then) for now, then in zip(policy.parameters(), before, strict=True))


def change_rows(experience, **fields):
    return dataclasses.replace(experience, **fields)


# How many steps.


@pytest.mark.parametrize(
    ("num_epochs", "num_minibatches", "micro_batch_size"),
    [
        (1, 1, None),
        (4, 1, None),
        (1, 4, None),
        (3, 2, None),
        (2, 8, None),
        (3, 2, 1),
        (3, 2, 3),
        (2, 4, 2),
        (2, 1, 100),
    ],
)
def test_an_update_takes_epochs_times_minibatches_steps(num_epochs, num_minibatches, micro_batch_size):
    policy = TinyPolicy()
    experience, optimizer = rollout_of(policy), sgd(policy)
    steps = count_steps(optimizer)
    policy.num_calls = 0
    settings = PPOSettings(num_epochs=num_epochs, num_minibatches=num_minibatches, micro_batch_size=micro_batch_size)
    metrics = update(policy, experience, settings, optimizer=optimizer)
    planned = num_epochs * num_minibatches
    assert len(steps) == metrics["optimizer_steps"] == planned
    assert metrics["skipped_steps"] == metrics["stopped_steps"] == 0
    rows = 8 // num_minibatches
    assert policy.num_calls == planned * math.ceil(rows / (micro_batch_size or rows))


@pytest.mark.parametrize("num_minibatches", [3, 5, 16])
def test_minibatches_must_divide_the_rows(num_minibatches):
    policy = TinyPolicy()
    experience, before = rollout_of(policy), parameters_of(policy)
    with pytest.raises(ValueError, match=f"num_minibatches={num_minibatches} does not divide the 8 rows"):
        update(policy, experience, settings={"num_minibatches": num_minibatches})
    assert_unchanged(policy, before)


def test_an_update_leaves_no_gradient_behind():
    policy = TinyPolicy()
    update(policy, rollout_of(policy))
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_every_epoch_sees_every_row_in_a_new_order():
    policy = TinyPolicy()
    experience = rollout_of(policy)
    seen = []
    policy.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(kwargs["observations"][:, 0, 0].tolist()), with_kwargs=True
    )
    update(policy, experience, settings={"num_epochs": 3, "num_minibatches": 4})
    epochs = [seen[start : start + 8] for start in (0, 8, 16)]
    rows = sorted(experience.inputs["observations"][:, 0, 0].tolist())
    assert [sorted(epoch) for epoch in epochs] == [rows] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


# What a step is.


def hand_computed_step(policy, experience, *, lr, value_coef, max_grad_norm):
    """Plain gradient descent at the old policy, where PPO's gradient is that of −A·log π + c·½(V − R)²."""
    policy = copy.deepcopy(policy)
    evaluation = policy(**experience.inputs)
    mask = experience.mask
    actor = -(experience.advantages * evaluation.logprobs)[mask].sum() / mask.sum()
    critic = 0.5 * ((evaluation.values - experience.returns) ** 2)[mask].sum() / mask.sum()
    gradients = torch.autograd.grad(actor + value_coef * critic, list(policy.parameters()))
    norm = math.sqrt(sum((gradient**2).sum().item() for gradient in gradients))
    scale = min(1.0, max_grad_norm / norm)
    return [p.detach() - lr * scale * g for p, g in zip(policy.parameters(), gradients, strict=True)], norm


@pytest.mark.parametrize("max_grad_norm", [NO_CLIPPING, 0.01])
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_a_step_is_the_policy_gradient_with_its_norm_clipped_once(max_grad_norm, micro_batch_size):
    policy = TinyPolicy()
    experience = rollout_of(policy)
    expected, norm = hand_computed_step(policy, experience, lr=0.1, value_coef=0.3, max_grad_norm=max_grad_norm)
    settings = {"value_coef": 0.3, "max_grad_norm": max_grad_norm, "micro_batch_size": micro_batch_size}
    metrics = update(policy, experience, settings=settings)
    # clip_grad_norm_ adds 1e-6 to the norm; the count divides in float32.
    assert_same_parameters(policy.parameters(), expected, rtol=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-6)  # before clipping
    assert norm > 0.01


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5, 7, 8])
def test_how_a_minibatch_is_split_changes_nothing(micro_batch_size):
    """Rows of unequal lengths, several epochs, every term of the loss: parameters and statistics stay."""
    terms = {
        "num_epochs": 3,
        "num_minibatches": 1,
        "max_grad_norm": 0.5,
        "entropy_coef": 0.05,
        "dual_clip": 3.0,
        "clip_range": 0.02,
        "value_clip_range": 0.05,
    }
    results = []
    for size in (None, micro_batch_size):
        policy = TinyPolicy()
        experience = rollout_of(policy)
        settings = PPOSettings(**terms, micro_batch_size=size)
        metrics = update(policy, experience, settings, kl_penalty_coef=0.3)
        results.append((parameters_of(policy), metrics))
    (whole, metrics), (split, split_metrics) = results
    assert_same_parameters(split, whole, rtol=1e-9)
    assert split_metrics == pytest.approx(metrics, rel=1e-6)
    assert 0 < metrics["policy/clip_fraction"] < 1


def test_padding_changes_nothing():
    """Three more columns of masked NaN log-probabilities, values and advantages."""
    results = []
    for steps in (5, 8):
        policy = TinyPolicy()
        experience = rollout_of(policy)
        padding = steps - 5

        def padded(x, fill, padding=padding):
            return torch.cat([x, torch.full((8, padding, *x.shape[2:]), fill, dtype=x.dtype)], dim=1)

        experience = Experience(
            inputs={name: padded(x, 0) for name, x in experience.inputs.items()},
            **{n: padded(getattr(experience, n), math.nan) for n in ("logprobs", "values", "advantages", "returns")},
            mask=padded(experience.mask, False),
        )
        metrics = update(policy, experience, settings={"num_epochs": 2, "entropy_coef": 0.1}, kl_penalty_coef=0.1)
        results.append((parameters_of(policy), metrics))
    assert_same_parameters(results[1][0], results[0][0], rtol=1e-9)
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-6)


def test_single_steps_in_one_minibatch_are_the_same_as_whole_rows():
    results = []
    for view in (lambda experience: experience, lambda experience: experience.by_step()):
        policy = TinyPolicy()
        update(policy, view(rollout_of(policy)))
        results.append(parameters_of(policy))
    assert_same_parameters(results[1], results[0])


def test_the_first_step_starts_at_ratio_one():
    policy = TinyPolicy()
    experience = rollout_of(policy)
    mean_advantage = experience.advantages[experience.mask].mean().item()
    metrics = update(policy, experience, settings={"micro_batch_size": 3})
    assert metrics["policy/ratio"] == pytest.approx(1, rel=1e-6)
    assert metrics["policy/approx_kl"] == pytest.approx(0, abs=1e-12)
    assert metrics["policy/clip_fraction"] == 0
    assert metrics["loss/policy"] == pytest.approx(-mean_advantage, rel=1e-6)


def test_the_statistics_are_means_over_the_steps():
    """Two steps of one epoch each, measured apart, average to what one update of two epochs reports."""
    policy = TinyPolicy()
    experience = rollout_of(policy)
    apart = [update(policy, experience) for _ in range(2)]
    policy = TinyPolicy()
    together = update(policy, experience, settings={"num_epochs": 2})
    for name in ("loss/policy", "loss/value", "objective/entropy", "policy/approx_kl", "policy/ratio", "grad_norm"):
        assert together[name] == pytest.approx(sum(metrics[name] for metrics in apart) / 2)
    assert together["policy/approx_kl"] > 0


def test_an_update_raises_the_probability_of_decisions_with_an_advantage():
    policy = TinyPolicy()
    experience = rollout_of(policy)
    update(policy, experience, settings={"num_epochs": 20, "value_coef": 0.0, "clip_range": None})
    gain = policy(**experience.inputs).logprobs - experience.logprobs
    assert (gain * experience.advantages)[experience.mask].mean() > 0


def test_the_value_coefficient_alone_moves_the_critic():
    policy = TinyPolicy()
    experience = rollout_of(policy)
    before = parameters_of(policy.critic)
    update(policy, experience, settings={"value_coef": 0.0})
    assert_unchanged(policy.critic, before)
    update(policy, experience, settings={"value_coef": 0.1})
    assert_changed(policy.critic, before)


def test_a_frozen_parameter_stays():
    policy = TinyPolicy()
    experience = rollout_of(policy)
    policy.trunk.requires_grad_(False)
    before = parameters_of(policy.trunk)
    update(policy, experience, settings={"max_grad_norm": 0.1})
    assert_unchanged(policy.trunk, before)


@pytest.mark.parametrize("whitening", ["rollout", "minibatch", "none"])
def test_minibatches_that_are_whitened_forget_the_scale_of_the_advantages(whitening):
    results = []
    for scale, shift in ((1.0, 0.0), (3.0, 7.0)):
        policy = TinyPolicy()
        experience = rollout_of(policy)
        experience = change_rows(experience, advantages=scale * experience.advantages + shift)
        update(policy, experience, settings={"num_minibatches": 2, "whiten_advantages": whitening})
        results.append(parameters_of(policy))
    same = all(torch.allclose(one, other, rtol=1e-5, atol=1e-8) for one, other in zip(*results, strict=True))
    assert same == (whitening == "minibatch")  # over a rollout they were whitened before


def test_whitening_the_only_minibatch_is_whitening_the_rollout():
    policies = TinyPolicy(), TinyPolicy()
    experience = rollout_of(policies[0])
    update(policies[0], experience, settings={"whiten_advantages": "minibatch"})
    update(policies[1], change_rows(experience, advantages=whiten(experience.advantages, experience.mask)))
    assert_same_parameters(policies[0].parameters(), policies[1].parameters())


@pytest.mark.parametrize("whitening", ["rollout", "minibatch"])
def test_a_seed_gives_the_same_bits(whitening):
    def run(seed):
        policy = TinyPolicy()
        settings = {"num_epochs": 2, "num_minibatches": 4, "whiten_advantages": whitening}
        metrics = update(policy, rollout_of(policy), settings=settings, seed=seed)
        return parameters_of(policy), metrics

    first, again, other = run(0), run(0), run(1)
    assert first[1] == again[1]
    assert all(torch.equal(one, two) for one, two in zip(first[0], again[0], strict=True))
    assert any(not torch.equal(one, two) for one, two in zip(first[0], other[0], strict=True))


def test_a_minibatch_without_a_decision_moves_nothing():
    policy = TinyPolicy()
    experience, before = rollout_of(policy), parameters_of(policy)
    metrics = update(policy, change_rows(experience, mask=torch.zeros_like(experience.mask)))
    assert_unchanged(policy, before)
    assert metrics["loss/policy"] == metrics["grad_norm"] == 0


# The target-KL stop.


def test_the_target_kl_stops_the_update_after_the_last_step_within_it():
    policy = TinyPolicy()
    experience = rollout_of(policy)
    optimizer = sgd(policy, lr=2.0)
    steps = count_steps(optimizer)
    settings = PPOSettings(num_epochs=10, target_kl=1e-3, max_grad_norm=NO_CLIPPING)
    metrics = update(policy, experience, settings, optimizer=optimizer)
    assert 0 < metrics["optimizer_steps"] < 10
    assert metrics["stopped_steps"] == 10 - metrics["optimizer_steps"]
    assert len(steps) == metrics["optimizer_steps"]
    assert kl_after(policy, experience) > 1.5e-3  # why it stopped
    assert metrics["policy/approx_kl"] <= 1.5e-3
    assert all(parameter.grad is None for parameter in policy.parameters())

    same = TinyPolicy()
    as_many = dataclasses.replace(settings, num_epochs=metrics["optimizer_steps"], target_kl=None)
    update(same, experience, as_many, optimizer=sgd(same, lr=2.0))
    assert_unchanged(policy, parameters_of(same))


def test_a_target_that_is_never_reached_stops_nothing():
    policy = TinyPolicy()
    metrics = update(policy, rollout_of(policy), settings={"num_epochs": 3, "target_kl": 100.0})
    assert (metrics["optimizer_steps"], metrics["stopped_steps"]) == (3, 0)


def test_the_stop_comes_at_one_and_a_half_times_the_target():
    """After one step the divergence is d: a target above d/1.5 lets the second step pass, one below does not."""
    policy = TinyPolicy()
    experience = rollout_of(policy)
    update(policy, experience, optimizer=sgd(policy, lr=2.0))
    divergence = kl_after(policy, experience)
    for factor, steps in ((1.01, 2), (0.99, 1)):
        policy = TinyPolicy()
        settings = PPOSettings(num_epochs=2, target_kl=factor * divergence / 1.5, max_grad_norm=NO_CLIPPING)
        metrics = update(policy, experience, settings, optimizer=sgd(policy, lr=2.0))
        assert metrics["optimizer_steps"] == steps


def test_after_each_whole_epoch_the_policy_can_be_looked_at():
    policy = TinyPolicy()
    optimizer, seen = sgd(policy), []
    steps = count_steps(optimizer)
    settings = {"num_epochs": 3, "num_minibatches": 2}
    update(policy, rollout_of(policy), settings, optimizer=optimizer, after_epoch=lambda: seen.append(len(steps)))
    assert seen == [2, 4, 6]


def test_a_stop_before_the_first_step_reports_nan_and_changes_nothing():
    """The rollout's log-probabilities are another policy's: already too far."""
    policy = TinyPolicy()
    experience, before = rollout_of(TinyPolicy(seed=1)), parameters_of(policy)
    metrics = update(policy, experience, settings={"num_epochs": 3, "target_kl": 1e-3})
    assert_unchanged(policy, before)
    assert (metrics["optimizer_steps"], metrics["stopped_steps"]) == (0, 3)
    assert math.isnan(metrics["loss/policy"])
    assert math.isnan(metrics["grad_norm"])


# Gradients that are not finite.


def test_the_first_kl_of_an_update_is_that_before_its_first_step():
    policy = TinyPolicy()
    experience = rollout_of(policy)
    assert update(policy, experience, settings={"num_epochs": 3})["policy/first_kl"] == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        next(policy.parameters()).mul_(1.1)
    moved = update(policy, experience, settings={"num_epochs": 3, "target_kl": 1e-9})
    assert moved["policy/first_kl"] > 1e-6
    assert moved["optimizer_steps"] == 0


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_step_without_a_finite_gradient_is_skipped_and_counted(poison):
    """One minibatch of eight is poisoned; the other seven steps are those of an update without it."""
    policy = TinyPolicy()
    experience = rollout_of(policy)
    returns = experience.returns.clone()
    returns[3, 0] = poison
    optimizer = sgd(policy)
    steps = count_steps(optimizer)
    metrics = update(
        policy, change_rows(experience, returns=returns), optimizer=optimizer, settings={"num_minibatches": 8}
    )
    assert (metrics["optimizer_steps"], metrics["skipped_steps"], metrics["stopped_steps"]) == (7, 1, 0)
    assert len(steps) == 7
    assert all(math.isfinite(value) for value in metrics.values())

    expected = TinyPolicy()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    for row in order[order != 3]:
        update(expected, experience[row[None]])
    assert_unchanged(policy, parameters_of(expected))


def test_when_every_step_is_skipped_nothing_moves_and_the_averages_are_nan():
    policy = TinyPolicy()
    experience, before = rollout_of(policy), parameters_of(policy)
    advantages = torch.full_like(experience.advantages, math.nan)
    metrics = update(policy, change_rows(experience, advantages=advantages), settings={"num_epochs": 3})
    assert_unchanged(policy, before)
    assert (metrics["optimizer_steps"], metrics["skipped_steps"], metrics["stopped_steps"]) == (0, 3, 0)
    names = set(metrics) - {"optimizer_steps", "skipped_steps", "stopped_steps", "policy/first_kl"}
    assert names >= {"loss/policy", "loss/value", "policy/approx_kl", "policy/clip_fraction", "grad_norm"}
    assert all(math.isnan(metrics[name]) for name in names)


def test_adams_moments_survive_a_skipped_step():
    policy = TinyPolicy()
    experience = rollout_of(policy)
    optimizer = torch.optim.Adam(policy.parameters())
    bad = change_rows(experience, advantages=torch.full_like(experience.advantages, math.nan))
    update(policy, experience, optimizer=optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    update(policy, bad, optimizer=optimizer)
    for moments, then in zip(optimizer.state_dict()["state"].values(), before["state"].values(), strict=True):
        assert all(torch.equal(moments[name], then[name]) for name in moments)


def test_a_fused_optimizer_takes_the_same_clipped_steps_as_another():
    """Its kernel reads the scale of the gradient in float32, whatever the parameters are."""
    outcomes = []
    for fused in (False, True):
        policy = TinyPolicy()
        optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1, eps=1e-3, fused=fused)
        settings = {"num_epochs": 3, "num_minibatches": 2, "max_grad_norm": 1e-3}
        metrics = update(policy, rollout_of(policy), optimizer=optimizer, settings=settings)
        outcomes.append((parameters_of(policy), metrics))
    (plain, expected), (fused_parameters, metrics) = outcomes
    assert expected["grad_norm"] > 1e-2
    assert metrics == pytest.approx(expected, rel=1e-6)
    assert_same_parameters(fused_parameters, plain)


def test_a_fused_optimizer_leaves_out_a_bad_step_and_keeps_its_moments():
    policy = TinyPolicy()
    experience = rollout_of(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
    update(policy, experience, optimizer=optimizer)
    before, moments = parameters_of(policy), copy.deepcopy(optimizer.state_dict()["state"])
    bad = change_rows(experience, advantages=torch.full_like(experience.advantages, math.nan))
    metrics = update(policy, bad, optimizer=optimizer, settings={"num_epochs": 2})
    assert (metrics["optimizer_steps"], metrics["skipped_steps"]) == (0, 2)
    assert_unchanged(policy, before)
    for after, then in zip(optimizer.state_dict()["state"].values(), moments.values(), strict=True):
        assert all(torch.equal(after[name], then[name]) for name in after)


@pytest.mark.slow
def test_a_compiled_loss_takes_the_same_step():
    outcomes = []
    for compiled in (False, True):
        policy = TinyPolicy()
        metrics = update(policy, rollout_of(policy), settings={"num_epochs": 2, "compile": compiled})
        outcomes.append((parameters_of(policy), metrics))
    (eager, expected), (compiled_parameters, metrics) = outcomes
    assert metrics == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert_same_parameters(compiled_parameters, eager)


def test_what_is_compiled_gives_the_gradient_of_the_loss():
    """As Python, which nobody sees run once it is compiled."""
    policy = TinyPolicy()
    experience, wanted = rollout_of(TinyPolicy(1)), list(policy.parameters())
    settings = _loss_settings(PPOSettings(), 0.0, None, torch.device("cpu"))
    count = experience.mask.sum()
    gradients, statistics = _loss_gradient(policy, wanted, experience, settings, count)
    summed = _gradient(policy, experience, settings, count, None, 3)
    for gradient, parameter in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
    for name, value in statistics.items():
        torch.testing.assert_close(value, summed[name])


def test_a_loss_scaler_outlives_bad_gradients_and_lowers_its_scale(monkeypatch):
    """fp16: the first scale of 65 536 overflows as a rule. The scaler has to hear of every step, skipped ones too."""
    accelerator = Accelerator(cpu=True)
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")  # on a CPU Accelerate refuses to make one
    policy = TinyPolicy()
    experience, before = rollout_of(policy), parameters_of(policy)
    bad = change_rows(experience, advantages=torch.full_like(experience.advantages, math.nan))
    optimizer = AcceleratedOptimizer(sgd(policy), scaler=accelerator.scaler)
    accelerator._optimizers.append(optimizer)
    settings, generator = PPOSettings(num_epochs=2), torch.Generator().manual_seed(0)
    metrics = ppo_update(policy, optimizer, bad, settings, accelerator=accelerator, generator=generator)
    assert (metrics["optimizer_steps"], metrics["skipped_steps"]) == (0, 2)
    assert_unchanged(policy, before)
    assert accelerator.scaler.get_scale() == 65_536 / 4
    metrics = ppo_update(policy, optimizer, experience, settings, accelerator=accelerator, generator=generator)
    assert (metrics["optimizer_steps"], metrics["skipped_steps"]) == (2, 0)
    assert_changed(policy, before)


# PPO-Penalty.


@pytest.mark.parametrize("clip_range", [None, 0.2])
@pytest.mark.parametrize("kl_divergence", [None, exact_kl])
def test_a_larger_kl_penalty_keeps_the_policy_nearer(clip_range, kl_divergence):
    """In place of the clip and beside it, by the estimate and by the exact divergence."""
    divergences = []
    for coefficient in (0.0, 1.0, 10.0):
        policy = TinyPolicy()
        experience = rollout_of(policy)
        settings = PPOSettings(num_epochs=20, clip_range=clip_range, max_grad_norm=NO_CLIPPING)
        update(policy, experience, settings, kl_penalty_coef=coefficient, kl_divergence=kl_divergence)
        divergences.append(kl_after(policy, experience, kl_divergence=exact_kl))
    assert divergences[0] > 1.2 * divergences[1] > 1.2**2 * divergences[2] > 0


def test_the_penalty_is_the_given_divergence():
    """A divergence that is the mean logit moves the actor's bias by −lr · coefficient / actions."""
    policy = TinyPolicy()
    experience = rollout_of(policy)
    experience = change_rows(experience, advantages=torch.zeros_like(experience.advantages))
    before = policy.actor.bias.detach().clone()
    seen = []

    def mean_logit(old, new):
        seen.append(old)
        return new.mean(-1)

    update(policy, experience, settings={"value_coef": 0.0}, kl_penalty_coef=0.6, kl_divergence=mean_logit)
    torch.testing.assert_close(policy.actor.bias, before - 0.1 * 0.6 / NUM_ACTIONS)
    assert len(seen) == 1
    assert torch.equal(seen[0], experience.distribution)


def test_without_a_coefficient_the_penalty_is_not_computed():
    def never(old, new):
        raise AssertionError

    policy = TinyPolicy()
    update(policy, rollout_of(policy), kl_divergence=never)


@pytest.mark.parametrize("micro_batch_size", [None, 1, 3])
def test_measured_kl_is_the_mean_divergence_over_the_decisions(micro_batch_size):
    old, new = TinyPolicy(seed=0), TinyPolicy(seed=1)
    experience = rollout_of(old)
    mask = experience.mask
    with torch.no_grad():
        evaluation = new(**experience.inputs)
    p, q = experience.distribution.softmax(-1)[mask], evaluation.distribution.softmax(-1)[mask]
    exact = (p * (p / q).log()).sum(-1).mean().item()
    ratio = (evaluation.logprobs - experience.logprobs).exp()[mask]
    estimate = (ratio - 1 - ratio.log()).mean().item()

    settings = PPOSettings(micro_batch_size=micro_batch_size)
    accelerator = Accelerator(cpu=True)
    measured = measured_kl(new, experience, settings, accelerator=accelerator, kl_divergence=exact_kl)
    assert measured == pytest.approx(exact, rel=1e-6)
    assert measured_kl(new, experience, settings, accelerator=accelerator) == pytest.approx(estimate, rel=1e-6)


def test_measured_kl_of_the_old_policy_is_zero_and_leaves_no_gradient():
    policy = TinyPolicy()
    experience = rollout_of(policy)
    assert kl_after(policy, experience, kl_divergence=exact_kl) == pytest.approx(0, abs=1e-12)
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_a_sharded_gradient_norm_is_gathered():
    """FSDP2 gives the norm as a DTensor, one piece a process; only the whole of it may be judged and reported."""

    class Sharded:
        def full_tensor(self):
            return torch.tensor(math.nan)

    class ShardedAccelerator(Accelerator):
        def clip_grad_norm_(self, parameters, max_norm, norm_type=2):
            return Sharded()

    policy = TinyPolicy()
    settings = PPOSettings(num_epochs=1)
    metrics = ppo_update(
        policy,
        sgd(policy),
        rollout_of(policy),
        settings,
        accelerator=ShardedAccelerator(cpu=True),
        generator=torch.Generator().manual_seed(0),
    )
    assert metrics["skipped_steps"] == 1


# Several processes.


@contextlib.contextmanager
def forget_accelerators():
    """A forked process inherits the parent's accelerator, of one process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    PartialState().wait_for_everyone()  # before end_training, or the group is torn down under the slower one
    Accelerator(cpu=True).end_training()


TWO_PROCESS_SETTINGS = {
    "step": PPOSettings(num_epochs=3, max_grad_norm=0.5, entropy_coef=0.05, micro_batch_size=3),
    "normalize": PPOSettings(num_epochs=2, max_grad_norm=0.5, whiten_advantages="minibatch"),
    "stop": PPOSettings(num_epochs=10, max_grad_norm=NO_CLIPPING, target_kl=1e-3),
    "skip": PPOSettings(num_epochs=2, max_grad_norm=0.5),
}


def two_process_case(name, *, rank=None):
    """The policy, its optimizer and rows: all of them, or those of one of two processes."""
    policy = TinyPolicy()
    experience = rollout_of(policy)
    if name == "stop":  # process 0's rows pull hard, process 1's hardly at all: alone, only 0 would stop
        strength = torch.tensor([8.0] * 4 + [0.0] * 4, dtype=torch.float64)[:, None]
        experience = change_rows(experience, advantages=strength * experience.advantages, returns=experience.values)
    if name == "skip":  # only process 1 has a bad row
        experience = change_rows(experience, advantages=experience.advantages.index_fill(0, torch.tensor(7), math.nan))
    if rank is not None:
        experience = experience[4 * rank : 4 * rank + 4]
    return policy, experience


def run_one_of_two(name: str, folder: str) -> None:
    with forget_accelerators():
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == 2
        policy, experience = two_process_case(name, rank=accelerator.process_index)
        optimizer = sgd(policy)
        prepared, optimizer = accelerator.prepare(policy, optimizer)
        metrics = ppo_update(
            prepared,
            optimizer,
            experience,
            TWO_PROCESS_SETTINGS[name],
            accelerator=accelerator,
            generator=torch.Generator().manual_seed(accelerator.process_index),
            kl_penalty_coef=0.2,
        )
        kl = measured_kl(prepared, experience, PPOSettings(micro_batch_size=1), accelerator=accelerator)
        whitened = whiten(experience.advantages, experience.mask, sum_across=accelerator.reduce)
        outcome = {"parameters": parameters_of(policy), "metrics": metrics, "kl": kl, "whitened": whitened}
        torch.save(outcome, Path(folder) / f"{accelerator.process_index}.pt")


def both_processes(name, folder):
    debug_launcher(run_one_of_two, args=(name, str(folder)), num_processes=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def one_process(name):
    policy, experience = two_process_case(name)
    metrics = update(policy, experience, TWO_PROCESS_SETTINGS[name], kl_penalty_coef=0.2)
    return policy, experience, metrics


@pytest.mark.parametrize("name", ["step", "normalize"])
def test_two_processes_take_the_same_step_as_one(name, tmp_path):
    """Rows of unequal lengths, so that the processes' means are not each other's: parameters, metrics, measured KL."""
    policy, experience, metrics = one_process(name)
    assert experience[:4].mask.sum() != experience[4:].mask.sum()
    outcomes = both_processes(name, tmp_path)
    for outcome in outcomes:
        assert_same_parameters(outcome["parameters"], policy.parameters())
        assert outcome["metrics"] == pytest.approx(metrics, rel=1e-5, abs=1e-8)
        assert outcome["kl"] == pytest.approx(kl_after(policy, experience), rel=1e-4)
    together = torch.cat([outcome["whitened"] for outcome in outcomes])
    torch.testing.assert_close(together, whiten(experience.advantages, experience.mask))


def test_two_processes_stop_together(tmp_path):
    policy, _, metrics = one_process("stop")
    assert 0 < metrics["optimizer_steps"] < 10
    for outcome in both_processes("stop", tmp_path):
        assert outcome["metrics"]["optimizer_steps"] == metrics["optimizer_steps"]
        assert outcome["metrics"]["stopped_steps"] == metrics["stopped_steps"]
        assert_same_parameters(outcome["parameters"], policy.parameters())


def test_two_processes_skip_a_bad_gradient_together(tmp_path):
    before = parameters_of(TinyPolicy())
    for outcome in both_processes("skip", tmp_path):
        assert (outcome["metrics"]["optimizer_steps"], outcome["metrics"]["skipped_steps"]) == (0, 2)
        assert_same_parameters(outcome["parameters"], before, rtol=0)


# The optimizer.


@pytest.fixture
def bitsandbytes():
    if os.environ.get("PPO_RLHF_REQUIRE_ALL") != "1":
        pytest.importorskip("bitsandbytes")


def quadratic_descent(moments, *, steps=60):
    """The distances of a vector from the point it is drawn to, after each of the steps."""
    module = nn.Linear(64, 128)
    target = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(module.weight)
    optimizer = make_optimizer(module, OptimizerSettings(lr=0.05, moments=moments))
    distances = []
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * (module.weight - target).square().sum() + module.bias.square().sum()).backward()
        optimizer.step()
        distances.append(float((module.weight - target).norm().detach()))
    return distances, optimizer


@pytest.mark.parametrize("moments", ["8bit", "paged"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_moments_of_bitsandbytes_descend_as_float32_ones_do(moments, bitsandbytes):
    expected, _ = quadratic_descent("float32")
    found, optimizer = quadratic_descent(moments)
    assert found == pytest.approx(expected, rel={"8bit": 0.05, "paged": 1e-4}[moments])
    assert expected[-1] < 0.2 * expected[0]
    kept = [(name, tensor) for state in optimizer.state.values() for name, tensor in state.items()]
    total = sum(tensor.nbytes for name, tensor in kept if torch.is_tensor(tensor) and not name.startswith("qmap"))
    assert total == optimizer_bytes(nn.Linear(64, 128), OptimizerSettings(moments=moments))


def test_moments_without_bitsandbytes_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("ppo_rlhf.settings.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"optimizer\.moments=8bit needs the package bitsandbytes: pip install"):
        OptimizerSettings(moments="8bit")


def tiny_language_models():
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    gpt2 = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    llama = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return {"gpt2": lambda: GPT2LMHeadModel(gpt2), "llama": lambda: LlamaForCausalLM(llama), "mlp": TinyPolicy}


@pytest.mark.parametrize("name", ["gpt2", "llama", "mlp"])
def test_weight_decay_shrinks_matrices_and_spares_norms_and_biases(name):
    """With gradients of zero nothing but the decay moves: matrices shrink by lr · decay = 1 %, the rest stays."""
    module = tiny_language_models()[name]()
    optimizer = make_optimizer(module, OptimizerSettings(lr=0.1, weight_decay=0.1))
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    spared = [name for name, parameter in module.named_parameters() if torch.equal(parameter, before[name])]
    for name, parameter in module.named_parameters():
        if name in spared:
            assert "norm" in name or "ln_" in name or name.endswith("bias")
        else:
            assert parameter.ndim == 2
            torch.testing.assert_close(parameter.detach(), 0.99 * before[name])
    assert spared
    assert len(spared) < len(before)
    assert all(name in spared for name in before if "norm" in name or "ln_" in name or name.endswith("bias"))


def test_every_trainable_parameter_is_optimized_once_and_no_frozen_one():
    policy = TinyPolicy()
    policy.trunk.requires_grad_(False)
    optimizer = make_optimizer(policy, OptimizerSettings())
    optimized = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    wanted = [id(parameter) for head in (policy.actor, policy.critic) for parameter in head.parameters()]
    assert sorted(optimized) == sorted(wanted)


def test_a_module_of_matrices_alone_can_be_optimized():
    optimizer = make_optimizer(nn.Linear(2, 2, bias=False), OptimizerSettings(weight_decay=0.1))
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]


def test_the_first_adam_step_is_the_learning_rate_less_what_epsilon_takes():
    # Bias-corrected, m = g and v = g²: g/(|g| + ε) = 1e-5/(1e-5 + 1e-5) = ½ with the default ε of 1e-5.
    module = nn.Linear(1, 1, bias=False).double()
    before = module.weight.item()
    optimizer = make_optimizer(module, OptimizerSettings(lr=0.1))
    module.weight.grad = torch.full_like(module.weight, 1e-5)
    optimizer.step()
    assert before - module.weight.item() == pytest.approx(0.05)


def test_the_betas_reach_the_optimizer():
    optimizer = make_optimizer(TinyPolicy(), OptimizerSettings(beta1=0.5, beta2=0.7))
    assert all(group["betas"] == (0.5, 0.7) for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("settings", "num_steps", "expected"),
    [
        ({"schedule": "constant"}, 4, [1, 1, 1, 1]),
        ({"schedule": "linear"}, 4, [1, 0.75, 0.5, 0.25]),
        ({"schedule": "cosine"}, 4, [1, 0.8535533905932737, 0.5, 0.14644660940672627]),  # ½(1 + cos πs/4)
        ({"schedule": "constant", "warmup_steps": 3}, 5, [0.25, 0.5, 0.75, 1, 1]),
        ({"schedule": "linear", "warmup_steps": 1}, 5, [0.5, 1, 0.75, 0.5, 0.25]),
        ({"schedule": "cosine", "warmup_steps": 1}, 3, [0.5, 1, 0.5]),
        ({"schedule": "linear", "warmup_steps": 4}, 3, [0.2, 0.4, 0.6]),  # ends before the warm-up does
    ],
)
def test_the_learning_rate_by_hand(settings, num_steps, expected):
    settings = OptimizerSettings(lr=2.0, **settings)
    assert [learning_rate(settings, step, num_steps) for step in range(num_steps)] == pytest.approx(
        [2 * rate for rate in expected]
    )


def test_set_learning_rate_reaches_every_group():
    optimizer = make_optimizer(TinyPolicy(), OptimizerSettings(weight_decay=0.1))
    assert len(optimizer.param_groups) == 2
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_parameters_apart_keep_their_multiple_of_the_learning_rate():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    settings = OptimizerSettings(lr=0.1, weight_decay=0.1)
    optimizer = make_optimizer(module, settings, apart=module[1].parameters(), lr_apart=0.4)
    set_learning_rate(optimizer, 0.05)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert [rates[id(parameter)] for parameter in module.parameters()] == pytest.approx([0.05, 0.05, 0.2, 0.2])
    assert optimizer.param_groups[0]["lr"] == 0.05  # what metrics call lr
