"""CartPole in torch against Gymnasium's, step for step, and what is its own."""

from __future__ import annotations

from itertools import product

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv

from classic.envs import CartPole
from classic.envs.cartpole import SHORTEST_EPISODE

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NO_GPU])]


def some_actions(state, generator):
    """Chance in half of the environments; in the others a controller that reaches the time limit."""
    x, velocity, angle, angular_velocity = state.cpu().unbind(-1)
    steady = (angle + 0.3 * angular_velocity + 0.05 * x + 0.1 * velocity) > 0
    chance = torch.rand(len(state), generator=generator) < 0.5
    return torch.where(torch.arange(len(state)) < len(state) // 2, chance, steady).long()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sutton_barto_reward", [False, True])
def test_float64_equals_gymnasium_over_a_hundred_thousand_steps(device, sutton_barto_reward):
    num_envs, num_steps = 160, 640
    envs = CartPole(num_envs, dtype=torch.float64, device=device, sutton_barto_reward=sutton_barto_reward)
    theirs = CartPoleVectorEnv(num_envs, sutton_barto_reward=sutton_barto_reward)
    envs.reset(seed=0)
    theirs.reset(seed=0)
    generator = torch.Generator().manual_seed(0)
    ends = np.zeros(2, dtype=int)
    for _ in range(num_steps):
        theirs.state = envs.state.cpu().numpy().T.copy()
        actions = some_actions(envs.state, generator)
        step = envs.step(actions.to(device))
        observations, rewards, terminated, truncated, _ = theirs.step(actions.numpy())
        decided = step.decided.cpu().numpy()
        assert np.array_equal(step.observations.cpu().numpy()[decided], observations[decided])
        assert np.array_equal(step.rewards.cpu().numpy(), rewards)
        assert np.array_equal(step.terminated.cpu().numpy(), terminated)
        assert np.array_equal(step.truncated.cpu().numpy(), truncated)
        # The state within two units in the last place of 1: multiply-adds are fused, sines another library's.
        difference = np.abs(envs.state.cpu().numpy() - theirs.state.T)[decided]
        assert difference.max(initial=0) <= 2 * np.spacing(1.0)
        ends += terminated.sum(), truncated.sum()
    assert ends[0] > 2_000
    assert ends[1] >= num_envs // 2


def test_float64_equals_gymnasium_as_it_is_made_by_id():
    num_envs = 8
    envs = CartPole(num_envs, dtype=torch.float64, max_episode_steps=50)
    theirs = [gymnasium.make("CartPole-v1", max_episode_steps=50) for _ in range(num_envs)]
    envs.reset(seed=0)
    for env in theirs:
        env.reset(seed=0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        state = envs.state.numpy()
        actions = some_actions(envs.state, generator)
        step = envs.step(actions)
        for i, env in enumerate(theirs):
            if not step.decided[i]:
                env.reset()
                continue
            env.unwrapped.state = state[i]
            observation, reward, terminated, truncated, _ = env.step(int(actions[i]))
            assert np.array_equal(step.observations[i].numpy(), observation)
            assert (float(step.rewards[i]), bool(step.terminated[i])) == (reward, terminated)
            assert bool(step.truncated[i]) == truncated


@pytest.mark.parametrize("device", DEVICES)
def test_float32_stays_within_a_millionth_of_gymnasium(device):
    num_envs = 64
    envs, theirs = CartPole(num_envs, device=device), CartPoleVectorEnv(num_envs)
    envs.reset(seed=0)
    theirs.reset(seed=0)
    generator = torch.Generator().manual_seed(2)
    for _ in range(300):
        theirs.state = envs.state.cpu().double().numpy().T.copy()
        actions = some_actions(envs.state, generator)
        step = envs.step(actions.to(device))
        expected = torch.from_numpy(theirs.step(actions.numpy())[0])
        error = (step.observations.cpu() - expected).abs() / expected.abs().clamp(min=1)
        assert error[step.decided.cpu()].max() <= 1e-6


def test_no_episode_is_shorter_than_the_draws_of_start_states_rely_on():
    corners = torch.tensor(list(product((-0.05, 0.05), repeat=4)), dtype=torch.float64)
    for action in (0, 1):
        envs = CartPole(len(corners), dtype=torch.float64)
        envs.set_state(corners)
        steps = [envs.step(torch.full((len(corners),), action)) for _ in range(SHORTEST_EPISODE)]
        assert not any(step.terminated.any() for step in steps[:-1])
        if action == 1:
            assert steps[-1].terminated.any()


def test_spaces_are_gymnasiums():
    theirs = gymnasium.make("CartPole-v1")
    assert np.allclose(CartPole.observation_space.low, theirs.observation_space.low)
    assert np.allclose(CartPole.observation_space.high, theirs.observation_space.high)
    assert CartPole.action_space.n == theirs.action_space.n


def test_a_fall_ends_the_episode_and_is_still_paid():
    envs = CartPole(2)
    envs.set_state(torch.tensor([[0.0, 0.0, 0.2, 1.0], [0.0, 0.0, 0.0, 0.0]]))
    step = envs.step(torch.tensor([0, 0]))
    assert step.terminated.tolist() == [True, False]
    assert step.rewards.tolist() == [1, 1]
    after = envs.step(torch.tensor([0, 0]))
    assert after.decided.tolist() == [False, True]
    assert after.rewards.tolist() == [0, 1]
    assert not after.terminated.any()
    assert after.observations[0].abs().max() <= 0.05


def test_an_action_that_is_neither_left_nor_right_is_an_error():
    with pytest.raises(IndexError):
        CartPole(1).step(torch.tensor([2]))
