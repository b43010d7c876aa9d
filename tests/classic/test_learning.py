"""What must be learnt within seconds: each action space, observation space and algorithm on a task made for it."""

from __future__ import annotations

import functools

import control_cases as cases
import numpy as np
import pytest
import torch
from gymnasium import spaces

from classic import train

BOX = spaces.Box(np.array([-1, -3], np.float32), np.array([1, 1], np.float32))
ACTIONS = {
    "one of four": spaces.Discrete(4, start=3),
    "several choices": spaces.MultiDiscrete([3, 2]),
    "switches": spaces.MultiBinary(3),
}


def learnt(env, *, num_steps=4096, **changes):
    """A policy after 4,096 steps, of which nothing is known but the next reward."""
    settings = {"num_envs": 16, "horizon": 32, "gamma": 0.0, "gae_lambda": 0.0, "optimizer": {"lr": 1e-2}}
    settings |= {"ppo": {"num_epochs": 4}, **changes}
    return train(env, config=cases.config_of(**settings), num_steps=num_steps, seed=0)


@pytest.mark.parametrize("name", ACTIONS)
def test_every_kind_of_choice_is_learnt(name):
    env = functools.partial(cases.Guess, ACTIONS[name])
    assert cases.mean_reward(learnt(env), env) > 0.95  # by chance 0.25 or 0.5


@pytest.mark.parametrize("gaussian", ["independent", "state_dependent", "squashed", "gsde"])
def test_continuous_actions_are_learnt_with_each_gaussian(gaussian):
    env = functools.partial(cases.Guess, BOX)
    policy = learnt(env, network={"gaussian": gaussian, "initial_log_std": -1.0})
    assert cases.mean_reward(policy, env) > 0.75  # in the middle always: 0.5


@pytest.mark.parametrize("shown", [name for name in cases.SHOWN if "image" not in name])
def test_every_kind_of_observation_is_learnt_from(shown):
    env = functools.partial(cases.Guess, None, shown)
    assert cases.mean_reward(learnt(env), env) > 0.95


@pytest.mark.parametrize("shown", ["image", "image and vector"])
def test_images_are_learnt_from(shown):
    env = functools.partial(cases.Guess, None, shown)
    policy = learnt(env, num_steps=2048, optimizer={"lr": 1e-3}, ppo={"num_epochs": 4, "num_minibatches": 4})
    assert cases.mean_reward(policy, env, episodes=4) > 0.95


@pytest.mark.parametrize("algorithm", ["penalty", "trpo", "fixed", "none"])
def test_the_other_algorithms_learn_too(algorithm):
    assert cases.mean_reward(learnt(cases.Guess, algorithm=algorithm), cases.Guess) > 0.95


@pytest.mark.parametrize("recurrent", ["lstm", "gru"])
def test_only_a_recurrent_policy_learns_what_must_be_remembered(recurrent):
    network = {"hidden_sizes": (16,), "recurrent": recurrent, "recurrent_size": 16}
    policy = learnt(cases.Remember, network=network, gamma=0.9, gae_lambda=0.9)
    assert cases.mean_reward(policy, cases.Remember, episodes=40) > 0.95
    forgetful = learnt(cases.Remember, gamma=0.9, gae_lambda=0.9)
    assert cases.mean_reward(forgetful, cases.Remember, episodes=40) < 0.8  # by chance 0.5


def test_a_masked_task_is_learnt_without_a_single_forbidden_choice():
    # The environment itself refuses what it forbids; it shows the mask and nothing else.
    policy = learnt(cases.Allowed)
    assert cases.mean_reward(policy, cases.Allowed) > 0.95
    assert cases.mean_reward(policy, cases.Allowed, deterministic=False) > 0.8


def test_normalized_observations_and_rewards_are_learnt_from():
    scaled = {"wrappers": ("control_cases:far_and_dear",)}
    policy = learnt(cases.Guess, normalize_observations=True, normalize_rewards=True, environment=scaled)
    assert cases.mean_reward(policy, lambda: cases.far_and_dear(cases.Guess())) > 950


@pytest.mark.cuda
@cases.NO_GPU
@pytest.mark.parametrize("network", [{}, {"hidden_sizes": (16,), "recurrent": "gru", "recurrent_size": 16}])
def test_a_gpu_learns_what_a_cpu_does(network):
    policy = learnt(cases.Guess, device="cuda", network=network)
    assert policy.device.type == "cuda"
    assert policy.act(torch.eye(4, device="cuda")).tolist() == [0, 1, 2, 3]
