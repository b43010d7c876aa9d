"""The configuration of a control run as frozen dataclasses, free of torch; and the presets."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from classic.settings import NetworkSettings
from ppo_rlhf.settings import OptimizerSettings, PPOSettings, require

Algorithm = Literal["clip", "penalty", "trpo", "fixed", "none"]


@dataclass(frozen=True)
class EnvironmentSettings:
    """How the environments are made and stepped (read by `classic.envs`)."""

    vectorization: Literal["auto", "torch", "sync", "async", "vector_entry_point"] = "auto"
    """auto: batched torch environments for CartPole-v1 and Pendulum-v1, Gymnasium's in one process for others."""
    autoreset: Literal["next_step", "same_step", "disabled"] | None = None
    """Gymnasium's autoreset mode, on which nothing that is learnt depends; null: the vectorization's own."""
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the environment."""
    wrappers: tuple[str, ...] = ()
    """Gymnasium wrappers, innermost first, as module:function or module:Class."""
    max_episode_steps: int | None = None
    """Cuts episodes off after so many steps; null: the environment's own limit; -1: none."""
    frame_stack: int = 1
    """Latest observations that are shown together."""
    atari: bool = False
    """Mnih et al.'s (2015) preprocessing: no-ops, frame skip, 84 × 84 grey images."""

    def __post_init__(self) -> None:
        limit = self.max_episode_steps
        usable = limit is None or limit >= 1 or limit == -1
        require(usable, f"environment.max_episode_steps={limit} must be at least 1, null, or -1 for no limit.")
        require(self.frame_stack >= 1, f"environment.frame_stack={self.frame_stack} must be at least 1.")

    def arguments(self) -> dict[str, Any]:
        """The arguments of `make_environments`."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass(frozen=True)
class PenaltySettings:
    """PPO-Penalty's β (Schulman et al., 2017, section 4); read by `classic.ppo`."""

    kl_coef: float = 1.0
    """β at the start, or throughout with --algorithm fixed (the paper: 1)."""
    kl_target: float = 0.01
    """d_targ: β halves below two thirds of it and doubles above one and a half, once an update."""
    minimum: float = 1e-4
    """β never falls below this."""
    maximum: float = 1e4
    """β never rises above this."""

    def __post_init__(self) -> None:
        require(self.kl_coef >= 0, f"penalty.kl_coef={self.kl_coef} must not be negative.")
        require(self.kl_target > 0, f"penalty.kl_target={self.kl_target} must be above 0.")
        require(0 < self.minimum <= self.maximum, "penalty.minimum must be above 0 and at most penalty.maximum.")


@dataclass(frozen=True)
class TrustRegionSettings:
    """TRPO (Schulman et al., 2015); read by `classic.trpo`. Defaults: Stable-Baselines3 contrib's and Spinning Up's."""

    max_kl: float = 0.01
    """δ: a step's greatest mean KL(old‖new)."""
    damping: float = 0.1
    """Added to the Fisher matrix's diagonal."""
    conjugate_gradient_steps: int = 15
    """Iterations of the conjugate gradient method."""
    line_search_steps: int = 10
    """Step sizes that are tried, each `line_search_shrink` times the last."""
    line_search_shrink: float = 0.8
    """Factor from one step size tried to the next."""
    value_epochs: int = 10
    """Passes of the value function's regression over each rollout."""
    value_minibatches: int = 4
    """Of each of these passes; must divide the steps of a rollout, the environments for a recurrent policy."""

    def __post_init__(self) -> None:
        require(self.max_kl > 0, f"trust_region.max_kl={self.max_kl} must be above 0.")
        require(0 < self.line_search_shrink < 1, "trust_region.line_search_shrink must lie between 0 and 1.")
        for name in ("conjugate_gradient_steps", "line_search_steps", "value_epochs", "value_minibatches"):
            require(getattr(self, name) >= 1, f"trust_region.{name}={getattr(self, name)} must be at least 1.")


@dataclass(frozen=True)
class TrainConfig:
    """A control run (read by `classic.ppo`)."""

    env_id: str = "CartPole-v1"
    """A Gymnasium environment: CartPole-v1, ALE/Pong-v5, my_package:MyEnv-v0, …"""
    output_dir: str | None = None
    """The run folder; without it a fresh numbered one under runs/."""
    seed: int = 0
    """Everything random follows from it."""
    resume: bool = False
    """Go on from the last checkpoint in output_dir; start where there is none. Bit for bit where the environment is in
    torch; others begin new episodes."""
    algorithm: Algorithm = "clip"
    """clip: PPO-Clip; penalty: PPO-Penalty with adaptive β; trpo; fixed: a fixed β; none: no constraint at all."""
    num_steps: int = 100_000
    """Environment steps in all; whole rollouts only, at least one, at most so many."""
    num_envs: int = 8
    """Environments stepped together."""
    horizon: int = 128
    """Steps of each environment in a rollout."""
    gamma: float = 0.99
    """Discount (Schulman et al., 2017)."""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation (Schulman et al., 2017)."""
    bootstrap_truncations: bool = True
    """The return beyond a time limit is V of the last observation (Pardo et al., 2018); false: 0, as at a true end."""
    reward_scale: float = 1.0
    """Rewards are multiplied by it for learning; returns are told raw."""
    normalize_observations: bool = False
    """By running mean and variance, which are saved with the policy."""
    normalize_rewards: bool = False
    """By the running standard deviation of the discounted return."""
    clip_schedule: Literal["constant", "linear"] = "constant"
    """linear: the clip range shrinks to 0 over the run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where environment and network both gain by it, else the CPU."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision of the forward passes, through Accelerate."""
    compile: bool = False
    """torch.compile the forward and loss of the update: faster once warm, after a minute's compiling. It takes the
    place of ppo.compile; TRPO's update is not compiled."""
    eval_every: int = 0
    """Environment steps between evaluations; 0: only at the end."""
    eval_episodes: int = 20
    """Episodes of an evaluation, on environments of their own."""
    pictures: int = 6
    """Pictures of the policy for the report, spread evenly over the run, where its state can be drawn; 0: none."""
    save_every: int = 50_000
    """Environment steps between checkpoints, which take some 50 ms; 0: only at the end."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints stay."""
    max_skips: int = 5
    """So many updates in a row that were skipped, for numbers that are not finite, end a run that has a folder."""
    log_with: tuple[str, ...] = ("tensorboard",)
    """Accelerate's trackers: tensorboard, wandb, trackio, …"""
    environment: EnvironmentSettings = field(default_factory=EnvironmentSettings)
    """How the environments are made."""
    network: NetworkSettings = field(default_factory=NetworkSettings)
    """The policy's networks."""
    ppo: PPOSettings = field(
        default_factory=lambda: PPOSettings(
            num_epochs=10, num_minibatches=4, value_clip_range=None, value_coef=0.5, max_grad_norm=0.5
        )
    )
    """The update."""
    penalty: PenaltySettings = field(default_factory=PenaltySettings)
    """β of --algorithm penalty and fixed."""
    trust_region: TrustRegionSettings = field(default_factory=TrustRegionSettings)
    """--algorithm trpo."""
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(lr=3e-4))
    """AdamW and its learning rate over the updates."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_envs", "horizon", "eval_episodes", "keep_checkpoints", "max_skips"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("eval_every", "pictures", "save_every"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative.")
        for name in ("gamma", "gae_lambda"):
            require(0 <= getattr(self, name) <= 1, f"{name}={getattr(self, name)} must lie between 0 and 1.")
        require(0 <= self.seed < 2**32, f"seed={self.seed} must lie between 0 and 2**32 - 1.")
        rows, of = self.num_envs * self.horizon, f"num_envs × horizon = {self.num_envs * self.horizon} steps"
        if self.network.recurrent != "none":
            rows, of = self.num_envs, f"{self.num_envs} environments (whole ones, for a recurrent policy)"
        require(not self.ppo.compile, "ppo.compile=True: a control run has a setting of its own for it; use compile.")
        name, minibatches = "ppo.num_minibatches", self.ppo.num_minibatches
        if self.algorithm == "trpo":
            name, minibatches = "trust_region.value_minibatches", self.trust_region.value_minibatches
        require(rows % minibatches == 0, f"{name}={minibatches} does not divide the {of} of a rollout.")
        require(
            self.algorithm != "trpo" or self.precision != "fp16",
            "algorithm=trpo takes no precision=fp16, whose loss scaling is for a gradient step; use bf16, or no.",
        )

    @property
    def num_updates(self) -> int:
        """Rollouts, each with its update."""
        return max(1, self.num_steps // (self.num_envs * self.horizon))


@dataclass(frozen=True)
class ManyRuns:
    """Environments × seeds × whatever a command compares, a run folder each."""

    env_ids: tuple[str, ...] = ("CartPole-v1", "Pendulum-v1")
    """Gymnasium environments."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """A run each."""
    num_steps: int | None = None
    """Environment steps of a run; null: as the preset has them."""
    workers: int | None = None
    """Runs at a time, a thread each; null: as many as there are cores."""
    output_dir: str | None = None
    """Holds a run folder each; without it a fresh numbered folder under runs/."""
    resume: bool = False
    """Go on with earlier runs: what is finished is not run again."""

    def __post_init__(self) -> None:
        for name in ("env_ids", "seeds"):
            self._require_different(name)
        steps = self.num_steps
        require(steps is None or steps >= 1, f"num_steps={steps} must be at least 1.")
        require(all(0 <= seed < 2**32 for seed in self.seeds), "seeds must lie between 0 and 2**32 - 1.")
        require(self.workers is None or self.workers >= 1, f"workers={self.workers} must be at least 1.")

    def _require_different(self, name: str) -> None:
        values = getattr(self, name)
        require(len(values) > 0, f"{name}: name at least one.")
        require(len(set(values)) == len(values), f"{name}={list(values)} names one twice.")


@dataclass(frozen=True)
class CompareConfig(ManyRuns):
    """Algorithms over seeds on the same environments, each with its own preset for it (read by `classic.compare`)."""

    algorithms: tuple[Algorithm, ...] = ("clip", "penalty", "trpo", "none")
    """What is compared, all else being equal."""
    eval_episodes: int = 100
    """Episodes of the final evaluation, on environments of their own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """As of each run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_different("algorithms")
        require(self.eval_episodes >= 1, f"eval_episodes={self.eval_episodes} must be at least 1.")


@dataclass(frozen=True)
class ExperimentConfig(ManyRuns):
    """Variants of one configuration over seeds on the same environments (read by `classic.experiment`)."""

    variants: tuple[str, ...] = ()
    """What is compared, by the names in `classic.variants`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_different("variants")
