"""Running statistics against NumPy's of all data at once, and against a slow reference of the discounted return."""

from __future__ import annotations

import itertools
import math

import control_cases as cases
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from classic.evaluate import Evaluator
from classic.normalizers import EPSILON, LIMIT, ObservationNormalizer, RewardNormalizer, RunningMoments
from classic.policy import load
from ppo_rlhf.core import masked_moments

NAN = float("nan")
examples = settings(deadline=None, max_examples=40, derandomize=True, database=None)
numbers = st.floats(-100, 100, width=32)


def everything(*shape):
    return torch.ones(shape, dtype=torch.bool)


@examples
@given(arrays("float64", st.integers(1, 30), elements=numbers), st.lists(st.integers(0, 30), max_size=5))
def test_moments_merged_from_any_split_are_those_of_all_at_once(data, cuts):
    moments = RunningMoments()
    for piece in np.split(data, sorted(min(cut, len(data)) for cut in cuts)):
        moments.merge(*masked_moments(torch.from_numpy(piece), everything(len(piece))))
    assert moments.count == len(data)
    np.testing.assert_allclose(moments.mean, data.mean(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moments.variance, data.var(), rtol=1e-9, atol=1e-9)


def test_moments_keep_their_digits_far_from_zero():
    data = 1e7 + np.random.default_rng(0).normal(size=(50, 20))
    moments = RunningMoments()
    for row in data:
        moments.merge(*masked_moments(torch.from_numpy(row), everything(20)))
    np.testing.assert_allclose(moments.variance, data.var(), rtol=1e-6)


@examples
@given(arrays("float32", (3, 4, 2), elements=numbers), arrays("bool", (3, 4)))
def test_observations_are_normalized_by_the_moments_of_those_in_which_was_decided(data, mask):
    normalizer = ObservationNormalizer(2)
    poisoned = np.where(mask[..., None], data, NAN)
    normalizer.update(torch.from_numpy(poisoned), torch.from_numpy(mask))
    chosen = data[mask].astype(np.float64)
    mean, variance = (chosen.mean(0), chosen.var(0)) if len(chosen) else (np.zeros(2), np.ones(2))
    expected = np.clip((data - mean) / np.sqrt(variance + EPSILON), -LIMIT, LIMIT)
    spread = 1 + np.abs(data) / np.sqrt(variance + EPSILON)  # what rounding to float32 may be felt by
    assert (np.abs(normalizer(torch.from_numpy(data)).numpy() - expected) <= 1e-6 * spread).all()


def test_observations_in_which_nobody_decided_change_nothing():
    normalizer = ObservationNormalizer(2)
    normalizer.update(torch.randn(3, 4, 2, generator=cases.generator()), everything(3, 4))
    before = cases.copied(normalizer)
    normalizer.update(torch.full((3, 4, 2), NAN), ~everything(3, 4))
    assert cases.same(before, cases.copied(normalizer))


@pytest.mark.parametrize("broken", [NAN, math.inf])
def test_an_observation_that_is_not_finite_is_left_out(broken):
    told, silent = ObservationNormalizer(2), ObservationNormalizer(2)
    x, mask = torch.randn(3, 4, 2, generator=cases.generator()), everything(3, 4)
    x[1, 2, 0] = broken
    told.update(x, mask)
    mask[1, 2] = False
    silent.update(x, mask)
    assert told.moments.count == 11
    assert cases.same(cases.copied(told), cases.copied(silent))


def test_before_the_first_update_observations_pass_as_they_are():
    x = torch.tensor([[3.0, -4.0]])
    assert torch.equal(ObservationNormalizer(2)(x), x)


def test_a_number_that_never_varies_becomes_zero():
    normalizer = ObservationNormalizer(1)
    for _ in range(3):
        normalizer.update(torch.full((2, 3, 1), 12345.678), everything(2, 3))
    assert normalizer(torch.full((1, 1), 12345.678)).item() == 0


def slow_returns(rewards, ended, mask, gamma):
    """R_t = γ·R_{t−1} + r_t of each row, anew after every end: all that count, in float64."""
    found = []
    for row, ends, decided in zip(rewards, ended, mask, strict=True):
        episode = []
        for reward, end, counts in zip(row, ends, decided, strict=True):
            if not counts:
                continue
            episode.append(reward)
            found.append(math.fsum(gamma ** (len(episode) - 1 - i) * r for i, r in enumerate(episode)))
            if end:
                episode = []
    return np.array(found)


@examples
@given(arrays("float64", (3, 9), elements=numbers), arrays("bool", (3, 9)), st.lists(st.integers(1, 8), max_size=3))
def test_rewards_are_scaled_by_the_deviation_of_the_running_discounted_return(rewards, ended, cuts):
    mask = np.ones((3, 9), dtype=bool)
    mask[:, 1:] = ~ended[:, :-1]  # resets take a step, in which nothing ends and whatever is paid is not looked at
    ended = ended & mask
    poisoned = np.where(mask, rewards, NAN)
    normalizer, running = RewardNormalizer(0.9), torch.zeros(3, dtype=torch.float64)
    bounds = [0, *sorted(set(cuts)), 9]
    for start, stop in itertools.pairwise(bounds):
        parts = (torch.from_numpy(x[:, start:stop]) for x in (poisoned, ended, mask))
        running = normalizer.update(*parts, running)
    returns = slow_returns(rewards, ended, mask, 0.9)
    assert normalizer.moments.count == len(returns)
    np.testing.assert_allclose(normalizer.moments.variance, returns.var(), rtol=1e-9, atol=1e-9)
    scaled = np.clip(rewards / np.sqrt(returns.var() + EPSILON), -LIMIT, LIMIT)
    np.testing.assert_allclose(normalizer(torch.from_numpy(rewards)), scaled, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("broken", [NAN, -math.inf])
def test_a_reward_that_is_not_finite_is_left_out_and_its_episode_goes_on(broken):
    normalizer = RewardNormalizer(0.5)
    rewards = torch.tensor([[4.0, broken, 3.0], [1.0, 1.0, 1.0]])
    running = normalizer.update(rewards, torch.zeros(2, 3, dtype=torch.bool), everything(2, 3), torch.zeros(2))
    assert running.tolist() == [4.0, 1.75]  # of the first: 4 / 4 + 3
    assert normalizer.moments.count == 5
    assert normalizer.moments.variance == pytest.approx(np.var([4.0, 4.0, 1.0, 1.5, 1.75]))


def test_rewards_keep_their_sign_whatever_their_mean():
    normalizer = RewardNormalizer(0.99)
    rewards = 5 + torch.rand(4, 50, generator=cases.generator())
    normalizer.update(rewards, torch.zeros(4, 50, dtype=torch.bool), everything(4, 50), torch.zeros(4))
    assert (normalizer(rewards) > 0).all()


# --- in a policy -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def normalized():
    learner = cases.make_learner("CartPole-v1", normalize_observations=True, normalize_rewards=True)
    trajectory, _ = cases.collected(learner)
    learner.policy.observe(trajectory.inputs, trajectory.mask)
    learner.policy.reward_normalizer.update(
        trajectory.rewards, trajectory.ended, trajectory.mask, torch.zeros(learner.config.num_envs)
    )
    return learner.policy


def test_evaluation_changes_no_statistics(normalized):
    before = cases.copied(normalized)
    judge = Evaluator("CartPole-v1", episodes=3, seed=1)
    judge(normalized)
    judge(normalized, deterministic=False)
    normalized.act(np.full((2, 4), 100, np.float32))
    assert cases.same(before, cases.copied(normalized))


def test_statistics_are_saved_with_the_policy(normalized, tmp_path):
    normalized.save(tmp_path)
    again = load(tmp_path)
    assert again.normalizer.moments.count > 0
    assert cases.same(cases.copied(again.normalizer), cases.copied(normalized.normalizer))
    assert cases.same(cases.copied(again.reward_normalizer), cases.copied(normalized.reward_normalizer))
    assert again.reward_normalizer.gamma == normalized.reward_normalizer.gamma
