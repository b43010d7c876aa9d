"""From a policy and a batch of environments to the experience that an update learns from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from classic.envs import Environments, Step
from classic.policy import Memory, Policy, inputs_of
from classic.spaces import Observations
from ppo_rlhf.core import Experience, gae, whiten


@dataclass(frozen=True)
class Trajectory:
    """N environments × T decisions, as they came."""

    inputs: dict[str, Tensor]  # the policy's keyword arguments, (N, T, …) each but a recurrent memory (N, S)
    rewards: Tensor  # (N, T) raw
    bootstraps: Tensor | None  # (N, T) V of the true last observation of a cut-off episode where it is not the next one
    terminated: Tensor  # (N, T) bool
    truncated: Tensor  # (N, T) bool
    mask: Tensor  # (N, T) bool: the environment acted
    last_values: Tensor  # (N,) V of the observations after the last decision
    episodes: dict[str, Tensor]  # scalars: how many ended, their summed return and length

    @property
    def ended(self) -> Tensor:
        """(N, T) bool: an episode's last decision."""
        return self.terminated | self.truncated


@dataclass(frozen=True)
class CutOff:
    """The true last observations of the episodes that one step cut off without terminating them."""

    step: int
    rows: Tensor  # (K,) environments
    observations: Observations  # (K, …)
    memory: Memory | None

    @classmethod
    def at(cls, index: int, step: Step, memory: Memory | None) -> CutOff:
        """Those of a step that shows them apart from the next observations (SAME_STEP, DISABLED)."""
        assert step.final_observations is not None
        rows = (step.truncated & ~step.terminated).nonzero().squeeze(1)
        final = step.final_observations
        chosen = {name: x[rows] for name, x in final.items()} if isinstance(final, dict) else final[rows]
        return cls(index, rows, chosen, None if memory is None else Memory(memory.state[rows], memory.starts[rows]))


class Collector:
    """Steps a batch of environments with a policy, and remembers where each of them stands between rollouts."""

    def __init__(self, envs: Environments, policy: Policy) -> None:
        self.envs = envs
        self.observations: Observations = envs.reset()
        self.action_mask = envs.action_mask
        self.memory: Memory | None = policy.memory(envs.num_envs)
        nothing = torch.zeros(envs.num_envs, dtype=torch.float64, device=envs.device)
        self.returns, self.lengths = nothing, nothing.clone()  # of the episodes under way
        self.running = nothing.float()  # their discounted returns, for a normaliser

    @torch.no_grad()
    def collect(self, policy: Policy, horizon: int, generator: torch.Generator) -> Trajectory:
        """The next `horizon` decisions of every environment (no value is read from the host on the way).

        generator: of all noise of the rollout, on the environments' device.
        """
        noise = policy.distribution.noise(horizon, self.envs.num_envs, generator=generator).unbind(0)
        inputs = {} if self.memory is None else {"state": self.memory.state}
        columns: list[dict[str, Tensor]] = []
        steps: list[Step] = []
        cut_off: list[CutOff] = []
        for t in range(horizon):
            column = dict(inputs_of(self.observations))
            if self.action_mask is not None:
                column["action_mask"] = self.action_mask
            if self.memory is not None:
                column["starts"] = self.memory.starts
            column["actions"] = policy.decide(self.observations, noise[t], self.memory, self.action_mask)
            step = self.envs.step(policy.distribution.to_environment(column["actions"]))
            if step.final_observations is not None:
                cut_off.append(CutOff.at(t, step, self.memory))
            columns.append(column)
            steps.append(step)
            self._follow(step)

        inputs |= {name: torch.stack([column[name] for column in columns], dim=1) for name in columns[0]}
        rewards, terminated, truncated, mask = (
            torch.stack([getattr(step, name) for step in steps], dim=1)
            for name in ("rewards", "terminated", "truncated", "decided")
        )
        for name in inputs.keys() & {"observations", "vector"}:
            # An episode that failed may have shown NaN last, which a network carries into the gradient of every weight.
            inputs[name] = torch.where(mask[..., None] | inputs[name].isfinite(), inputs[name], 0)
        return Trajectory(
            inputs=inputs,
            rewards=rewards,
            bootstraps=_bootstraps(policy, cut_off, rewards) if cut_off else None,
            terminated=terminated,
            truncated=truncated,
            mask=mask,
            last_values=policy.value(self.observations, self.memory),
            episodes=self._count_episodes(rewards, terminated | truncated, mask),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """What the next rollout follows from besides policy and generators; empty where environments cannot tell."""
        envs = self.envs.state_dict()
        if not envs:
            return {}
        state = {f"envs.{name}": torch.as_tensor(value) for name, value in envs.items()}
        state |= {f"observations.{name}": x for name, x in inputs_of(self.observations).items()}
        state |= {"returns": self.returns, "lengths": self.lengths, "running": self.running}
        if self.memory is not None:
            state |= {"memory.state": self.memory.state, "memory.starts": self.memory.starts}
        return {name: tensor.clone().contiguous() for name, tensor in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on from there."""
        device = self.envs.device
        at = {name: tensor.to(device) for name, tensor in state.items()}
        self.envs.load_state_dict({n.removeprefix("envs."): x for n, x in state.items() if n.startswith("envs.")})
        seen = {n.removeprefix("observations."): x for n, x in at.items() if n.startswith("observations.")}
        self.observations = seen.get("observations", seen)
        self.returns, self.lengths, self.running = at["returns"], at["lengths"], at["running"]
        if self.memory is not None:
            self.memory = Memory(at["memory.state"], at["memory.starts"])

    def _follow(self, step: Step) -> None:
        self.observations, self.action_mask = step.observations, step.action_mask
        if self.memory is None:
            return
        # A new episode begins with the observation of the reset: at once, or after NEXT_STEP's undecided step.
        self.memory.forget((step.terminated | step.truncated) if step.final_observations is not None else ~step.decided)

    def _count_episodes(self, rewards: Tensor, ended: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Sums over the episodes that ended, from cumulative sums; what is left over is carried on.

        The return of an episode with a reward that is not finite is NaN, and no other's.
        """
        finite = rewards.isfinite()
        numbers = torch.cat([torch.where(mask & finite, rewards, 0).double(), mask & ~finite, mask])  # (3N, T)
        carried = torch.cat([self.returns.nan_to_num(), self.returns.isnan(), self.lengths])
        sums, rest = _sums_at_ends(numbers, carried, ended.repeat(3, 1))
        (returns, spoilt, lengths), (rest, rest_spoilt, self.lengths) = sums.chunk(3), rest.chunk(3)
        returns, self.returns = returns.where(spoilt == 0, torch.nan), rest.where(rest_spoilt == 0, torch.nan)
        return {"count": ended.sum(), "return": returns.sum(), "length": lengths.sum()}


def experience_of(
    trajectory: Trajectory,
    policy: Policy,
    *,
    gamma: float,
    lam: float,
    whiten_advantages: bool = True,
    bootstrap_truncations: bool = True,
    rows: int | None = None,
) -> Experience:
    """Rewards ► advantages and returns ► [whitened], and what the policy says of its own decisions.

    A truncated decision whose true last observation is not the next one pays γ·V of it and counts as terminated, which
    gives the same δ; without bootstrap_truncations it counts as terminated and pays nothing. rows: environments in one
    forward, for memory alone.
    """
    with torch.no_grad():
        mask, ended = trajectory.mask, trajectory.ended
        evaluations = [
            policy(**{name: x[start : start + (rows or len(mask))] for name, x in trajectory.inputs.items()})
            for start in range(0, len(mask), rows or len(mask))
        ]
        logprobs, _, values, distribution = evaluations[0] if len(evaluations) == 1 else _joined(evaluations)
        rewards, terminated = trajectory.rewards, trajectory.terminated
        if not bootstrap_truncations:
            terminated = ended
        elif trajectory.bootstraps is not None:
            rewards, terminated = rewards + gamma * trajectory.bootstraps, ended
        advantages, returns = gae(
            rewards,
            torch.cat([values, trajectory.last_values[:, None]], dim=1),
            terminated,
            ended,
            gamma=gamma,
            lam=lam,
        )
        if whiten_advantages:
            advantages = whiten(advantages, mask)
    return Experience(
        inputs=trajectory.inputs,
        logprobs=logprobs,
        values=values,
        advantages=advantages,
        returns=returns,
        mask=mask,
        distribution=distribution,
    )


def _bootstraps(policy: Policy, cut_off: list[CutOff], rewards: Tensor) -> Tensor:
    """V of all cut-off episodes' last observations in one forward, each at its decision; (N, T), 0 elsewhere."""
    parts = [inputs_of(part.observations) for part in cut_off]
    observations = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    rows = torch.cat([part.rows for part in cut_off])
    if not len(rows):
        return torch.zeros_like(rewards)
    memory = None
    if cut_off[0].memory is not None:
        memories = [part.memory for part in cut_off if part.memory is not None]
        memory = Memory(torch.cat([m.state for m in memories]), torch.cat([m.starts for m in memories]))
    steps = torch.cat([torch.full_like(part.rows, part.step) for part in cut_off])
    values = policy.value(observations.get("observations", observations), memory)
    return values.new_zeros(rewards.shape).index_put((rows, steps), values)


def _joined(evaluations: list[Any]) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    logprobs, entropy, values, distributions = zip(*evaluations, strict=True)
    parameters = tuple(torch.cat(parts) for parts in zip(*distributions, strict=True))
    return torch.cat(logprobs), torch.cat(entropy), torch.cat(values), parameters


def _sums_at_ends(x: Tensor, carried: Tensor, ended: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of x (N, T) since the last end, at each end (N, T), else 0; and since the last of all, carried on (N,)."""
    sums = x.cumsum(1) + carried[:, None]
    at_ends = torch.where(ended, sums, 0)
    # Sums only grow apart from one end to the next by what lies between, so the latest end's sum is what to take off.
    positions = torch.arange(x.shape[1], device=x.device)
    latest = torch.where(ended, positions, -1).cummax(1).values  # (N, T) the latest end up to t
    before = torch.cat([latest.new_full((len(x), 1), -1), latest[:, :-1]], dim=1)
    offset = torch.where(before >= 0, sums.gather(1, before.clamp(min=0)), 0)
    last = latest[:, -1:]
    rest = sums[:, -1] - torch.where(last >= 0, sums.gather(1, last.clamp(min=0)), 0)[:, 0]
    return torch.where(ended, at_ends - offset, 0), rest
