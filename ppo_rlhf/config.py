"""The configurations of the stages, as frozen dataclasses free of torch; and reading and checking them.

A stage's configuration is the YAML file of its `--config`, each field of which the command line can override.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ppo_rlhf.errors import did_you_mean
from ppo_rlhf.reward_settings import RewardSource, ScoreShaping
from ppo_rlhf.settings import (
    Extension,
    LoRASettings,
    OptimizerSettings,
    PPOSettings,
    SamplingSettings,
    Ties,
    TooLong,
    require,
)

ADVANTAGES = ("gae", "rloo", "grpo")


@dataclass(frozen=True)
class RunConfig:
    """What every training run has."""

    output_dir: str | None = None
    """The run folder; without it a fresh numbered one under runs/."""
    seed: int = 0
    """Everything random follows from it."""
    resume: bool = False
    """Go on from the last checkpoint in output_dir; start where there is none."""
    eval_every: int = 100
    """Steps between evaluations on held-out data; 0 evaluates at the start and the end alone."""
    save_every: int = 100
    """Steps between checkpoints; 0 saves none."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints stay."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision of the forward passes, through Accelerate."""
    matmul_precision: Literal["auto", "highest", "high", "medium"] = "auto"
    """torch.set_float32_matmul_precision. auto: on a CPU the quicker of those that are exact there, by measurement."""
    max_skips: int = 5
    """So many updates in a row that were skipped, for numbers that are not finite, end the run. With four epochs of PPO
    it leaves fp16's loss scale the 16 halvings that it needs at most from its first value, 2^16."""
    log_with: tuple[str, ...] = ("tensorboard",)
    """Accelerate's trackers: tensorboard, wandb, trackio, …"""
    columns: dict[str, str | None] = field(default_factory=dict)
    """Other names for the data's columns, {question: prompt, answer: completion}; null leaves a column out."""
    chat_template: str | None = None
    """A Jinja file by which conversations become text; null: the tokenizer's own. It is saved with the policy."""
    trust_remote_code: bool = False
    """Let a model's own Python code run. Only for models whose code you have read."""
    lora: LoRASettings = field(default_factory=LoRASettings)
    """Adapters in place of full fine-tuning."""

    def __post_init__(self) -> None:
        for name in ("eval_every", "save_every"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative.")
        require(0 <= self.seed < 2**32, f"seed={self.seed} must lie between 0 and 2**32 - 1.")
        require(self.max_skips >= 1, f"max_skips={self.max_skips} must be at least 1.")
        require(self.keep_checkpoints >= 1, f"keep_checkpoints={self.keep_checkpoints} must be at least 1.")


@dataclass(frozen=True)
class SupervisedConfig(RunConfig):
    """What the two supervised stages share: passes over data in shuffled batches."""

    num_epochs: float = 1.0
    """Passes over the training data."""
    batch_size: int = 32
    """Examples of one optimizer step, over all processes."""
    micro_batch_size: int | None = None
    """Examples of one forward and backward, for memory alone; null: all of a process's share."""
    max_skips: int = 20
    """So many steps in a row that were skipped, for numbers that are not finite, end the run: more than the 16 halvings
    that fp16's loss scale needs at most from its first value, 2^16."""
    max_grad_norm: float = 1.0
    """The gradient's norm is clipped to this."""
    eval_fraction: float = 0.05
    """Share of the prompts held out for evaluation where eval_data is not given."""
    keep_best: bool = True
    """Save the model of the best evaluation, not the last one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.num_epochs < math.inf, f"num_epochs={self.num_epochs} must be above 0, and finite.")
        require(self.batch_size >= 1, f"batch_size={self.batch_size} must be at least 1.")
        micro = self.micro_batch_size
        require(micro is None or micro >= 1, f"micro_batch_size={micro} must be at least 1, or null.")
        require(self.max_grad_norm > 0, f"max_grad_norm={self.max_grad_norm} must be above 0.")
        require(0 < self.eval_fraction < 1, f"eval_fraction={self.eval_fraction} must lie between 0 and 1.")


@dataclass(frozen=True)
class SFTConfig(SupervisedConfig):
    """Supervised fine-tuning: demonstrations → policy (read by `ppo_rlhf.train.sft`)."""

    policy: str = "gpt2"
    """The language model to start from: a folder, a Hub name, or module:function returning (model, tokenizer)."""
    data: str | None = None
    """Demonstrations: rows with `prompt` and `completion`, or `text`, or `messages`. A file, folder, Hub name or
    module:function; see docs/data.md."""
    eval_data: str | None = None
    """Held-out demonstrations; null: a share of the data."""
    batch_tokens: int | None = None
    """Tokens of one optimizer step, over all processes, instead of batch_size demonstrations: as many whole ones as fit
    (packing). null: batch_size of them."""
    max_length: int | None = None
    """Tokens of a demonstration; null: what the model's context holds."""
    too_long: TooLong | None = None
    """Longer ones are dropped, cut on the left or on the right, or refused; null: cut on the right where max_length is
    set, else refused. What is dropped or cut is told."""
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(lr=1e-5, schedule="cosine"))
    """AdamW and its learning rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_length", "batch_tokens"):
            _check_length(name, getattr(self, name))


@dataclass(frozen=True)
class RewardConfig(SupervisedConfig):
    """Reward modelling: comparisons → reward model (read by `ppo_rlhf.train.reward_model`)."""

    policy: str | None = None
    """The policy that the reward model starts from, and whose mean score it is normalised to."""
    data: str | None = None
    """Comparisons: `prompt`, `chosen`, `rejected` [, `margin`], the prompt also within the other two, or `prompt`,
    `responses`, `ranks` (1 the best); or the URL of a database of preferences; see docs/data.md."""
    ties: Ties = "drop"
    """Responses of equal rank teach nothing (drop), or both orders, each in full (both) or by half (half)."""
    eval_data: str | None = None
    """Held-out comparisons; null: a share of the data, split by prompt."""
    max_length: int | None = None
    """Tokens of a prompt with a response; null: what the model's context holds."""
    too_long: Literal["left", "drop", "refuse"] = "left"
    """Longer ones lose the beginning of their prompt (left), or the whole comparison is dropped, or refused. With left
    a comparison is dropped whose response alone does not fit. What is dropped or cut is told."""
    gold: str | None = None
    """module:function of the true reward where it is known: held-out accuracy is then against its order."""
    language_model_coef: float = 0.0
    """Weight of an auxiliary language-modelling loss on the compared texts, which regularises a small trunk."""
    prompts: str | None = None
    """Prompts to which the starting policy responds, for the normalisation; null: those of the data."""
    normalization_prompts: int = 256
    """So many of them: its responses to them get mean score 0 and standard deviation 1."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    """How those responses are sampled."""
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(lr=1e-5, schedule="linear"))
    """AdamW and its learning rate (Ouyang et al., 2022: one epoch, 9e-6)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_length("max_length", self.max_length)
        require(self.normalization_prompts >= 2, "normalization_prompts must be at least 2.")
        coef = self.language_model_coef
        require(0 <= coef < math.inf, f"language_model_coef={coef} must not be negative, and finite.")


@dataclass(frozen=True)
class MissingEOS:
    """What a response earns that was cut off by the length limit."""

    rule: Literal["none", "set", "subtract", "bootstrap"] = "set"
    """set: its score becomes `value` (Ziegler et al., 2019); subtract: `value` is taken off (TRL); none: neither.
    bootstrap: it is not scored, and what its last state is worth takes the place of what might have come (Pardo et al.,
    2018)."""
    value: float = -1.0
    """The score to set, or what to subtract, which must be 0 or more."""

    def __post_init__(self) -> None:
        require(math.isfinite(self.value), f"missing_eos.value={self.value} must be finite.")
        require(
            self.rule != "subtract" or self.value >= 0,
            f"missing_eos.value={self.value} would reward a missing eos: rule subtract takes the value off the score.",
        )


@dataclass(frozen=True)
class PretrainingSettings:
    """PPO-ptx: a language-modelling loss on texts, accumulated in PPO's own optimizer steps (Ouyang et al., 2022)."""

    data: str | None = None
    """Rows with `text`, or `prompt` and `completion`; null: none of this."""
    coef: float = 27.8
    """Weight of the mean cross-entropy a token (Ouyang et al., 2022: 27.8)."""
    batch_size: int = 64
    """Texts of one optimizer step, over all processes (Ouyang et al., 2022: eight for each response)."""
    micro_batch_size: int | None = None
    """Texts of one forward and backward, for memory alone; null: all of a process's share."""
    max_length: int = 256
    """Longer texts are cut on the right."""

    def __post_init__(self) -> None:
        require(self.coef > 0, f"pretraining.coef={self.coef} must be above 0; without data there is no such loss.")
        require(self.batch_size >= 1, f"pretraining.batch_size={self.batch_size} must be at least 1.")
        micro = self.micro_batch_size
        require(micro is None or micro >= 1, f"pretraining.micro_batch_size={micro} must be at least 1, or null.")
        require(self.max_length >= 2, f"pretraining.max_length={self.max_length} must be at least 2.")


@dataclass(frozen=True)
class PPOConfig(RunConfig):
    """PPO: prompts and a reward → tuned policy (read by `ppo_rlhf.train.ppo`)."""

    policy: str | None = None
    """The supervised policy to start from: a folder, a Hub name, or module:function."""
    reference: str | None = None
    """The frozen policy that KL is measured to; null: the policy as it starts."""
    reward: RewardSource | None = None
    """A reward model's folder, module:function called as function(prompts, responses, **columns) -> scores, or the URL
    of an HTTP scorer; or several of them, as a list of parts with weights (docs/rewards.md)."""
    score_shaping: ScoreShaping = field(default_factory=ScoreShaping)
    """What becomes of a score before it is paid."""
    reward_shaping: str | Extension | None = None
    """What makes a reward for each token of scores and KL: module:function, called as
    `ppo_rlhf.train.ppo_credit.token_rewards`; null: that function. See docs/extending.md."""
    gold: str | None = None
    """module:function of a true reward, or of a judge: logged, never trained on."""
    prompts: str | None = None
    """Rows with `prompt`, a text or a conversation; their other columns go to the reward function."""
    max_prompt_length: int | None = None
    """Tokens of a prompt; null: what the response leaves of the model's context."""
    too_long: TooLong = "refuse"
    """Longer ones are refused, dropped, or cut on the left or on the right; what is dropped or cut is told."""
    eval_prompts: str | None = None
    """Held-out prompts; null: a share of the prompts."""
    eval_fraction: float = 0.1
    """Share of the prompts held out where eval_prompts is not given."""
    max_eval_prompts: int = 512
    """At most so many held-out prompts are used."""
    num_steps: int = 100
    """Rollouts, each followed by one update."""
    batch_size: int = 64
    """Responses of one rollout, over all processes."""
    responses_per_prompt: int = 1
    """Responses of a rollout to each of its prompts; must divide batch_size."""
    advantage: Literal["gae", "rloo", "grpo"] | str | Extension = "gae"
    """gae: generalised advantage estimation, with a value function. rloo, grpo: a response's rewards against those of
    the other responses to its prompt, without one: less their mean (Ahmadian et al., 2024), or normalised (Shao et al.,
    2024). Or module:function, called as `ppo_rlhf.train.ppo_credit.response_advantages` (docs/extending.md)."""
    value_model: Literal["shared", "separate"] = "shared"
    """Of gae. shared: a head on the policy's trunk. separate: a model that starts from the reward model where `reward`
    names just that, else from the policy."""
    value_head: str | None = None
    """A folder with a head that a shared value function starts from, `v_head.summary.…`: a run's value_head/, or one of
    TRL's; null: that of the policy's folder where it has one, else zero."""
    overlap_scoring: int = 0
    """Score responses in groups of so many as they end, in a thread, while others are sampled: where the reward waits,
    as for a server. 0: in one call afterwards, for a reward that compares a batch's responses, or computes here."""
    sample_ahead: bool = False
    """Sample each rollout before the update on the one before it, and score it meanwhile: hides the time that a reward
    waits. Its policy is one update old then; log-probabilities and ratios are of the policy that sampled."""
    kl_coef: float = 0.05
    """β of the KL penalty (Stiennon et al., 2020: 0.05, in the reward), also where kl_penalty has it in the loss; to
    start with where kl_target is given."""
    kl_target: float | None = None
    """Nats per response at which β is adapted to hold the KL (Ziegler et al., 2019: 6); null: β is fixed."""
    kl_horizon: float = 10_000
    """Episodes over which the adaptation acts (Ziegler et al., 2019)."""
    kl_penalty: Literal["reward", "k2", "k3"] = "reward"
    """Where the KL penalty acts. reward: on each token's reward, k1. k2, k3: in the loss, by that estimate; k2 is exact
    as long as the policy is the one that sampled, k3 is weighted by their ratio (`core.losses.reference_kl_loss`)."""
    gamma: float = 1.0
    """Discount (lm-human-preferences: 1)."""
    gae_lambda: float = 0.95
    """λ of the advantage estimate (lm-human-preferences: 0.95)."""
    whiten_rewards: bool = False
    """Scale the shaped rewards of a rollout to unit variance (lm-human-preferences did)."""
    frozen_precision: Literal["no", "bf16"] = "no"
    """bf16: reference and reward models that the run loads take half the memory; KL and scores are rounded."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    ema_decay: float | None = None
    """Decay, at each rollout, of a moving average of the policy's weights, which is evaluated and saved in their place
    (Ouyang et al., 2022: 0.992); null: the last weights."""
    missing_eos: MissingEOS = field(default_factory=MissingEOS)
    """What a response earns that was cut off."""
    pretraining: PretrainingSettings = field(default_factory=PretrainingSettings)
    """PPO-ptx."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    """How responses are sampled."""
    sampler: str | Extension | None = None
    """What samples the rollouts: module:function called as `ppo_rlhf.sampling.sample`, or the URL of a vLLM server;
    null: that function, which samples the held-out responses in any case. See docs/extending.md."""
    ppo: PPOSettings = field(default_factory=PPOSettings)
    """The update."""
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(lr=1e-5, schedule="linear"))
    """AdamW and its learning rate over the rollouts."""
    value_lr: float | None = None
    """The highest learning rate of the value head, or of the value model, on the optimizer's schedule; null: its lr."""
    callbacks: tuple[str | Extension, ...] = ()
    """module:function each, called after each step with its number and metrics, in every process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_length("max_prompt_length", self.max_prompt_length, least=1)
        for name in ("num_steps", "batch_size", "max_eval_prompts", "responses_per_prompt"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1.")
        require(0 < self.eval_fraction < 1, f"eval_fraction={self.eval_fraction} must lie between 0 and 1.")
        require(self.overlap_scoring >= 0, f"overlap_scoring={self.overlap_scoring} must not be negative; 0 is off.")
        require(0 <= self.kl_coef < math.inf, f"kl_coef={self.kl_coef} must not be negative, and finite.")
        require(self.kl_target is None or self.kl_target > 0, f"kl_target={self.kl_target} must be above 0, or null.")
        require(
            self.kl_target is None or self.kl_coef > 0,
            f"kl_target={self.kl_target} adapts kl_coef by factors, and from 0 it would never move; start above 0.",
        )
        require(
            self.kl_horizon >= self.batch_size,
            f"kl_horizon={self.kl_horizon} must be at least the batch_size={self.batch_size} episodes of a step.",
        )
        rate = self.value_lr
        require(rate is None or 0 < rate < math.inf, f"value_lr={rate} must be above 0, and finite, or null.")
        decay = self.ema_decay
        require(decay is None or 0 < decay < 1, f"ema_decay={decay} must lie between 0 and 1, or be null.")
        group = self.responses_per_prompt
        rest = self.batch_size % group
        require(rest == 0, f"batch_size={self.batch_size} does not divide into responses_per_prompt={group}.")
        advantage = self.advantage
        require(
            isinstance(advantage, Extension) or advantage in ADVANTAGES or ":" in advantage,
            f"advantage={advantage} is neither {', '.join(ADVANTAGES)} nor module:function."
            f"{did_you_mean(str(advantage), ADVANTAGES)}",
        )
        if not self.has_values:
            require(group > 1, f"advantage={self.advantage} needs responses_per_prompt of 2 or more, not {group}.")
            for name, value in (("value_model", self.value_model), ("missing_eos.rule", self.missing_eos.rule)):
                require(
                    value not in ("separate", "bootstrap"),
                    f"{name}={value} needs values, which advantage={self.advantage} has none of.",
                )
        require(
            self.value_head is None or (self.has_values and self.value_model == "shared"),
            f"value_head={self.value_head} starts a shared value function, and with advantage={self.advantage} and "
            f"value_model={self.value_model} there is none; leave it out.",
        )
        for name in ("gamma", "gae_lambda"):
            require(0 <= getattr(self, name) <= 1, f"{name}={getattr(self, name)} must lie in [0, 1].")
        rest = self.batch_size % self.ppo.num_minibatches
        require(
            rest == 0,
            f"batch_size={self.batch_size} does not divide into ppo.num_minibatches={self.ppo.num_minibatches}.",
        )

    @property
    def has_values(self) -> bool:
        """Whether there is a value function: RLOO and GRPO compare responses with each other instead."""
        return self.advantage not in ("rloo", "grpo")


@dataclass(frozen=True)
class ComparisonConfig:
    """How a pipeline gets its comparisons: pairs sampled from the supervised policy and judged by a function."""

    prompts: str | None = None
    """Rows with `prompt`, a text or a conversation."""
    columns: dict[str, str | None] = field(default_factory=dict)
    """Other names for their columns, as in the stages."""
    annotator: str | None = None
    """module:function called as function(prompts, responses, seed=…) -> rows of prompt, chosen, rejected."""
    num_prompts: int = 1000
    """Prompts to sample for; they repeat where there are fewer."""
    responses_per_prompt: int = 2
    """Responses sampled for each (InstructGPT: 4 to 9)."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    """How they are sampled."""

    def __post_init__(self) -> None:
        require(self.num_prompts >= 1, f"comparisons.num_prompts={self.num_prompts} must be at least 1.")
        require(
            self.responses_per_prompt >= 2,
            f"comparisons.responses_per_prompt={self.responses_per_prompt} must be at least 2.",
        )


@dataclass(frozen=True)
class PipelineConfig:
    """The three stages in order. Paths between stages, seed and folders are filled in where they are null."""

    output_dir: str | None = None
    """Holds a run folder a stage; without it a fresh numbered folder under runs/."""
    seed: int = 0
    """The stages' seed."""
    resume: bool = False
    """Go on where an earlier run of this folder ended."""
    sft: SFTConfig = field(default_factory=SFTConfig)
    """Supervised fine-tuning."""
    comparisons: ComparisonConfig = field(default_factory=ComparisonConfig)
    """Comparisons of the supervised policy's samples; unused where reward.data is given."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Reward modelling."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """PPO."""


def _check_length(name: str, length: int | None, *, least: int = 2) -> None:
    require(length is None or length >= least, f"{name}={length} must be at least {least}, or null.")
