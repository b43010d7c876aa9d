"""Action distributions against torch.distributions, numerical integrals and their own samples."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.distributions as td
from hypothesis import given, settings
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from classic.distributions import (
    LOG_STD_BOUNDS,
    ActionDistribution,
    Bernoulli,
    Categorical,
    Gaussian,
    MultiCategorical,
    SquashedGaussian,
    StateDependentExploration,
    make_distribution,
)
from classic.settings import NetworkSettings
from classic.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from ppo_rlhf.errors import UserError

BOX = Box((2,), (-1.0, -2.0), (1.0, 3.0))
UNBOUNDED = Box((2,), (-math.inf,) * 2, (math.inf,) * 2)
HALF_OPEN = Box((2,), (-1.0, -math.inf), (math.inf, 3.0))
NUM_FEATURES = 3
NVEC = (2, 4, 3)

DISTRIBUTIONS = {
    "two choices": lambda: Categorical(2),
    "five choices": lambda: Categorical(5),
    "several choices": lambda: MultiCategorical(NVEC),
    "several equal choices": lambda: MultiCategorical((3, 3)),
    "switches": lambda: Bernoulli(3),
    "gaussian": lambda: Gaussian(BOX),
    "gaussian, state-dependent": lambda: Gaussian(BOX, state_dependent=True),
    "squashed": lambda: SquashedGaussian(BOX),
    "gSDE": lambda: StateDependentExploration(BOX, num_features=NUM_FEATURES),
}
DISCRETE = [name for name in DISTRIBUTIONS if "choices" in name or name == "switches"]
CONTINUOUS = [name for name in DISTRIBUTIONS if name not in DISCRETE]
every = pytest.mark.parametrize("name", DISTRIBUTIONS)
few_examples = settings(deadline=None, max_examples=30, derandomize=True, database=None)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def make(name: str) -> ActionDistribution:
    """In float64, its parameters, where it has any, all different."""
    distribution = DISTRIBUTIONS[name]().double()
    for parameter in distribution.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator(7))
    return distribution


def parameters_of(distribution, *shape: int, seed: int = 0, action_mask=None):
    output = randn(*shape, distribution.num_outputs, seed=seed)
    return distribution(output, randn(*shape, NUM_FEATURES, seed=seed + 1000), action_mask)


def decided(distribution, *shape: int, seed: int = 0):
    """Parameters and actions drawn from them; shape begins with time."""
    parameters = parameters_of(distribution, *shape, seed=seed)
    noise = distribution.noise(*shape, generator=generator(seed + 1))
    return parameters, distribution.sample(parameters, noise, randn(*shape, NUM_FEATURES, seed=seed + 1000)).detach()


def references(distribution, parameters):
    """The same distribution's independent parts as torch.distributions knows them."""
    if isinstance(distribution, MultiCategorical):
        nvec = distribution.exists.sum(-1).tolist()
        return [td.Categorical(logits=parameters[0][..., i, :n]) for i, n in enumerate(nvec)]
    if isinstance(distribution, Categorical):
        return [td.Categorical(logits=parameters[0])]
    if isinstance(distribution, Bernoulli):
        return [td.Independent(td.Bernoulli(logits=parameters[0]), 1)]
    mean, log_std = parameters
    return [td.Independent(td.Normal(mean, log_std.exp()), 1)]


def assert_close(actual, expected, *, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-9, check_dtype=False)


def assert_frequencies(counts: torch.Tensor, probabilities: torch.Tensor, num: int) -> None:
    """Each within five standard deviations of a binomial; never where the probability is 0."""
    deviation = (num * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - num * probabilities).abs() <= 5 * deviation).all()


# --- against torch.distributions -------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("shape", [(7,), (4, 3), (2, 3, 2)])
def test_logprobs_entropy_and_kl_are_those_of_torch_distributions(name, shape):
    distribution = make(name)
    parameters, actions = decided(distribution, *shape)
    others = parameters_of(distribution, *shape, seed=5)
    mine, theirs = references(distribution, parameters), references(distribution, others)
    parts = actions.unbind(-1) if isinstance(distribution, MultiCategorical) else [actions]
    logprob = sum(part.log_prob(action) for part, action in zip(mine, parts, strict=True))
    entropy = sum(part.entropy() for part in mine)
    if isinstance(distribution, SquashedGaussian):  # its own tests are below
        slope = (1 - torch.tanh(actions) ** 2).log() + torch.tensor([1.0, 2.5], dtype=torch.float64).log()
        logprob, entropy = logprob - slope.sum(-1), entropy + slope.sum(-1)
    assert_close(distribution.logprob(parameters, actions), logprob)
    assert_close(distribution.entropy(parameters, actions), entropy)
    assert_close(
        distribution.kl(parameters, others), sum(td.kl_divergence(*pair) for pair in zip(mine, theirs, strict=True))
    )
    assert logprob.shape == shape


@pytest.mark.parametrize("name", ["two choices", "several choices"])
def test_many_rows_are_normalized_as_few_are(name):
    distribution = make(name)
    output = randn(3000, distribution.num_outputs)
    ((together,), few) = distribution(output, torch.empty(0)), output.split(10)
    assert_close(together, torch.cat([distribution(rows, torch.empty(0))[0] for rows in few]))


@every
def test_the_parts_of_an_action_keep_their_shape_and_kind(name):
    distribution = DISTRIBUTIONS[name]()
    output, features = torch.randn(6, 4, distribution.num_outputs), torch.randn(6, 4, NUM_FEATURES)
    parameters = distribution(output, features)
    actions = distribution.sample(parameters, distribution.noise(6, 4), features)
    parts = {"several choices": (3,), "several equal choices": (2,), "switches": (3,)}
    assert actions.shape == (6, 4, *parts.get(name, () if name in DISCRETE else (2,)))
    assert distribution.mode(parameters).shape == actions.shape
    assert distribution.mode(parameters).dtype == actions.dtype
    assert distribution.to_environment(actions).dtype == (torch.int64 if name in DISCRETE else torch.float32)
    assert all(parameter.shape[:2] == (6, 4) for parameter in parameters)


@pytest.mark.parametrize("name", DISCRETE)
def test_the_mode_is_the_likeliest_action(name):
    distribution = make(name)
    parameters = parameters_of(distribution, 50)
    best = distribution.logprob(parameters, distribution.mode(parameters))
    for seed in range(20):
        actions = distribution.sample(parameters, distribution.noise(50, generator=generator(seed)))
        assert (distribution.logprob(parameters, actions) <= best + 1e-12).all()


@pytest.mark.parametrize("name", CONTINUOUS)
def test_the_mode_of_continuous_actions_is_the_mean(name):
    distribution = make(name)
    output = randn(5, distribution.num_outputs)
    mean = output[:, :2]
    assert_close(distribution.mode(distribution(output, randn(5, NUM_FEATURES))), mean)


# --- sampling --------------------------------------------------------------------------------------------------------


@every
def test_the_same_noise_gives_the_same_actions(name):
    distribution = make(name)
    (parameters, first), (_, second) = (decided(distribution, 6, 2, seed=3) for _ in range(2))
    assert torch.equal(first, second)
    features = randn(6, 2, NUM_FEATURES, seed=1003)
    noise = distribution.noise(6, 2, generator=generator(99))
    assert not torch.equal(distribution.sample(parameters, noise, features), first)


@every
def test_a_step_of_the_noise_gives_the_actions_of_that_step(name):
    distribution = make(name)
    parameters, features = parameters_of(distribution, 5, 3), randn(5, 3, NUM_FEATURES, seed=1000)
    noise = distribution.noise(5, 3, generator=generator())
    together = distribution.sample(parameters, noise, features)
    for t, step in enumerate(noise.unbind(0)):
        assert_close(distribution.sample(tuple(p[t] for p in parameters), step, features[t]), together[t])


@every
def test_without_a_generator_torch_s_own_seed_decides(name):
    distribution = make(name)
    torch.manual_seed(4)
    first = distribution.noise(3, 2)
    torch.manual_seed(4)
    assert torch.equal(first, distribution.noise(3, 2))


@pytest.mark.parametrize("num_choices", [2, 5])
def test_choices_are_drawn_as_often_as_their_probabilities_say(num_choices):
    distribution, num = Categorical(num_choices), 200_000
    (logprobs,) = distribution(torch.randn(num_choices, generator=generator(2)), torch.empty(0))
    actions = distribution.sample((logprobs.expand(num, -1),), distribution.noise(num, generator=generator()))
    assert_frequencies(torch.bincount(actions, minlength=num_choices), logprobs.exp(), num)


def test_several_choices_are_drawn_as_often_as_their_probabilities_say():
    distribution, num = MultiCategorical(NVEC), 100_000
    (logprobs,) = distribution(torch.randn(distribution.num_outputs, generator=generator(2)), torch.empty(0))
    actions = distribution.sample((logprobs.expand(num, -1, -1),), distribution.noise(num, generator=generator()))
    for part, probabilities in enumerate(logprobs.exp()):
        assert_frequencies(torch.bincount(actions[:, part], minlength=4), probabilities, num)
    joint = ((actions[:, 0] == 0) & (actions[:, 1] == 0)).sum()  # the parts are independent
    assert_frequencies(joint, logprobs[0, 0].exp() * logprobs[1, 0].exp(), num)


def test_switches_are_on_as_often_as_their_probabilities_say():
    distribution, num = Bernoulli(3), 200_000
    logits = torch.tensor([-2.0, 0.3, 4.0])
    actions = distribution.sample((logits.expand(num, -1),), distribution.noise(num, generator=generator()))
    assert_frequencies(actions.sum(0), logits.sigmoid(), num)


@pytest.mark.parametrize("name", ["gaussian", "gaussian, state-dependent", "squashed"])
def test_gaussian_samples_have_the_mean_the_variance_and_the_independence_of_the_formula(name):
    distribution, num = make(name), 200_000
    mean, log_std = (p[0] for p in parameters_of(distribution, 1))
    noise = distribution.noise(num, generator=generator())
    z = (distribution.sample((mean.expand(num, 2), log_std.expand(num, 2)), noise) - mean) / log_std.exp()
    # Five standard errors: 1/√n of a mean and of a correlation, √(2/n) of a variance.
    assert (z.mean(0).abs() < 5 / math.sqrt(num)).all()
    assert ((z.var(0) - 1).abs() < 5 * math.sqrt(2 / num)).all()
    assert (z[:, 0] * z[:, 1]).mean().abs() < 5 / math.sqrt(num)


# --- masks -----------------------------------------------------------------------------------------------------------

MASKED = {"two choices": 2, "five choices": 5, "several choices": 9, "several equal choices": 6, "switches": 3}


def forbidden_parts(name: str, action_mask: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """Whether each part of an action was masked out."""
    if name == "switches":
        return ~action_mask & (actions == 1)
    if name.startswith("several"):
        nvec = NVEC if name == "several choices" else (3, 3)
        starts = torch.tensor([sum(nvec[:i]) for i in range(len(nvec))])
        return ~action_mask.gather(-1, starts + actions)
    return ~action_mask.gather(-1, actions[..., None])


def some_mask(name: str, num: int) -> torch.Tensor:
    """(num, A) with some forbidden, and of each choice one allowed."""
    action_mask = torch.rand(num, MASKED[name], generator=generator(11)) < 0.4
    firsts = {"several choices": [1, 2, 8], "several equal choices": [0, 5]}.get(name, [0])
    action_mask[:, firsts] = True
    return action_mask


@pytest.mark.parametrize("name", MASKED)
def test_a_forbidden_choice_is_never_taken(name):
    distribution, action_mask = make(name).float(), some_mask(name, 4000)
    output = 20 * torch.randn(4000, distribution.num_outputs, generator=generator())
    parameters = distribution(output, torch.empty(0), action_mask)
    for seed in range(5):
        actions = distribution.sample(parameters, distribution.noise(4000, generator=generator(seed)))
        assert not forbidden_parts(name, action_mask, actions).any()
    assert not forbidden_parts(name, action_mask, distribution.mode(parameters)).any()


@pytest.mark.parametrize("name", MASKED)
def test_a_masked_distribution_is_the_one_over_the_allowed_choices(name):
    distribution, action_mask = make(name), some_mask(name, 8)
    output, other = randn(8, distribution.num_outputs), randn(8, distribution.num_outputs, seed=1)
    parameters, others = (distribution(x, torch.empty(0), action_mask) for x in (output, other))
    entropy, kl = distribution.entropy(parameters, None), distribution.kl(parameters, others)
    for row in range(8):
        if name == "switches":
            mine, theirs = ([td.Bernoulli(logits=x[row, action_mask[row]])] for x in (output, other))
        else:
            nvec = {"several choices": NVEC, "several equal choices": (3, 3)}.get(name, (MASKED[name],))
            allowed = action_mask[row].split(nvec)
            mine, theirs = (
                [td.Categorical(logits=part[: len(keep)][keep]) for part, keep in zip(parts, allowed, strict=True)]
                for parts in (output[row].view(len(nvec), -1), other[row].view(len(nvec), -1))
            )
        assert_close(entropy[row], sum(part.entropy().sum() for part in mine))
        assert_close(kl[row], sum(td.kl_divergence(p, q).sum() for p, q in zip(mine, theirs, strict=True)))


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_masks_leave_every_value_and_gradient_finite_also_where_all_is_forbidden(name, scale):
    distribution, action_mask = make(name).float(), some_mask(name, 16)
    action_mask[:4] = False
    leaf = (scale * torch.randn(16, distribution.num_outputs, generator=generator())).requires_grad_()
    parameters = distribution(leaf, torch.empty(0), action_mask)
    actions = distribution.sample(parameters, distribution.noise(16, generator=generator(1)))
    old = tuple(parameter.detach() for parameter in parameters)
    for value in (
        distribution.logprob(parameters, actions),
        distribution.logprob(parameters, torch.zeros_like(actions)),
        distribution.entropy(parameters, actions),
        distribution.kl(old, parameters),
    ):
        (gradient,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
        assert value.isfinite().all()
        assert gradient.isfinite().all()
        assert (gradient[:4] == 0).all()


def test_where_all_is_forbidden_no_choice_is_drawn_that_does_not_exist():
    distribution, nothing = MultiCategorical(NVEC), torch.zeros(5000, sum(NVEC), dtype=torch.bool)
    parameters = distribution(torch.zeros(5000, distribution.num_outputs), torch.empty(0), nothing)
    actions = distribution.sample(parameters, distribution.noise(5000, generator=generator()))
    assert (actions.max(0).values == torch.tensor(NVEC) - 1).all()
    assert_close(distribution.entropy(parameters, actions), torch.full((5000,), math.log(2 * 4 * 3)), atol=1e-5)


def test_forbidden_switches_stay_off_at_no_cost():
    distribution = Bernoulli(2)
    nothing = torch.zeros(2, dtype=torch.bool)
    parameters = distribution(torch.tensor([3.0, 9.0]), torch.empty(0), nothing)
    actions = distribution.sample(parameters, distribution.noise(1000, generator=generator()))
    assert (actions == 0).all()
    assert distribution.logprob(parameters, actions[0]) == 0
    assert distribution.entropy(parameters, actions[0]) == 0


# --- Gaussians -------------------------------------------------------------------------------------------------------


def test_actions_are_stored_as_drawn_and_clipped_for_the_environment():
    distribution = Gaussian(HALF_OPEN)
    actions = torch.tensor([[-5.0, -5.0], [5.0, 5.0], [0.5, -0.5]])
    assert_close(distribution.to_environment(actions), torch.tensor([[-1.0, -5.0], [5.0, 3.0], [0.5, -0.5]]))
    assert Gaussian(UNBOUNDED).to_environment(actions) is actions


def test_the_initial_standard_deviation_is_the_one_that_was_asked_for():
    for distribution in (Gaussian(BOX, initial_log_std=-2), Gaussian(BOX, initial_log_std=-2, state_dependent=True)):
        _, log_std = distribution(torch.zeros(3, distribution.num_outputs), torch.zeros(3, NUM_FEATURES))
        assert_close(log_std, torch.full((3, 2), -2.0))
    exploring = StateDependentExploration(BOX, num_features=3, initial_log_std=-2)
    _, log_std = exploring(torch.zeros(1, 2), torch.tensor([[2.0, 0.0, 1.0]]))
    assert_close(log_std, torch.full((1, 2), -2 + 0.5 * math.log(5)), atol=1e-6)


@every
def test_parameters_that_a_rollout_keeps_do_not_follow_the_optimizer(name):
    distribution = make(name)
    kept = tuple(parameter.detach() for parameter in parameters_of(distribution, 3))
    before = tuple(parameter.clone() for parameter in kept)
    for parameter in distribution.parameters():
        parameter.data += 1
    assert all(torch.equal(*pair) for pair in zip(kept, before, strict=True))


@pytest.mark.parametrize("far", [-50.0, 50.0])
def test_a_standard_deviation_out_of_bounds_is_moved_back_and_stays_free_to_return(far):
    distribution = Gaussian(BOX)
    nn.init.constant_(distribution.log_std, far)
    parameters = distribution(torch.zeros(4, 2), torch.empty(0))
    bound = min(max(far, LOG_STD_BOUNDS[0]), LOG_STD_BOUNDS[1])
    assert (parameters[1] == bound).all()
    distribution.entropy(parameters, torch.zeros(4, 2)).sum().backward()
    assert (distribution.log_std == bound).all()
    assert_close(distribution.log_std.grad, torch.full((2,), 4.0))


def test_a_state_dependent_standard_deviation_stays_within_bounds():
    distribution = Gaussian(BOX, state_dependent=True)
    _, log_std = distribution(torch.tensor([[0.0, 0.0, -50.0, 50.0]]), torch.empty(0))
    assert log_std.tolist() == [list(LOG_STD_BOUNDS)]


@few_examples
@given(mean=st.floats(-3, 3), log_std=st.floats(-2, 1), low=st.floats(-5, 5), width=st.floats(0.1, 10))
def test_the_squashed_density_integrates_to_one_over_the_box(mean, log_std, low, width):
    distribution = SquashedGaussian(Box((1,), (low,), (low + width,))).double()
    u = torch.linspace(mean - 9 * math.exp(log_std), mean + 9 * math.exp(log_std), 20_001, dtype=torch.float64)[:, None]
    parameters = tuple(torch.tensor(x, dtype=torch.float64).expand_as(u) for x in (mean, log_std))
    density = distribution.logprob(parameters, u).exp()
    # ∫ π(a) da by substitution, with the slope of to_environment itself.
    places = u.clone().requires_grad_()
    (slope,) = torch.autograd.grad(distribution.to_environment(places).sum(), places)
    assert torch.trapezoid(density * slope[:, 0], u[:, 0]).item() == pytest.approx(1, abs=1e-5)


def test_the_squashed_logprob_is_that_of_torch_s_transformed_distribution():
    distribution = make("squashed")
    parameters, u = decided(distribution, 50)
    low, high = distribution.low, distribution.high
    transforms = [td.TanhTransform(cache_size=1), td.AffineTransform((low + high) / 2, (high - low) / 2, cache_size=1)]
    reference = td.TransformedDistribution(td.Normal(parameters[0], parameters[1].exp()), transforms)
    actions = u
    for transform in transforms:
        actions = transform(actions)  # cached, so that the inverse is exact
    assert_close(distribution.to_environment(u), actions)
    assert_close(distribution.logprob(parameters, u), reference.log_prob(actions).sum(-1))


def test_squashed_logprobs_and_gradients_stay_finite_far_out():
    distribution = SquashedGaussian(BOX)
    mean = torch.tensor([[-40.0, 40.0], [100.0, -100.0]], requires_grad=True)
    parameters = distribution(mean, torch.empty(0))
    actions = mean.detach() + 1
    value = distribution.logprob(parameters, actions) + distribution.entropy(parameters, actions)
    value.sum().backward()
    assert value.isfinite().all()
    assert mean.grad.isfinite().all()


def test_squashed_actions_reach_their_bounds_and_never_pass_them():
    low, high = (-0.1, 0.3, -7.7), (0.3, 0.7, 1e-3)
    distribution = SquashedGaussian(Box((3,), low, high))
    actions = distribution.to_environment(torch.linspace(-200, 200, 10_001)[:, None].expand(-1, 3))
    assert torch.equal(actions.amin(0), distribution.low)
    assert torch.equal(actions.amax(0), distribution.high)


def test_the_squashed_entropy_estimate_and_its_gradient_are_right_on_average():
    distribution, num = SquashedGaussian(Box((1,), (-2.0,), (2.0,))).double(), 400_000
    mean = torch.tensor([[0.7]], dtype=torch.float64, requires_grad=True)
    parameters = distribution(mean.expand(num, 1), torch.empty(0))
    u = distribution.sample(parameters, distribution.noise(num, generator=generator())).detach()
    estimate = distribution.entropy(parameters, u).mean()
    gradients = torch.autograd.grad(estimate, (mean, distribution.log_std))

    # The same by integration over z, u = mean + std·z.
    z = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    center, log_std = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.7, 0.0))
    places = center + log_std.exp() * z
    slope = (1 - torch.tanh(places) ** 2).clamp_min(1e-300).log() + math.log(2)
    exact = (
        log_std + 0.5 * math.log(2 * math.pi * math.e) + torch.trapezoid(td.Normal(0, 1).log_prob(z).exp() * slope, z)
    )
    expected = torch.autograd.grad(exact, (center, log_std))
    assert estimate.item() == pytest.approx(exact.item(), abs=0.01)  # standard deviation of one estimate ≈ 1, √n = 632
    for gradient, truth in zip(gradients, expected, strict=True):
        assert gradient.item() == pytest.approx(truth.item(), abs=0.01)


# --- generalized state-dependent exploration -------------------------------------------------------------------------


def test_exploration_has_the_variance_of_the_closed_form():
    distribution, num = make("gSDE"), 100_000
    features = randn(1, NUM_FEATURES)
    mean, log_std = distribution(randn(1, 2, seed=1), features)
    noise = distribution.noise(1, num, generator=generator())[0]
    z = (distribution.sample((mean, log_std), noise, features) - mean) / log_std.exp()
    by_hand = sum(features[0, i] ** 2 * (2 * distribution.log_std[i]).exp() for i in range(NUM_FEATURES)).sqrt()
    assert_close(log_std[0].exp(), by_hand)
    assert (z.mean(0).abs() < 5 / math.sqrt(num)).all()
    assert ((z.var(0) - 1).abs() < 5 * math.sqrt(2 / num)).all()


@pytest.mark.parametrize(
    ("sample_freq", "expected"), [(4, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]), (1, range(10)), (-1, [0] * 10)]
)
def test_an_exploration_matrix_is_held_for_so_many_steps(sample_freq, expected):
    distribution = StateDependentExploration(BOX, num_features=NUM_FEATURES, sample_freq=sample_freq)
    noise = distribution.noise(10, 3, generator=generator())
    assert noise.shape == (10, 3, 2, NUM_FEATURES)
    for i in range(10):
        for j in range(10):
            assert torch.equal(noise[i], noise[j]) == (expected[i] == expected[j])
    assert not torch.equal(noise[:, 0], noise[:, 1])  # each environment has its own


def test_a_matrix_held_for_the_whole_rollout_is_kept_once():
    distribution = StateDependentExploration(BOX, num_features=NUM_FEATURES)
    assert distribution.noise(1000, 3).untyped_storage().nbytes() == 3 * 2 * NUM_FEATURES * 4


def test_held_exploration_gives_the_same_state_the_same_action():
    distribution = make("gSDE")
    features = randn(1, 4, NUM_FEATURES).expand(6, 4, NUM_FEATURES)
    parameters = distribution(torch.zeros(6, 4, 2, dtype=torch.float64), features)
    actions = distribution.sample(parameters, distribution.noise(6, 4, generator=generator()), features)
    assert (actions == actions[0]).all()


def test_exploration_teaches_its_deviations_and_leaves_the_features_alone():
    distribution = make("gSDE")
    features = randn(5, NUM_FEATURES).requires_grad_()
    parameters = distribution(randn(5, 2), features)
    distribution.logprob(parameters, randn(5, 2, seed=3)).sum().backward()
    assert features.grad is None
    assert (distribution.log_std.grad != 0).all()


def test_features_of_zero_explore_nothing_and_break_nothing():
    distribution = StateDependentExploration(BOX, num_features=NUM_FEATURES)
    parameters = distribution(torch.zeros(1, 2), torch.zeros(1, NUM_FEATURES))
    value = distribution.logprob(parameters, torch.zeros(1, 2))
    value.sum().backward()
    assert value.isfinite().all()
    assert distribution.log_std.grad.isfinite().all()


# --- divergence and gradients ----------------------------------------------------------------------------------------


@every
def test_the_divergence_from_itself_is_zero_and_flat(name):
    distribution = make(name)
    old, _ = decided(distribution, 6)
    new = tuple(parameter.detach().clone().requires_grad_() for parameter in old)
    divergence = distribution.kl(tuple(parameter.detach() for parameter in old), new)
    assert_close(divergence, torch.zeros(6))
    if name in CONTINUOUS or name == "switches":  # log-probabilities that need not add up to one are not flat
        for gradient in torch.autograd.grad(divergence.sum(), new):
            assert_close(gradient, torch.zeros_like(gradient))


@every
@few_examples
@given(seed=st.integers(0, 10_000))
def test_the_divergence_is_never_negative(name, seed):
    distribution = make(name)
    old, new = (parameters_of(distribution, 4, seed=s) for s in (seed, seed + 1))
    assert (distribution.kl(old, new) >= -1e-12).all()


def fisher_by_outcomes(distribution, output, outcomes):
    """E[∇ log π · ∇ log πᵀ] (O, O), summed over all outcomes."""
    fisher = torch.zeros(len(output), len(output), dtype=torch.float64)
    for action in outcomes:
        leaf = output.clone().requires_grad_()
        logprob = distribution.logprob(distribution(leaf, torch.empty(0)), action)
        (score,) = torch.autograd.grad(logprob, leaf)
        fisher += logprob.exp().detach() * torch.outer(score, score)
    return fisher


def hessian_of_kl(distribution, output):
    old = tuple(parameter.detach() for parameter in distribution(output, torch.empty(0)))
    return torch.autograd.functional.hessian(
        lambda leaf: distribution.kl(old, distribution(leaf, torch.empty(0))), output
    )


@pytest.mark.parametrize(
    ("name", "outcomes"),
    [
        ("five choices", torch.arange(5)),
        ("several choices", torch.cartesian_prod(*(torch.arange(n) for n in NVEC))),
        ("switches", torch.cartesian_prod(*[torch.arange(2.0, dtype=torch.float64)] * 3)),
    ],
)
def test_the_hessian_of_the_divergence_is_the_fisher_matrix(name, outcomes):
    distribution = make(name)
    output = randn(distribution.num_outputs)
    assert_close(hessian_of_kl(distribution, output), fisher_by_outcomes(distribution, output, outcomes))


def test_the_hessian_of_a_gaussian_s_divergence_is_its_fisher_matrix():
    # Of N(mean, e^log_std): 1/std² for the mean, 2 for log_std, nothing between them.
    distribution = make("gaussian, state-dependent")
    output = randn(4)
    assert_close(
        hessian_of_kl(distribution, output), torch.diag(torch.cat([(-2 * output[2:]).exp(), torch.full((2,), 2.0)]))
    )


@every
def test_gradients_of_logprob_entropy_and_kl_are_those_of_finite_differences(name):
    distribution = make(name)
    features = randn(3, NUM_FEATURES, seed=1000)
    old, actions = decided(distribution, 3)
    old = tuple(parameter.detach() for parameter in old)
    leaves = [randn(3, distribution.num_outputs, seed=8).requires_grad_(), *distribution.parameters()]

    def logprob(output, *_):
        return distribution.logprob(distribution(output, features), actions)

    def kl(output, *_):
        return distribution.kl(old, distribution(output, features))

    def entropy(output, *_):
        return distribution.entropy(distribution(output, features), actions)

    assert gradcheck(logprob, leaves)
    assert gradcheck(kl, leaves)
    assert gradgradcheck(kl, leaves)
    if name != "squashed":  # an estimate at a sample held fixed: its own test is above
        assert gradcheck(entropy, leaves)


@every
def test_no_graph_break_hinders_compilation(name):
    distribution = DISTRIBUTIONS[name]()
    noise, features = distribution.noise(1, 4, generator=generator())[0], torch.ones(4, NUM_FEATURES)

    def everything(output):
        parameters = distribution(output, features)
        actions = distribution.sample(parameters, noise, features)
        old = tuple(parameter.detach() for parameter in parameters)
        return (
            distribution.to_environment(actions),
            distribution.logprob(parameters, actions),
            distribution.entropy(parameters, actions),
            distribution.kl(old, parameters),
        )

    output = torch.randn(4, distribution.num_outputs, generator=generator())
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(everything, backend="eager", fullgraph=True)(output), everything(output))


# --- which distribution for which space ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "gaussian", "kind", "num_outputs"),
    [
        (Discrete(6, start=3), "independent", Categorical, 6),
        (MultiDiscrete((2, 4, 3), (0, 0, 0)), "independent", MultiCategorical, 12),
        (MultiBinary((2, 2)), "independent", Bernoulli, 4),
        (BOX, "independent", Gaussian, 2),
        (Box((), (-1.0,), (1.0,)), "independent", Gaussian, 1),
        (UNBOUNDED, "state_dependent", Gaussian, 4),
        (BOX, "squashed", SquashedGaussian, 2),
        (BOX, "gsde", StateDependentExploration, 2),
    ],
)
def test_each_space_gets_its_distribution(space, gaussian, kind, num_outputs):
    distribution = make_distribution(space, num_features=8, settings=NetworkSettings(gaussian=gaussian))
    assert type(distribution) is kind
    assert distribution.num_outputs == num_outputs


def test_settings_reach_the_distribution():
    settings = NetworkSettings(gaussian="gsde", initial_log_std=-3.29, sde_sample_freq=4)
    distribution = make_distribution(BOX, num_features=8, settings=settings)
    assert distribution.sample_freq == 4
    assert_close(distribution.log_std, torch.full((8, 2), -3.29))
    assert type(make_distribution(BOX, num_features=8)) is Gaussian


@pytest.mark.parametrize(
    ("space", "named"),
    [
        (Dict({"move": Discrete(2)}), "Dict"),
        (Tuple((Discrete(2), BOX)), "Tuple"),
        (Box((2, 2, 3), (0.0,) * 12, (255.0,) * 12, image=True), "image"),
    ],
)
def test_a_space_that_cannot_be_acted_in_is_refused_by_name(space, named):
    with pytest.raises(UserError, match=f"^{named} action spaces are not supported"):
        make_distribution(space, num_features=8)


@pytest.mark.parametrize("space", [UNBOUNDED, HALF_OPEN, Box((1,), (1.0,), (1.0,)), Box((1,), (-3.4e38,), (3.4e38,))])
def test_squashing_into_a_box_without_bounds_is_refused(space):
    with pytest.raises(UserError, match="squashed needs finite bounds"):
        make_distribution(space, num_features=8, settings=NetworkSettings(gaussian="squashed"))


@pytest.mark.parametrize("initial", [-11.0, 6.0, math.nan])
def test_an_initial_standard_deviation_out_of_bounds_is_refused(initial):
    with pytest.raises(UserError, match="initial_log_std"):
        make_distribution(BOX, num_features=8, settings=NetworkSettings(initial_log_std=initial))


def test_what_is_saved_is_what_is_learned():
    assert not Categorical(3).state_dict()
    assert list(Gaussian(BOX).state_dict()) == ["log_std"]
