"""AdamW over a module's parameters, and its learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ppo_rlhf.settings import OptimizerSettings

__all__ = ["OptimizerSettings", "learning_rate", "make_optimizer", "optimizer_bytes", "set_learning_rate"]


SMALLEST_IN_8_BITS = 4096  # elements of a parameter; bitsandbytes keeps the moments of smaller ones in float32
LR_SCALE = "lr_scale"  # of a parameter group: its learning rate in units of the others'
BLOCK = 256  # 8-bit moments that share a scale


def make_optimizer(
    module: nn.Module, settings: OptimizerSettings, *, apart: Iterable[nn.Parameter] = (), lr_apart: float | None = None
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; weight decay on matrices and embeddings, not on norms and biases.

    Norms and biases are told by their shape, one dimension, not by their names, which differ between architectures.
    apart: parameters with another highest learning rate, lr_apart; the schedule is one for all.
    """
    others = set() if lr_apart is None else set(apart)
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = _groups([p for p in trainable if p not in others], settings)
    if lr_apart is not None:
        scaled = _groups([p for p in trainable if p in others], settings)
        groups += [{**group, LR_SCALE: lr_apart / settings.lr} for group in scaled]
    rates: dict[str, Any] = {
        "lr": settings.lr,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
    }
    if settings.moments == "float32":
        return torch.optim.AdamW(groups, **rates, fused=True)
    from bitsandbytes import optim

    return (optim.AdamW8bit if settings.moments == "8bit" else optim.PagedAdamW32bit)(groups, **rates)


def _groups(parameters: list[nn.Parameter], settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Those with weight decay and those without, where there are some."""
    decayed = [p for p in parameters if p.ndim >= 2 and settings.weight_decay]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2 or not settings.weight_decay], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def optimizer_bytes(module: nn.Module, settings: OptimizerSettings) -> int:
    """What the optimizer of a module will hold after its first step: two moments, and scales or counts of steps."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if settings.moments == "8bit":
        sizes = [parameter.numel() for parameter in trained]
        return sum(2 * (n + 4 * -(-n // BLOCK)) if n >= SMALLEST_IN_8_BITS else 8 * n for n in sizes)
    step = 4 if settings.moments == "float32" else 0
    return sum(2 * parameter.numel() * parameter.element_size() + step for parameter in trained)


def learning_rate(settings: OptimizerSettings, step: int, num_steps: int) -> float:
    """The learning rate of step 0, 1, …, num_steps − 1: a linear warm-up, then constant, linear or half a cosine to 0.

    A function of the step alone, so that a resumed run needs no scheduler state.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / (settings.warmup_steps + 1)
    progress = (step - settings.warmup_steps) / max(1, num_steps - settings.warmup_steps)
    if settings.schedule == "linear":
        return settings.lr * (1 - progress)
    if settings.schedule == "cosine":
        return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return settings.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every parameter group the learning rate, those apart their multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(LR_SCALE, 1.0)
