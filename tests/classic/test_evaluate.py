"""Evaluation: as many episodes as asked for, long and short alike, the same each time, with raw rewards."""

from __future__ import annotations

import functools
from typing import Any

import control_cases as cases
import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import classic.evaluate
from classic.config import EnvironmentSettings
from classic.envs import make_environments
from classic.evaluate import Evaluator, Outcome
from classic.policy import Policy
from classic.settings import NetworkSettings
from classic.spaces import Box, Discrete
from ppo_rlhf.errors import UserError

MODES = ["next_step", "same_step", "disabled"]


class Lengths(gymnasium.Env):
    """Episodes of 1 step that pay 1 and of 40 that pay 100, by the toss of a coin."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.left = int(self.np_random.choice([1, 40]))
        self.pays = 1.0 if self.left == 1 else 100 / 40
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(1, np.float32), self.pays, self.left == 0, False, {}


class Endless(Lengths):
    """Pays 1 a step, for ever."""

    def step(self, action):
        return np.zeros(1, np.float32), 1.0, False, False, {}


class Alternating(Lengths):
    """Endless in every other episode; its first is of 3 steps."""

    episode = -1

    def reset(self, **arguments: Any):
        shown = super().reset(**arguments)
        self.episode += 1
        self.left, self.pays = (3, 1.0) if self.episode % 2 == 0 else (10**9, 1.0)
        return shown


def policy_for(env, **network):
    """Any policy for its spaces."""
    envs = make_environments(env)
    envs.close()
    torch.manual_seed(0)
    return Policy(envs.observation_space, envs.action_space, NetworkSettings(**{"hidden_sizes": (8,), **network}))


def outcome_of(env, episodes, policy=None, *, seed=0, deterministic=True, **settings):
    judge = Evaluator(env, episodes=episodes, seed=seed, settings=EnvironmentSettings(**settings))
    found = judge(policy or policy_for(env), deterministic=deterministic)
    judge.close()
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("episodes", "most"), [(1, 100), (7, 100), (7, 3), (8, 4), (5, 1)])
def test_as_many_episodes_are_played_as_asked_for(episodes, most, mode, monkeypatch):
    monkeypatch.setattr(classic.evaluate, "MOST_ENVS", most)
    found = outcome_of(cases.Guess, episodes, autoreset=mode)
    assert found.lengths.tolist() == [16] * episodes
    assert found.returns.shape == (episodes,)


def test_a_process_an_environment_makes_a_few_processes_and_not_one_an_episode(monkeypatch):
    made = []

    def noted(env, *, num_envs, vectorization, **settings):
        made.append(num_envs)
        return make_environments(env, num_envs=num_envs, **settings)

    monkeypatch.setattr(classic.evaluate, "make_environments", noted)
    found = outcome_of(cases.Guess, 30, vectorization="async")
    assert made == [8]
    assert found.returns.shape == (30,)


@pytest.mark.parametrize("mode", MODES)
def test_short_episodes_do_not_crowd_out_long_ones(mode, monkeypatch):
    monkeypatch.setattr(classic.evaluate, "MOST_ENVS", 20)
    found = outcome_of(Lengths, 200, autoreset=mode)
    long = found.lengths == 40
    assert len(found.lengths) == 200
    assert set(found.lengths.tolist()) == {1, 40}
    assert set(found.returns.tolist()) == {1, 100}
    assert torch.equal(long, found.returns == 100)
    assert 70 <= long.sum() <= 130  # of 200 tosses: within 4 standard deviations; whoever stops at 200 ends finds a few


def test_every_way_of_resetting_plays_the_same_episodes():
    policy = policy_for(Lengths)
    first, *others = (outcome_of(Lengths, 30, policy, autoreset=mode) for mode in MODES)
    for other in others:
        assert torch.equal(other.lengths.sort().values, first.lengths.sort().values)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "Acrobot-v1"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_the_same_episodes_are_played_each_time(env, deterministic):
    policy = policy_for(env)
    judge = Evaluator(env, episodes=3, seed=5, settings=EnvironmentSettings(max_episode_steps=60))
    first, second = (judge(policy, deterministic=deterministic) for _ in range(2))
    judge.close()
    assert torch.equal(first.returns, second.returns)
    assert torch.equal(first.lengths, second.lengths)
    afresh = outcome_of(env, 3, policy, seed=5, deterministic=deterministic, max_episode_steps=60)
    assert torch.equal(first.returns, afresh.returns)
    if env != "Acrobot-v1":  # whose untrained policies are cut off, whatever the seed
        other = outcome_of(env, 3, policy, seed=6, deterministic=deterministic, max_episode_steps=60)
        assert not torch.equal(first.returns, other.returns)


def test_an_episode_without_an_end_counts_as_over(monkeypatch):
    monkeypatch.setattr(classic.evaluate, "LONGEST_EPISODE", 50)
    found = outcome_of(Endless, 3)
    assert found.lengths.tolist() == found.returns.tolist() == [50] * 3


@pytest.mark.parametrize("mode", MODES)
def test_what_follows_an_episode_that_counts_as_over_is_counted_from_zero(mode, monkeypatch):
    monkeypatch.setattr(classic.evaluate, "LONGEST_EPISODE", 50)
    monkeypatch.setattr(classic.evaluate, "MOST_ENVS", 1)
    found = outcome_of(Alternating, 3, autoreset=mode)
    assert found.lengths.tolist() == [3, 50, 50]


def test_episodes_may_be_cut_off_earlier():
    assert outcome_of(Endless, 2, max_episode_steps=9).lengths.tolist() == [9, 9]


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_an_environment_that_cannot_be_used_is_closed(vectorization):
    left_open = []

    class Odd(Lengths):
        observation_space = spaces.Text(3)

        def __init__(self) -> None:
            left_open.append(self)

        def close(self) -> None:
            left_open.remove(self)

    with pytest.raises(UserError, match="Text"):
        Evaluator(Odd, episodes=3, seed=0, settings=EnvironmentSettings(vectorization=vectorization))
    assert left_open == []


def test_returns_are_raw_whatever_the_policy_was_trained_with():
    policy = policy_for(Lengths)
    scaled = Policy(policy.observation_space, policy.action_space, normalize_observations=True, reward_gamma=0.9)
    scaled.reward_normalizer.moments.variance.fill_(1e6)
    found = outcome_of(Lengths, 20, scaled)
    assert set(found.returns.tolist()) == {1, 100}


def test_the_mean_and_the_biased_deviation_over_episodes_are_told():
    outcome = Outcome(torch.tensor([1.0, 3.0, 8.0], dtype=torch.float64), torch.tensor([2.0, 2.0, 5.0]))
    assert outcome.metrics == pytest.approx({"eval/return": 4, "eval/return_std": (26 / 3) ** 0.5, "eval/length": 3})


class Answers(Policy):
    """Says the cue that its memory holds: what it saw since the episode began, and nothing of the one before."""

    def __init__(self) -> None:
        settings = NetworkSettings(hidden_sizes=(), recurrent="gru", recurrent_size=2)
        super().__init__(Box((3,), (0.0,) * 3, (1.0,) * 3), Discrete(2), settings)
        self.seen: list[torch.Tensor] = []

    def _remembered(self, features, memory):
        """The sum of all that was seen."""
        memory.state = torch.where(memory.starts[:, None], 0, memory.state) + features[:, :2]
        memory.starts = torch.zeros_like(memory.starts)
        self.seen.append(memory.state.sum(-1))
        return memory.state.flip(-1)


@pytest.mark.parametrize("mode", MODES)
def test_memories_begin_anew_with_every_episode(mode, monkeypatch):
    monkeypatch.setattr(classic.evaluate, "MOST_ENVS", 4)
    policy = Answers()
    torch.nn.init.eye_(policy.networks.layers()[0][-2].data)
    found = outcome_of(cases.Remember, 40, policy, autoreset=mode)
    assert found.returns.tolist() == [1] * 40
    assert torch.stack(policy.seen).max() == 1  # one cue, never two


def test_masks_are_kept_to_in_evaluation():
    env = cases.Allowed  # refuses what it forbids
    for deterministic in (True, False):
        assert len(outcome_of(env, 3, policy_for(env), deterministic=deterministic).returns) == 3


def test_evaluation_draws_nothing_from_torch_s_own_generator():
    policy = policy_for("CartPole-v1")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    outcome_of("CartPole-v1", 2, policy, deterministic=False, max_episode_steps=20)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.cuda
@cases.NO_GPU
@pytest.mark.parametrize("network", [{}, {"recurrent": "lstm"}], ids=str)
def test_evaluation_runs_on_the_gpu(network):
    policy = policy_for("CartPole-v1", **network).cuda()
    judge = Evaluator("CartPole-v1", episodes=150, seed=0, device="cuda")
    found = judge(policy, deterministic=False)
    assert found.returns.shape == (150,)
    assert torch.equal(found.returns, found.lengths.double())
    scripted = Evaluator(functools.partial(cases.Guess), episodes=3, seed=0, device="cuda")
    assert scripted(policy_for(cases.Guess, **network).cuda()).lengths.tolist() == [16] * 3
