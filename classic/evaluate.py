"""How well a policy does: complete episodes on environments of their own, raw returns, frozen statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from classic.config import EnvironmentSettings, TrainConfig
from classic.envs import Environments, make_environments
from classic.policy import Policy, require_spaces
from ppo_rlhf.seeding import keyed_generator, keyed_seed

LONGEST_EPISODE = 27_000  # decisions after which an evaluated episode counts as over: Atari's own limit
MOST_ENVS = 100  # environments of an evaluation
MOST_PROCESSES = 8  # of an evaluation with a process an environment; not by the cores, for who plays what hangs on it


@dataclass(frozen=True)
class Outcome:
    """The episodes of an evaluation."""

    returns: Tensor  # (episodes,) raw, float64
    lengths: Tensor  # (episodes,)

    @property
    def metrics(self) -> dict[str, float]:
        """Mean return, its (biased) standard deviation over episodes, mean length."""
        return {
            "eval/return": self.returns.mean().item(),
            "eval/return_std": self.returns.std(correction=0).item(),
            "eval/length": self.lengths.double().mean().item(),
        }


class Evaluator:
    """Evaluates policies on the same episodes each time it is called."""

    def __init__(
        self,
        env: str | Callable[..., Any],
        *,
        episodes: int,
        seed: int,
        settings: EnvironmentSettings | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Raises UserError for an environment that cannot be made."""
        self.episodes = episodes
        self.seed = seed
        settings = settings or EnvironmentSettings()
        most = MOST_PROCESSES if settings.vectorization == "async" else MOST_ENVS
        self.envs = make_environments(
            env, num_envs=min(episodes, most), seed=seed, device=device, **settings.arguments()
        )

    def __call__(self, policy: Policy, *, deterministic: bool = True) -> Outcome:
        """The same episodes each time, played by this policy."""
        return play(self.envs, policy, episodes=self.episodes, seed=self.seed, deterministic=deterministic)

    def close(self) -> None:
        """Frees the environments."""
        self.envs.close()


def evaluate(
    policy: Policy, config: TrainConfig, *, episodes: int = 100, seed: int = 0, deterministic: bool = True
) -> Outcome:
    """Fresh episodes of the environment that a run trained on: none of those that its own evaluations see.

    Raises UserError for an environment that cannot be made, or that is not the policy's.
    """
    fresh = keyed_seed(seed, "fresh episodes")
    judge = Evaluator(config.env_id, episodes=episodes, seed=fresh, settings=config.environment)
    try:
        require_spaces(policy, judge.envs, config.env_id)
        return judge(policy, deterministic=deterministic)
    finally:
        judge.close()


@torch.no_grad()
def play(
    envs: Environments,
    policy: Policy,
    *,
    episodes: int,
    seed: int,
    deterministic: bool = True,
    longest: int | None = None,
    watch: Callable[[Any, Tensor, Tensor, Tensor], None] | None = None,
) -> Outcome:
    """Runs the episodes. Environment i plays episodes i, i + N, …, however long they are, so that short ones do not
    crowd out long ones; one that outlasts `longest` decisions, by default 27,000, counts as over.

    watch: sees of each decision the observations (N, …), the environments' actions (N, …), the rewards (N,), and where
    (N,) bool it belongs to an episode that counts.
    """
    device = envs.device
    noise = keyed_generator(seed, "evaluation", device=device)
    observations = envs.reset(seed=seed)
    memory, mask = policy.memory(envs.num_envs), envs.action_mask
    indices = torch.arange(envs.num_envs, device=device)
    due = (episodes - indices + envs.num_envs - 1) // envs.num_envs  # episodes still to play in each
    totals = torch.zeros(envs.num_envs, dtype=torch.float64, device=device)
    lengths = torch.zeros(envs.num_envs, device=device)
    ends: list[tuple[Tensor, Tensor, Tensor]] = []  # of every decision: totals, lengths, and whose episode it ends
    playing = due > 0
    while playing.any():
        drawn = None if deterministic else policy.distribution.noise(1, envs.num_envs, generator=noise)[0]
        actions = policy.distribution.to_environment(policy.decide(observations, drawn, memory, mask))
        step = envs.step(actions)
        if watch is not None:
            watch(observations, actions, step.rewards, step.decided & playing)
        observations, mask = step.observations, step.action_mask
        totals = totals + torch.where(step.decided, step.rewards, 0)
        lengths = lengths + step.decided
        ended = step.terminated | step.truncated
        over = ended | (lengths >= (longest or LONGEST_EPISODE))
        ends.append((totals, lengths, over & playing))
        totals, lengths = torch.where(over, 0, totals), torch.where(over, 0, lengths)
        due = due - over.long()
        playing = due > 0
        if memory is not None:
            memory.forget(ended if step.final_observations is not None else ~step.decided)
    returns_found, lengths_found, counted = (torch.stack(each) for each in zip(*ends, strict=True))
    return Outcome(returns_found[counted].cpu(), lengths_found[counted].cpu())


def tells_masks(env_id: str, settings: EnvironmentSettings) -> bool:
    """Whether an environment tells which actions are allowed. Raises UserError where it cannot be made."""
    envs = make_environments(env_id, **{**settings.arguments(), "vectorization": "auto"})
    try:
        envs.reset()
        return envs.action_mask is not None
    finally:
        envs.close()
