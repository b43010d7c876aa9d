"""Pendulum in torch against Gymnasium's, step for step, and what is its own."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control.pendulum import PendulumEnv

from classic.envs import Pendulum

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NO_GPU])]


def wrapped(angle):
    return (angle + np.pi) % (2 * np.pi) - np.pi


def close(ours, theirs, tolerance):
    return abs(float(ours) - float(theirs)) <= tolerance * max(1.0, abs(float(theirs)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("g", [10.0, 9.81])
def test_every_step_is_gymnasiums(device, dtype, tolerance, g):
    num_envs = 16
    envs = Pendulum(num_envs, dtype=dtype, device=device, g=g)
    theirs = [gymnasium.wrappers.TimeLimit(PendulumEnv(g=g), 200) for _ in range(num_envs)]
    envs.reset(seed=0)
    for env in theirs:
        env.reset(seed=0)
    generator = torch.Generator().manual_seed(0)
    truncations = 0
    for _ in range(410):
        state = envs.state.double().cpu().numpy()
        actions = 2 * torch.randn(num_envs, 1, generator=generator, dtype=dtype)
        step = envs.step(actions.to(device))
        after = envs.state.double().cpu().numpy()
        for i, env in enumerate(theirs):
            if not step.decided[i]:
                env.reset()
                continue
            env.unwrapped.state = state[i]
            observation, reward, terminated, truncated, _ = env.step(actions[i].double().numpy())
            angle, speed = env.unwrapped.state
            assert abs(wrapped(after[i, 0] - angle)) <= tolerance
            assert close(after[i, 1], speed, tolerance)
            assert close(step.rewards[i], reward, tolerance)
            assert np.abs(step.observations[i].cpu().numpy() - observation).max() <= 1e-6 * max(1.0, abs(speed))
            assert (bool(step.terminated[i]), bool(step.truncated[i])) == (terminated, truncated)
            truncations += truncated
    assert truncations == 2 * num_envs


def test_many_turns_cost_float32_no_digits():
    envs = Pendulum(1, max_episode_steps=None)
    envs.set_state(torch.tensor([[0.1, 8.0]]))
    for _ in range(2_000):
        step = envs.step(torch.full((1, 1), 2.0))
    assert envs.state[0, 0].abs() <= 3.15
    assert torch.allclose(step.observations[:, :2].norm(dim=1), torch.ones(1), atol=1e-6)


def test_a_state_is_taken_up_whatever_its_turns():
    envs = Pendulum(1, dtype=torch.float64)
    envs.set_state(torch.tensor([[0.5 + 6 * np.pi, 1.0]], dtype=torch.float64))
    assert torch.allclose(envs.state, torch.tensor([[0.5, 1.0]], dtype=torch.float64))


def test_torques_are_clipped_and_may_come_with_or_without_an_axis():
    states = []
    for actions in ([[5.0]], [[2.0]], [5.0]):
        envs = Pendulum(1)
        envs.set_state(torch.tensor([[1.0, 0.0]]))
        step = envs.step(torch.tensor(actions))
        states.append([*envs.state[0].tolist(), *step.rewards.tolist()])
    assert states[0] == states[1] == states[2]
    assert states[0][2] == pytest.approx(-(1 + 0.001 * 4))


def test_no_gradient_goes_through_a_step():
    envs = Pendulum(2)
    step = envs.step(torch.ones(2, 1, requires_grad=True))
    assert not step.rewards.requires_grad
    assert not step.observations.requires_grad


def test_spaces_are_gymnasiums():
    theirs = gymnasium.make("Pendulum-v1")
    assert np.allclose(Pendulum.observation_space.high, theirs.observation_space.high)
    assert np.allclose(Pendulum.action_space.low, theirs.action_space.low)
    assert Pendulum.action_space.shape == theirs.action_space.shape
