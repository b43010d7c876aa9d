"""Settings that several readers share, as frozen dataclasses; free of torch, so that `--help` starts at once.

Each field's default names its source. `ppo_rlhf.update`, `ppo_rlhf.sampling` and `ppo_rlhf.optimizer` read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import inf, isfinite
from typing import Any, Literal

from ppo_rlhf.errors import UserError

Argument = str | bool | int | float | list | dict | None  # text first: a pattern such as "[a-z]" is no list
ARGUMENTS = {"arguments", "env_kwargs"}  # settings whose own names are those of a function's arguments
Ties = Literal["drop", "both", "half"]  # what two responses of equal rank teach: nothing, both orders, each by half
TooLong = Literal["refuse", "drop", "left", "right"]  # what becomes of a text of too many tokens; a side is cut off


def require(condition: bool, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names. A group's are inside it; the arguments of a function are one setting."""
    named: dict[str, Any] = {}
    for name, value in settings.items():
        inside = isinstance(value, Mapping) and name not in ARGUMENTS
        named |= flat(value, f"{prefix}{name}.") if inside else {f"{prefix}{name}": value}
    return named


@dataclass(frozen=True)
class Extension:
    """A function of one's own in place of a run's (read by `ppo_rlhf.train.extensions`)."""

    name: str
    """module:function or file.py:function; a class is made first, and called then."""
    arguments: dict[str, Argument] = field(default_factory=dict)
    """Its keyword arguments; a class gets them when it is made."""


@dataclass(frozen=True)
class PPOSettings:
    """One PPO update: epochs × minibatches × micro-batches over a rollout (read by `ppo_rlhf.update`)."""

    num_epochs: int = 4
    """Passes over each rollout (Ziegler et al., 2019: 4; InstructGPT: 1)."""
    num_minibatches: int = 1
    """Optimizer steps an epoch; must divide the rows of a rollout (Ziegler et al., 2019: 1 for styles)."""
    micro_batch_size: int | None = None
    """Rows in one forward and backward, for memory alone: results do not depend on it. None: a whole minibatch."""
    clip_range: float | None = 0.2
    """ε of the clipped objective (Schulman et al., 2017); null for no clipping."""
    dual_clip: float | None = None
    """c > 1 bounds the loss of decisions with a negative advantage (Ye et al., 2020: 3); null for none."""
    value_clip_range: float | None = 0.2
    """Clip of the value's change (lm-human-preferences: 0.2); null for none."""
    value_coef: float = 0.1
    """Weight of the value loss (lm-human-preferences: 0.1; control: 0.5)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    target_kl: float | None = None
    """An update stops early, all processes together, when approx_kl exceeds 1.5 × this (Spinning Up); null: never."""
    max_grad_norm: float = 1.0
    """The gradient's norm over all parameters is clipped to this, once a step."""
    whiten_advantages: Literal["rollout", "minibatch", "none"] = "rollout"
    """Over what advantages get mean 0 and variance 1. rollout: those of GAE alone; minibatch: any, Stable-Baselines3's
    way; none: not at all."""
    compile: bool = False
    """torch.compile the forward pass and the loss: quicker once warm, after up to a minute's compiling. Acts in one
    process without a loss scaler, so not in fp16. Of a control run its own `compile` takes the place of this."""

    def __post_init__(self) -> None:
        for name in ("num_epochs", "num_minibatches"):
            require(getattr(self, name) >= 1, f"ppo.{name}={getattr(self, name)} must be at least 1.")
        micro = self.micro_batch_size
        require(micro is None or micro >= 1, f"ppo.micro_batch_size={micro} must be at least 1, or null.")
        for name in ("clip_range", "value_clip_range", "target_kl"):
            value = getattr(self, name)
            require(value is None or value > 0, f"ppo.{name}={value} must be above 0, or null.")
        dual_clip = self.dual_clip
        require(dual_clip is None or dual_clip > 1, f"ppo.dual_clip={dual_clip} must be above 1, or null.")
        require(self.max_grad_norm > 0, f"ppo.max_grad_norm={self.max_grad_norm} must be above 0.")
        require(0 <= self.value_coef < inf, f"ppo.value_coef={self.value_coef} must not be negative, and finite.")
        require(isfinite(self.entropy_coef), f"ppo.entropy_coef={self.entropy_coef} must be finite.")


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its learning rate over the steps of a run (read by `ppo_rlhf.optimizer`)."""

    lr: float = 1e-5
    """The highest learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """After the warm-up: constant, or down to 0 along a line or half a cosine."""
    warmup_steps: int = 0
    """The learning rate climbs linearly over so many first steps."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices alone: never on norms and biases."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.999
    """Decay of the squared gradient's running mean."""
    epsilon: float = 1e-5
    """Adam's ε (lm-human-preferences, baselines: 1e-5)."""
    moments: Literal["float32", "8bit", "paged"] = "float32"
    """Adam's two running means. 8bit: in a quarter of the memory (Dettmers et al., 2022); paged: in float32, moved to
    the main memory when a GPU's is full. Both by bitsandbytes, and not for sharded models."""

    def __post_init__(self) -> None:
        require(0 < self.lr < inf, f"optimizer.lr={self.lr} must be above 0, and finite.")
        require(self.warmup_steps >= 0, f"optimizer.warmup_steps={self.warmup_steps} must not be negative.")
        decay = self.weight_decay
        require(0 <= decay < inf, f"optimizer.weight_decay={decay} must not be negative, and finite.")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}={getattr(self, name)} must lie in [0, 1).")
        require(self.epsilon > 0, f"optimizer.epsilon={self.epsilon} must be above 0.")
        require(
            self.moments == "float32" or find_spec("bitsandbytes") is not None,
            f"optimizer.moments={self.moments} needs the package bitsandbytes: pip install 'ppo-rlhf[bitsandbytes]'.",
        )


@dataclass(frozen=True)
class LoRASettings:
    """Low-rank adapters in place of full fine-tuning (Hu et al., 2021; read by `ppo_rlhf.adapters`). Extra: `lora`."""

    rank: int = 0
    """r of the trained B·A, W + α/r · B·A (peft: 8); 0: all weights are trained, or the adapter that the model has."""
    alpha: float = 16.0
    """α (Hu et al., 2021, GPT-2: 32 at rank 4; QLoRA: 16)."""
    dropout: float = 0.0
    """Of what enters A, in sft and reward alone: in PPO no dropout acts."""
    target_modules: tuple[str, ...] = ()
    """Names of the matrices to adapt, such as c_attn; empty: all but embeddings and head (Dettmers et al., 2023)."""
    merge: bool = True
    """Save plain weights, the adapter merged in. false: the adapter alone, which transformers loads with its base."""
    base_bits: Literal[32, 8, 4] = 32
    """Of a frozen weight of the model that is loaded; 8 and 4 (NF4) need bitsandbytes, and merge=false."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, f"lora.rank={self.rank} must not be negative; 0 trains all weights.")
        require(self.alpha > 0, f"lora.alpha={self.alpha} must be above 0.")
        require(0 <= self.dropout < 1, f"lora.dropout={self.dropout} must lie in [0, 1).")
        if self.base_bits != 32:
            require(self.rank > 0, f"lora.base_bits={self.base_bits}: such weights cannot be trained; set lora.rank.")
            require(
                not self.merge,
                f"lora.base_bits={self.base_bits}: an adapter cannot be merged into rounded weights; set lora.merge to "
                "false, and merge it into the whole ones by ppo-rlhf export.",
            )


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are sampled (read by `ppo_rlhf.sampling`)."""

    max_new_tokens: int = 48
    """A response that has not stopped by then is cut off."""
    temperature: float = 1.0
    """Logits are divided by it, here and wherever log-probabilities are computed (InstructGPT: 1.0)."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all. Truncation makes KL and the first ratio wrong: a warning says so."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this probability; 1 keeps all. The same warning."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end a response; empty: the tokenizer's eos token."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a response: it stops at the token that completes one of them, besides the stop ids."""
    batch_size: int = 256
    """Rows decoded together, for memory alone: samples do not depend on it. As some end, waiting prompts enter."""
    cached_tokens: int | None = None
    """Tokens that the key-value cache has room for, all rows together: fewer rows where need be. null: no limit."""

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, f"sampling.max_new_tokens={self.max_new_tokens} must be at least 1.")
        temperature = self.temperature
        require(0 < temperature < inf, f"sampling.temperature={temperature} must be above 0, and finite.")
        require(self.top_k >= 0, f"sampling.top_k={self.top_k} must not be negative; 0 keeps all tokens.")
        require(0 < self.top_p <= 1, f"sampling.top_p={self.top_p} must lie in (0, 1]; 1 keeps all tokens.")
        require("" not in self.stop_strings, 'sampling.stop_strings: "" would end every response at once.')
        require(self.batch_size >= 1, f"sampling.batch_size={self.batch_size} must be at least 1.")
        cached = self.cached_tokens
        require(cached is None or cached >= 1, f"sampling.cached_tokens={cached} must be at least 1, or null.")
