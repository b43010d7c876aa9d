"""Training speed of `classic` beside Stable-Baselines3, on one core, in CPU seconds of the process.

    python examples/benchmarks/classic_speed.py [--seeds 0 1 2 3 4] [--compile]

Training steps per CPU second with the same networks and hyper-parameters as the zoo's CartPole-v1 entry; CPU seconds
until CartPole-v1 and Pendulum-v1 are solved, ours with our presets and the peer with the zoo's entries; and how fast
the batched environments step alone. Imports, compiling and evaluations are off the clock. Solved: 20 and then 100 fresh
deterministic episodes reach 475, and −200. What is not installed is reported as absent; nothing is installed.

Peers are run in turn with ours, so that a busy machine slows both; still, use an idle one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import gymnasium
import numpy as np
import torch

from classic.config import TrainConfig
from classic.envs import CartPole, Pendulum
from classic.ppo import improve, learner_of
from classic.presets import PRESETS
from ppo_rlhf.run import LoopState, make_accelerator
from ppo_rlhf.settings import OptimizerSettings, PPOSettings

BARS = {"CartPole-v1": 475.0, "Pendulum-v1": -200.0}
LIMITS = {"CartPole-v1": 100_000, "Pendulum-v1": 200_000}  # steps after which a run counts as unsolved
EVERY = {"CartPole-v1": 2048, "Pendulum-v1": 4096}  # steps between evaluations
Act = Callable[[np.ndarray], np.ndarray]

# Stable-Baselines3's zoo, hyperparams/ppo.yml: CartPole-v1. Learning rate and clip range fall linearly to 0.
ZOO_CARTPOLE = TrainConfig(
    env_id="CartPole-v1",
    num_steps=100_000,
    num_envs=8,
    horizon=32,
    gamma=0.98,
    gae_lambda=0.8,
    clip_schedule="linear",
    ppo=PPOSettings(
        num_epochs=20,
        num_minibatches=1,
        value_clip_range=None,
        value_coef=0.5,
        max_grad_norm=0.5,
        whiten_advantages="minibatch",
    ),
    optimizer=OptimizerSettings(lr=1e-3, schedule="linear"),
)


@dataclass
class Candidate:
    """Something that trains in pieces: each call trains on and returns the steps done so far."""

    name: str
    advance: Callable[[], int]
    act: Act


def ours(config: TrainConfig) -> Candidate:
    """Our loop with a configuration, one iteration a call."""
    learner = learner_of(config, config.env_id, None, make_accelerator(None, precision="no", log_with=(), cpu=True))
    state = LoopState(kl_coef=config.penalty.kl_coef)

    def advance() -> int:
        nonlocal state
        state, metrics = improve(learner, state)
        return int(metrics["steps"])

    return Candidate("ppo_rlhf", advance, lambda observations: learner.policy.act(observations))


def stable_baselines3(env_id: str, seed: int) -> Candidate:
    """Stable-Baselines3 with the zoo's hyper-parameters, one rollout and its update a call."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    total = LIMITS[env_id]

    def linear(start: float) -> Callable[[float], float]:
        return lambda remaining: start * remaining

    if env_id == "CartPole-v1":
        env = make_vec_env(env_id, n_envs=8, seed=seed)
        settings: dict[str, Any] = {"n_steps": 32, "batch_size": 256, "n_epochs": 20, "gamma": 0.98, "gae_lambda": 0.8}
        settings |= {"learning_rate": linear(1e-3), "clip_range": linear(0.2)}
    else:
        env = make_vec_env(env_id, n_envs=4, seed=seed)
        settings = {"n_steps": 1024, "n_epochs": 10, "gamma": 0.9, "gae_lambda": 0.95, "learning_rate": 1e-3}
        settings |= {"use_sde": True, "sde_sample_freq": 4}
    model = PPO("MlpPolicy", env, seed=seed, device="cpu", **settings)
    _, callback = model._setup_learn(total, None)

    def advance() -> int:
        model.collect_rollouts(model.env, callback, model.rollout_buffer, n_rollout_steps=model.n_steps)
        model._update_current_progress_remaining(model.num_timesteps, total)
        model.train()
        return int(model.num_timesteps)

    from stable_baselines3.common.logger import Logger

    model.set_logger(Logger(folder=None, output_formats=[]))
    return Candidate("stable-baselines3", advance, lambda seen: model.predict(seen, deterministic=True)[0])


def steps_per_second(candidate: Candidate, *, warm_up: int, measured: int, windows: int) -> float:
    """The best window's training steps per CPU second, after the warm-up."""
    while candidate.advance() < warm_up:
        pass
    best = 0.0
    for _ in range(windows):
        begin, start = candidate.advance(), time.process_time()
        done = begin
        while done < begin + measured:
            done = candidate.advance()
        best = max(best, (done - begin) / (time.process_time() - start))
    return best


def seconds_to_solve(candidate: Candidate, env_id: str) -> tuple[float, int] | None:
    """CPU seconds and steps until the environment is solved, evaluations off the clock; None where it is not."""
    spent, due = 0.0, EVERY[env_id]
    while True:
        start = time.process_time()
        done = candidate.advance()
        spent += time.process_time() - start
        if done >= due:
            due = done + EVERY[env_id]
            if all(mean_return(candidate.act, env_id, *test) >= BARS[env_id] for test in ((20, 1), (100, 2))):
                return spent, done
        if done >= LIMITS[env_id]:
            return None


def mean_return(act: Act, env_id: str, episodes: int, seed: int) -> float:
    """Of deterministic episodes in Gymnasium's own environments, one each."""
    envs = gymnasium.make_vec(env_id, num_envs=episodes, vectorization_mode="sync")
    observations, _ = envs.reset(seed=seed)
    totals, alive = np.zeros(episodes), np.ones(episodes, dtype=bool)
    while alive.any():
        observations, rewards, terminated, truncated, _ = envs.step(act(observations))
        totals += np.where(alive, rewards, 0)
        alive &= ~(terminated | truncated)
    envs.close()
    return float(totals.mean())


def stepping(environment: Any, actions: torch.Tensor, num_envs: int, windows: int = 20) -> float:
    """Environment steps per CPU second through the public `step`, the best window."""
    best = 0.0
    for _ in range(windows):
        start = time.process_time()
        for _ in range(200):
            environment.step(actions)
        best = max(best, 200 * num_envs / (time.process_time() - start))
    return best


def installed(package: str) -> str | None:
    """The version, None where it is absent."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def throughput_table(compile_too: bool) -> Iterator[str]:
    """Steps per CPU second with the zoo's CartPole entry."""
    yield "| CartPole-v1, the zoo's hyper-parameters | training steps per CPU second |"
    yield "|---|---|"
    window = {"warm_up": 4096, "measured": 2048, "windows": 8}
    results = {"ppo_rlhf": steps_per_second(ours(ZOO_CARTPOLE), **window)}
    if installed("stable-baselines3"):
        results["stable-baselines3"] = steps_per_second(stable_baselines3("CartPole-v1", 0), **window)
        results["ppo_rlhf"] = max(results["ppo_rlhf"], steps_per_second(ours(ZOO_CARTPOLE), **window))
    if compile_too:
        results["ppo_rlhf, compiled"] = steps_per_second(ours(replace(ZOO_CARTPOLE, compile=True)), **window)
    peer = results.get("stable-baselines3")
    for name, speed in results.items():
        yield f"| {name} | {speed:,.0f}{f' ({speed / peer:.1f} ×)' if peer else ''} |"
    if peer is None:
        yield "| stable-baselines3 | absent |"


def solving_table(env_id: str, seeds: list[int]) -> Iterator[str]:
    """CPU seconds to solve, a line for each candidate."""
    yield f"| {env_id} | solved | CPU seconds: median (min – max) | steps: median |"
    yield "|---|---|---|---|"
    results: dict[str, list[tuple[float, int] | None]] = {}
    for seed in seeds:
        candidates = [ours(replace(PRESETS[env_id], seed=seed))]
        if installed("stable-baselines3"):
            candidates.append(stable_baselines3(env_id, seed))
        for candidate in candidates:
            results.setdefault(candidate.name, []).append(seconds_to_solve(candidate, env_id))
    medians = {}
    for name, outcomes in results.items():
        solved = [outcome for outcome in outcomes if outcome is not None]
        if not solved:
            yield f"| {name} | 0 of {len(seeds)} | – | – |"
            continue
        seconds = [outcome[0] for outcome in solved]
        medians[name] = statistics.median(seconds)
        steps = statistics.median(outcome[1] for outcome in solved)
        spread = f"{medians[name]:.2f} ({min(seconds):.2f} – {max(seconds):.2f})"
        yield f"| {name} | {len(solved)} of {len(seeds)} | {spread} | {steps:,.0f} |"
    if len(medians) == 2:
        yield f"\nratio of medians: {medians['stable-baselines3'] / medians['ppo_rlhf']:.1f}"


def stepping_table() -> Iterator[str]:
    """The environments alone."""
    yield "| environments | CartPole, million steps per CPU second | Pendulum |"
    yield "|---|---|---|"
    for num_envs in (8, 64, 1024, 4096):
        carts = stepping(CartPole(num_envs), torch.randint(0, 2, (num_envs,)), num_envs)
        pendulums = stepping(Pendulum(num_envs), torch.randn(num_envs, 1), num_envs)
        yield f"| {num_envs:,} | {carts / 1e6:.2f} | {pendulums / 1e6:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--compile", action="store_true", help="measure our compiled update as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = ("torch", "gymnasium", "stable-baselines3")
    print(", ".join(f"{name} {installed(name) or 'absent'}" for name in names), "\n")
    tables = [throughput_table(arguments.compile), *(solving_table(env_id, arguments.seeds) for env_id in BARS)]
    for table in [*tables, stepping_table()]:
        for line in table:
            print(line, flush=True)
        print()


if __name__ == "__main__":
    main()
