"""TRPO: conjugate gradients and Fisher matrix against dense linear algebra; what a step keeps to and leaves alone."""

from __future__ import annotations

import dataclasses
import math

import control_cases as cases
import pytest
import torch
import torch.distributions as td
from torch import Tensor

import classic.trpo
from classic.config import TrainConfig, TrustRegionSettings
from classic.policy import Policy
from classic.presets import OWN_PRESETS, PRESETS, preset_for
from classic.settings import NetworkSettings
from classic.spaces import Box, Discrete, MultiBinary
from classic.trpo import conjugate_gradient, trust_region_update
from ppo_rlhf.core import Experience
from ppo_rlhf.errors import UserError
from ppo_rlhf.optimizer import make_optimizer
from ppo_rlhf.settings import OptimizerSettings

SEEN = Box((2,), (-1.0,) * 2, (1.0,) * 2)
SPACES = {"choices": Discrete(3), "switches": MultiBinary((2,)), "numbers": Box((2,), (-1.0,) * 2, (1.0,) * 2)}
EXACT = TrustRegionSettings(conjugate_gradient_steps=200)


def policy_of(kind="choices", **network):
    settings = {"hidden_sizes": (4,), "policy_head_gain": 1.0, **network}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Policy(SEEN, SPACES[kind], NetworkSettings(**settings)).double()


def experience_of(policy, *, batch=6, steps=5, seed=0):
    """Decisions drawn by the policy in random states, with random advantages and returns, a few of them masked."""
    draw = cases.generator(seed)
    observations = torch.randn(batch, steps, 2, generator=draw, dtype=torch.float64)
    noise = policy.distribution.noise(batch * steps, generator=draw)
    inputs = {}
    if policy.core is not None:
        inputs["starts"] = torch.rand(batch, steps, generator=draw) < 0.3
        inputs["state"] = torch.zeros(batch, policy.core.state_size, dtype=torch.float64)
    with torch.no_grad():
        seen = observations.flatten(0, 1)
        actions = policy.decide(seen, noise, policy.memory(len(seen)) and doubled(policy.memory(len(seen))), None)
        inputs |= {"observations": observations, "actions": actions.unflatten(0, (batch, steps))}
        old = policy(**inputs)
    return Experience(
        inputs=inputs,
        logprobs=old.logprobs,
        values=old.values,
        advantages=torch.randn(batch, steps, generator=draw, dtype=torch.float64),
        returns=torch.randn(batch, steps, generator=draw, dtype=torch.float64),
        mask=torch.rand(batch, steps, generator=draw) < 0.8,
        distribution=old.distribution,
    )


def doubled(memory):
    memory.state = memory.state.double()
    return memory


def step(policy, experience, settings=EXACT, **optimizer):
    adam = make_optimizer(policy, OptimizerSettings(**{"lr": 1e-2, **optimizer}))
    return trust_region_update(policy, adam, experience, settings, seed=(0, 0))


def references(kind, parameters):
    if kind == "choices":
        return td.Categorical(logits=parameters[0])
    if kind == "switches":
        return td.Independent(td.Bernoulli(logits=parameters[0]), 1)
    return td.Independent(td.Normal(parameters[0], parameters[1].exp()), 1)


def surrogate_and_kl(policy, kind, experience):
    """E[A·π/π_old] and E[KL(old‖new)] over the mask, by torch.distributions."""
    with torch.no_grad():
        new = references(kind, policy(**experience.inputs).distribution)
    old, actions = references(kind, experience.distribution), experience.inputs["actions"]
    ratio = (new.log_prob(actions) - old.log_prob(actions)).exp()
    mask = experience.mask
    return (ratio * experience.advantages)[mask].mean().item(), td.kl_divergence(old, new)[mask].mean().item()


@pytest.mark.parametrize("size", [1, 5, 20])
def test_conjugate_gradients_solve_what_linear_algebra_solves(size):
    root = torch.randn(size, size, generator=cases.generator(size), dtype=torch.float64)
    matrix = root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)
    target = torch.randn(size, generator=cases.generator(1), dtype=torch.float64)
    found = conjugate_gradient(lambda x: matrix @ x, target, 10 * size)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, target), rtol=1e-4, atol=1e-4)


def test_conjugate_gradients_stop_at_zero_where_nothing_is_asked():
    assert not conjugate_gradient(lambda x: 2 * x, torch.zeros(3), 5).any()


def fisher_of(policy, kind, experience):
    """E[Σ_a π(a|s) ∇log π ∇log πᵀ] over the masked decisions, or a Gaussian's by its own formula: dense, one by one."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    size = sum(p.numel() for p in parameters)
    total, count = torch.zeros(size, size, dtype=torch.float64), int(experience.mask.sum())

    def gradient(scalar: Tensor) -> Tensor:
        found = torch.autograd.grad(scalar, parameters, retain_graph=True, allow_unused=True)
        return torch.cat(
            [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
        )

    distribution = policy(**experience.inputs).distribution
    for b, t in experience.mask.nonzero().tolist():
        here = [parameter[b, t] for parameter in distribution]
        if kind == "choices":
            weighted = [(here[0][a].exp().item(), gradient(here[0][a])) for a in range(3)]
        elif kind == "switches":
            p = here[0].sigmoid().tolist()
            weighted = [(p[k] * (1 - p[k]), gradient(here[0][k])) for k in range(2)]
        else:  # of N(μ, σ²): (∇μ)² / σ² + 2 (∇log σ)²
            weighted = [(here[1][k].exp().item() ** -2, gradient(here[0][k])) for k in range(2)]
            weighted += [(2.0, gradient(here[1][k])) for k in range(2)]
        total += sum(weight * torch.outer(g, g) for weight, g in weighted) / count
    return total


@pytest.mark.parametrize("kind", SPACES)
def test_the_step_is_the_natural_gradient_of_the_explicit_fisher_matrix(kind, monkeypatch):
    policy = policy_of(kind)
    experience = experience_of(policy)
    fisher = fisher_of(policy, kind, experience) + 0.1 * torch.eye(sum(p.numel() for p in policy.parameters()))
    asked = {}

    def recorded(product, target, steps):
        size = len(target)
        asked["matrix"] = torch.stack([product(row) for row in torch.eye(size, dtype=torch.float64)])
        asked["target"] = target
        return conjugate_gradient(product, target, steps)

    monkeypatch.setattr(classic.trpo, "conjugate_gradient", recorded)
    before = torch.nn.utils.parameters_to_vector(policy.parameters()).detach().clone()
    told = step(policy, experience, dataclasses.replace(EXACT, max_kl=1e-6))
    torch.testing.assert_close(asked["matrix"].detach(), fisher, rtol=1e-8, atol=1e-9)
    # Of the policy's parameters: the whole step, √(2δ / xᵀFx) x.
    direction = torch.linalg.solve(fisher, asked["target"])
    whole = (2 * 1e-6 / (direction @ fisher @ direction)).sqrt() * direction
    moved = torch.nn.utils.parameters_to_vector(policy.parameters()).detach() - before
    felt = asked["target"] != 0
    torch.testing.assert_close(moved[felt], told["line_search/step"] * whole[felt], rtol=1e-3, atol=1e-7)
    assert told["line_search/step"] > 0.7
    torch.testing.assert_close(told["grad_norm"], asked["target"].norm().item())


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("network", [{}, {"activation": "relu"}, {"recurrent": "lstm"}, {"hidden_sizes": ()}], ids=str)
@pytest.mark.parametrize("max_kl", [0.003, 0.1])
def test_a_step_improves_the_surrogate_within_the_trust_region(kind, network, max_kl):
    policy = policy_of(kind, **network)
    experience = experience_of(policy)
    before, nothing = surrogate_and_kl(policy, kind, experience)
    assert nothing == pytest.approx(0, abs=1e-12)
    told = step(policy, experience, TrustRegionSettings(max_kl=max_kl))
    after, kl = surrogate_and_kl(policy, kind, experience)
    assert told["line_search/step"] > 0
    assert after > before
    assert 0.2 * max_kl < kl <= max_kl
    assert told["policy/kl"] == pytest.approx(kl, rel=1e-6)
    assert told["loss/policy"] == pytest.approx(-after, rel=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("network", [{}, {"recurrent": "gru"}, {"activation": "elu"}, {"gaussian": "gsde"}], ids=str)
def test_the_value_s_regression_leaves_the_policy_as_it_is(network, weight_decay, monkeypatch):
    policy = policy_of("numbers", **network)
    experience = experience_of(policy)
    optimizer = make_optimizer(policy, OptimizerSettings(lr=1e-2, weight_decay=weight_decay))
    monkeypatch.setattr(classic.trpo, "_line_search", lambda *_: (0.0, 0.0, 0.0))
    for seed in range(2):  # the second with the optimizer's moments of the first
        before = policy(**experience.inputs)
        trust_region_update(policy, optimizer, experience, TrustRegionSettings(), seed=(0, seed))
        after = policy(**experience.inputs)
        assert cases.same(list(before.distribution), list(after.distribution))
        errors = [(e.values - experience.returns)[experience.mask].square().mean() for e in (before, after)]
        assert errors[1] < errors[0]
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_the_value_s_regression_takes_as_many_steps_as_it_is_told(monkeypatch):
    policy = policy_of("numbers")
    optimizer = make_optimizer(policy, OptimizerSettings(lr=1e-2))
    steps = []
    monkeypatch.setattr(optimizer, "step", lambda: steps.append(1))
    settings = TrustRegionSettings(value_epochs=3, value_minibatches=5)
    trust_region_update(policy, optimizer, experience_of(policy, batch=5), settings, seed=(0, 0))
    assert len(steps) == 3 * 5


def test_a_step_that_never_helps_is_not_taken(monkeypatch):
    policy = policy_of()
    experience = experience_of(policy)
    monkeypatch.setattr(classic.trpo, "_fit_values", lambda *_: {})
    monkeypatch.setattr(classic.trpo, "conjugate_gradient", lambda product, target, steps: -target)  # uphill
    before = cases.copied(policy)
    told = step(policy, experience)
    assert cases.same(before, cases.copied(policy))
    assert told["line_search/step"] == 0
    assert told["policy/kl"] == 0


@pytest.mark.parametrize(
    ("max_kl", "steps", "share"), [(2.0, 10, 1.0), (0.5, 10, 0.64), (0.5, 3, 0.64), (0.5, 2, 0.0), (1e-9, 10, 0.0)]
)
def test_the_longest_of_the_shrunken_steps_within_the_trust_region_is_taken(max_kl, steps, share):
    # From 1 by 1: the loss is −x and the KL (x − 1)², of the shares 1, 0.8, 0.64, … thus 1, 0.64, 0.41, …
    x = torch.nn.Parameter(torch.ones(1))
    search = TrustRegionSettings(max_kl=max_kl, line_search_steps=steps, line_search_shrink=0.8)
    taken, loss, kl = classic.trpo._line_search(
        [x], torch.ones(1), lambda: (-x.sum(), (x.sum() - 1) ** 2, x.sum()), torch.tensor(-1.0), search
    )
    assert taken == pytest.approx(share)
    assert (x.item(), loss, kl) == pytest.approx((1 + share, -1 - share, share**2))


def test_fp16_is_refused_and_bf16_is_not():
    with pytest.raises(UserError, match="precision=fp16"):
        TrainConfig(algorithm="trpo", precision="fp16")
    assert TrainConfig(algorithm="trpo", precision="bf16").precision == "bf16"


def test_the_presets_of_the_trust_region_are_of_its_algorithm():
    for (env_id, algorithm), preset in OWN_PRESETS.items():
        assert (preset.env_id, preset.algorithm) == (env_id, algorithm)
        assert preset_for(env_id, algorithm) == preset
        assert preset_for(env_id) == PRESETS[env_id]


def test_without_advantages_there_is_no_step(monkeypatch):
    policy = policy_of()
    experience = dataclasses.replace(experience_of(policy), advantages=torch.zeros(6, 5, dtype=torch.float64))
    monkeypatch.setattr(classic.trpo, "_fit_values", lambda *_: {})
    before = cases.copied(policy)
    assert step(policy, experience)["line_search/step"] == 0
    assert cases.same(before, cases.copied(policy))


def test_decisions_that_nobody_made_change_no_step():
    outcomes = []
    for poison in (0.0, float("nan")):
        policy = policy_of("numbers")
        experience = experience_of(policy)
        fields = {
            name: torch.where(experience.mask, getattr(experience, name), poison)
            for name in ("logprobs", "values", "advantages", "returns")
        }
        step(policy, dataclasses.replace(experience, **fields))
        outcomes.append(cases.copied(policy))
    assert cases.same(*outcomes)


@pytest.mark.parametrize("name", ["advantages", "returns"])
def test_a_rollout_that_is_not_finite_is_skipped_and_told(name):
    policy = policy_of()
    experience = experience_of(policy)
    settings = TrustRegionSettings(value_epochs=3, value_minibatches=5)
    before = cases.copied(policy)
    poisoned = torch.full_like(experience.mask, float("nan"), dtype=torch.float64)
    told = step(policy, dataclasses.replace(experience, **{name: poisoned}), settings)
    assert (told["optimizer_steps"], told["skipped_steps"]) == (0, 3 * 5)
    assert math.isnan(told["loss/value"])
    moved = not cases.same(before, cases.copied(policy))
    assert moved == (name == "returns")  # the policy's own step needs none of them
    assert all(parameter.isfinite().all() for parameter in policy.parameters())


def test_of_the_value_s_regression_only_the_steps_that_are_not_finite_are_skipped(monkeypatch):
    policy = policy_of()
    experience = experience_of(policy)
    at = tuple(experience.mask.nonzero()[0])
    experience.returns[at] = float("nan")
    optimizer = make_optimizer(policy, OptimizerSettings(lr=1e-2))
    steps, take = [], optimizer.step
    monkeypatch.setattr(optimizer, "step", lambda: steps.append(1) or take())
    settings = TrustRegionSettings(value_epochs=3, value_minibatches=5)
    told = trust_region_update(policy, optimizer, experience, settings, seed=(0, 0))
    assert (told["optimizer_steps"], told["skipped_steps"]) == (3 * 4, 3)  # one minibatch of each pass
    assert len(steps) == 3 * 4
    assert math.isfinite(told["loss/value"])
    assert all(parameter.isfinite().all() for parameter in policy.parameters())


def test_parameters_keep_memory_of_their_own():
    # A checkpoint keeps one of several tensors in the same memory, and takes the others for its copies.
    policy = policy_of()
    step(policy, experience_of(policy))
    assert len({p.untyped_storage().data_ptr() for p in policy.parameters()}) == len(list(policy.parameters()))
