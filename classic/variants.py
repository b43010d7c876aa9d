"""What `table1` and `ablations` compare: settings that are changed, all else being equal; free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Variant:
    """A configuration that differs from the others in `changes` alone."""

    text: str  # by which tables call it
    changes: Mapping[str, Any] = field(default_factory=dict)  # settings by their dotted names
    paper: float | None = None  # its score in table 1 of Schulman et al. (2017)


def changed(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """The settings with those that are named, such as `ppo.clip_range`, at other values."""
    for name, value in changes.items():
        group, _, inner = name.partition(".")
        if inner:
            value = changed(getattr(settings, group), {inner: value})
        settings = replace(settings, **{group: value})  # type: ignore[type-var]
    return settings


def _clip(clip_range: float, paper: float) -> Variant:
    return Variant(f"clipping, ε = {clip_range}", {"algorithm": "clip", "ppo.clip_range": clip_range}, paper)


def _adaptive(kl_target: float, paper: float) -> Variant:
    changes = {"algorithm": "penalty", "penalty.kl_target": kl_target}
    return Variant(f"adaptive KL, d_targ = {kl_target}", changes, paper)


def _fixed(kl_coef: float, paper: float) -> Variant:
    return Variant(f"fixed KL, β = {kl_coef:g}", {"algorithm": "fixed", "penalty.kl_coef": kl_coef}, paper)


SURROGATES: dict[str, Variant] = {
    "none": Variant("no clipping or penalty", {"algorithm": "none"}, -0.39),
    "clip-0.1": _clip(0.1, 0.76),
    "clip-0.2": _clip(0.2, 0.82),
    "clip-0.3": _clip(0.3, 0.70),
    "adaptive-0.003": _adaptive(0.003, 0.68),
    "adaptive-0.01": _adaptive(0.01, 0.74),
    "adaptive-0.03": _adaptive(0.03, 0.71),
    "fixed-0.3": _fixed(0.3, 0.62),
    "fixed-1": _fixed(1.0, 0.71),
    "fixed-3": _fixed(3.0, 0.72),
    "fixed-10": _fixed(10.0, 0.69),
    "trpo": Variant("TRPO, δ = 0.01", {"algorithm": "trpo"}),
}

PRESET = "preset"  # the detail that is none
DETAILS: dict[str, Variant] = {
    PRESET: Variant("the preset"),
    "no-whitening": Variant("advantages not whitened", {"ppo.whiten_advantages": "none"}),
    "minibatch-whitening": Variant("advantages whitened in each minibatch", {"ppo.whiten_advantages": "minibatch"}),
    "no-bootstrap": Variant("a time limit taken for an end", {"bootstrap_truncations": False}),
    "unclipped-gradient": Variant("gradient not clipped", {"ppo.max_grad_norm": float("inf")}),
    "value-clipping": Variant("values clipped, ε = 0.2", {"ppo.value_clip_range": 0.2}),
    "raw-rewards": Variant("rewards not scaled", {"reward_scale": 1.0}),
    "normalized-rewards": Variant(
        "rewards by the deviation of their return", {"reward_scale": 1.0, "normalize_rewards": True}
    ),
    "normalized-observations": Variant("observations normalised", {"normalize_observations": True}),
    "large-policy-head": Variant("gain 1 of the policy's head", {"network.policy_head_gain": 1.0}),
    "default-initialization": Variant("torch's initialisation, not orthogonal", {"network.orthogonal": False}),
    "constant-lr": Variant("learning rate not annealed", {"optimizer.schedule": "constant"}),
    "adam-epsilon": Variant("Adam's ε 1e-8", {"optimizer.epsilon": 1e-8}),
    "one-epoch": Variant("1 epoch", {"ppo.num_epochs": 1}),
    "twenty-epochs": Variant("20 epochs", {"ppo.num_epochs": 20}),
    "one-minibatch": Variant("1 minibatch", {"ppo.num_minibatches": 1}),
    "sixteen-minibatches": Variant("16 minibatches", {"ppo.num_minibatches": 16}),
    "lambda-0": Variant("λ = 0", {"gae_lambda": 0.0}),
    "lambda-1": Variant("λ = 1", {"gae_lambda": 1.0}),
}
