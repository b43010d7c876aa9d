"""Settings that are known to solve an environment, by its id; what they reach is in examples/benchmarks/README.md."""

from __future__ import annotations

from dataclasses import replace

from classic.config import Algorithm, EnvironmentSettings, TrainConfig, TrustRegionSettings
from classic.settings import NetworkSettings
from ppo_rlhf.settings import OptimizerSettings, PPOSettings

MUJOCO = (
    "HalfCheetah-v5",
    "Hopper-v5",
    "InvertedDoublePendulum-v5",
    "InvertedPendulum-v5",
    "Reacher-v5",
    "Swimmer-v5",
    "Walker2d-v5",
)


def mujoco(env_id: str) -> TrainConfig:
    """Schulman et al. (2017), table 3, with the normalisation and annealing of baselines (Huang et al., 2022)."""
    return TrainConfig(
        env_id=env_id,
        num_steps=1_000_000,
        num_envs=1,
        horizon=2048,
        normalize_observations=True,
        normalize_rewards=True,
        ppo=PPOSettings(num_epochs=10, num_minibatches=32, value_clip_range=None, value_coef=0.5, max_grad_norm=0.5),
        trust_region=TrustRegionSettings(value_minibatches=32),
        optimizer=OptimizerSettings(lr=3e-4, schedule="linear"),
    )


PRESETS: dict[str, TrainConfig] = {
    # Rewards are scaled so that values stay near 1, within the reach of a few hundred steps of the value head, and the
    # horizon is long enough for it to see the cart drift out of bounds in time.
    "CartPole-v1": TrainConfig(
        env_id="CartPole-v1",
        num_steps=50_000,
        num_envs=32,
        horizon=32,
        gamma=0.99,
        gae_lambda=0.95,
        reward_scale=0.05,
        network=NetworkSettings(hidden_sizes=(32, 32)),
        ppo=PPOSettings(num_epochs=5, num_minibatches=2, value_clip_range=None, value_coef=0.5, max_grad_norm=0.5),
        optimizer=OptimizerSettings(lr=8e-3, schedule="linear"),
    ),
    # Wide noise at the start, since the task begins with swinging; short horizons suffice once it stands.
    "Pendulum-v1": TrainConfig(
        env_id="Pendulum-v1",
        num_steps=150_000,
        num_envs=32,
        horizon=64,
        gamma=0.95,
        gae_lambda=0.9,
        reward_scale=0.05,
        network=NetworkSettings(initial_log_std=0.5),
        ppo=PPOSettings(num_epochs=6, num_minibatches=4, value_clip_range=None, value_coef=0.5, max_grad_norm=0.5),
        optimizer=OptimizerSettings(lr=4e-3, schedule="linear"),
    ),
    # The next four start from Stable-Baselines3's zoo (hyperparams/ppo.yml).
    "Acrobot-v1": TrainConfig(
        env_id="Acrobot-v1",
        num_steps=300_000,
        num_envs=16,
        horizon=256,
        gamma=0.99,
        gae_lambda=0.94,
        normalize_observations=True,
        normalize_rewards=True,
        ppo=PPOSettings(num_epochs=4, num_minibatches=16, value_clip_range=None, value_coef=0.5, max_grad_norm=0.5),
        optimizer=OptimizerSettings(lr=1e-3, schedule="linear"),
    ),
    "MountainCar-v0": TrainConfig(
        env_id="MountainCar-v0",
        num_steps=1_000_000,
        num_envs=16,
        horizon=64,
        gamma=0.99,
        gae_lambda=0.98,
        normalize_observations=True,
        normalize_rewards=True,
        ppo=PPOSettings(num_epochs=4, num_minibatches=4, value_clip_range=None, value_coef=0.5, max_grad_norm=0.5),
        optimizer=OptimizerSettings(lr=1e-3, schedule="linear"),
    ),
    "MountainCarContinuous-v0": TrainConfig(
        env_id="MountainCarContinuous-v0",
        num_steps=100_000,
        num_envs=8,
        horizon=128,
        gamma=0.999,
        gae_lambda=0.9,
        normalize_observations=True,
        normalize_rewards=True,
        network=NetworkSettings(gaussian="gsde", initial_log_std=-1.0),
        ppo=PPOSettings(num_epochs=10, num_minibatches=4, value_clip_range=None, value_coef=0.5, max_grad_norm=5.0),
        optimizer=OptimizerSettings(lr=1e-3, schedule="linear"),
    ),
    "LunarLander-v3": TrainConfig(
        env_id="LunarLander-v3",
        num_steps=1_000_000,
        num_envs=16,
        horizon=512,
        gamma=0.999,
        gae_lambda=0.98,
        reward_scale=0.02,
        ppo=PPOSettings(
            num_epochs=4,
            num_minibatches=32,
            value_clip_range=None,
            value_coef=0.5,
            entropy_coef=0.01,
            max_grad_norm=0.5,
        ),
        optimizer=OptimizerSettings(lr=1e-3, schedule="linear"),
    ),
    **{env_id: mujoco(env_id) for env_id in MUJOCO},
    # What the tutorial of Hands-on Reinforcement Learning (boyu-ai, chapter 12) trains with: rollouts as long as one
    # episode, a single batch, learning rates of 1e-3 and 1e-2 (Pendulum: 1e-4 and 5e-3) for policy and value function,
    # 500 and 2,000 episodes' worth of steps. Here values regress on λ-returns that bootstrap at the time limit, where
    # the tutorial regresses on one step's and takes the limit for a true end; and advantages are whitened. Pendulum's
    # rollouts are eight episodes, in eight minibatches of one episode's size, so that there are as many steps of the
    # optimizer an episode: from one episode at a time it learns much worse, whitened or not.
    "tutorial-cartpole": TrainConfig(
        env_id="CartPole-v1",
        num_steps=100_000,
        num_envs=1,
        horizon=200,
        gamma=0.98,
        gae_lambda=0.95,
        environment=EnvironmentSettings(max_episode_steps=200),
        network=NetworkSettings(hidden_sizes=(128,), activation="relu", orthogonal=False, value_rate=10.0),
        ppo=PPOSettings(num_epochs=10, num_minibatches=1, value_clip_range=None, value_coef=0.5, max_grad_norm=100.0),
        optimizer=OptimizerSettings(lr=1e-3, schedule="constant", epsilon=1e-8),
    ),
    "tutorial-pendulum": TrainConfig(
        env_id="Pendulum-v1",
        num_steps=400_000,
        num_envs=8,
        horizon=200,
        gamma=0.9,
        gae_lambda=0.9,
        reward_scale=0.125,
        network=NetworkSettings(
            hidden_sizes=(128,), activation="relu", orthogonal=False, gaussian="state_dependent", value_rate=50.0
        ),
        ppo=PPOSettings(num_epochs=10, num_minibatches=8, value_clip_range=None, value_coef=0.5, max_grad_norm=100.0),
        optimizer=OptimizerSettings(lr=1e-4, schedule="constant", epsilon=1e-8),
    ),
}


# Where an algorithm needs another loop than PPO.
OWN_PRESETS: dict[tuple[str, Algorithm], TrainConfig] = {
    # A step goes as far as the trust region lets it, be there much to learn or little, so that every rollout should
    # hold whole episodes. All begin and end together: with 64 steps, most rollouts see pendulums that stand already,
    # whose whitened advantages are noise.
    ("Pendulum-v1", "trpo"): replace(
        PRESETS["Pendulum-v1"],
        algorithm="trpo",
        num_envs=8,
        horizon=200,
        trust_region=TrustRegionSettings(max_kl=0.02, value_epochs=20),
    ),
}


def preset_for(name: str, algorithm: Algorithm | None = None) -> TrainConfig:
    """The preset of that name, such as an environment's id, for an algorithm; the defaults where there is none."""
    preset = PRESETS.get(name, TrainConfig())
    if algorithm is None:
        return preset
    return OWN_PRESETS.get((name, algorithm)) or replace(preset, algorithm=algorithm)
