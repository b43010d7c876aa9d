"""Settings that are known to solve an environment, by its id; what they reach is in examples/benchmarks/README.md."""

from __future__ import annotations

from classic.config import EnvironmentSettings, TrainConfig
from classic.settings import NetworkSettings
from ppo_rlhf.settings import OptimizerSettings, PPOSettings

PRESETS: dict[str, TrainConfig] = {
    # Rewards are scaled so that values stay near 1, within the reach of a few hundred steps of the value head; a long
    # horizon lets it see the cart drift out of bounds in time.
    "CartPole-v1": TrainConfig(
        env_id="CartPole-v1",
        num_steps=50_000,
        num_envs=16,
        horizon=64,
        gamma=0.995,
        gae_lambda=0.95,
        reward_scale=0.02,
        ppo=PPOSettings(num_epochs=6, num_minibatches=2, value_clip_range=None, value_coef=0.5, max_grad_norm=0.5),
        optimizer=OptimizerSettings(lr=5e-3, schedule="linear"),
    ),
    "Pendulum-v1": TrainConfig(
        env_id="Pendulum-v1",
        num_steps=150_000,
        num_envs=32,
        horizon=64,
        gamma=0.9,
        gae_lambda=0.9,
        reward_scale=0.125,
        network=NetworkSettings(hidden_sizes=(64,)),
        ppo=PPOSettings(num_epochs=10, num_minibatches=8, value_clip_range=None, value_coef=0.5, max_grad_norm=0.5),
        optimizer=OptimizerSettings(lr=5e-3, schedule="linear"),
    ),
    # What the tutorial of Hands-on Reinforcement Learning (boyu-ai, chapter 12) trains with: rollouts as long as one
    # episode, a single batch, no whitening of minibatches, 500 and 2,000 episodes' worth of steps. Two things differ:
    # policy and value function share one learning rate (the tutorial's: 1e-3 and 1e-2; 1e-4 and 5e-3), and values
    # regress on λ-returns that bootstrap at the time limit, where the tutorial takes it for a true end.
    "tutorial-cartpole": TrainConfig(
        env_id="CartPole-v1",
        num_steps=100_000,
        num_envs=1,
        horizon=200,
        gamma=0.98,
        gae_lambda=0.95,
        environment=EnvironmentSettings(max_episode_steps=200),
        network=NetworkSettings(hidden_sizes=(128,), activation="relu", orthogonal=False),
        ppo=PPOSettings(num_epochs=10, num_minibatches=1, value_clip_range=None, value_coef=0.5, max_grad_norm=100.0),
        optimizer=OptimizerSettings(lr=1e-3, schedule="constant", epsilon=1e-8),
    ),
    "tutorial-pendulum": TrainConfig(
        env_id="Pendulum-v1",
        num_steps=400_000,
        num_envs=1,
        horizon=200,
        gamma=0.9,
        gae_lambda=0.9,
        reward_scale=0.125,
        network=NetworkSettings(hidden_sizes=(128,), activation="relu", orthogonal=False, gaussian="state_dependent"),
        ppo=PPOSettings(num_epochs=10, num_minibatches=1, value_clip_range=None, value_coef=0.5, max_grad_norm=100.0),
        optimizer=OptimizerSettings(lr=1e-4, schedule="constant", epsilon=1e-8),
    ),
}


def preset_for(name: str) -> TrainConfig:
    """The preset of that name, such as an environment's id; the defaults where there is none."""
    return PRESETS.get(name, TrainConfig())
