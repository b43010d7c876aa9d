"""The moving average of a policy's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

PLACE = "average/"  # of the weights among a loop's tensors


@torch.no_grad()
def moving_average(tensors: Mapping[str, Tensor], module: nn.Module, decay: float) -> dict[str, Tensor]:
    """w̄ ← decay · w̄ + (1 − decay) · w of each trained weight, by its name; a copy of it where there is no w̄ yet."""
    weights = {PLACE + name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    if not weights.keys() <= tensors.keys():
        return {name: weight.detach().clone() for name, weight in weights.items()}
    return {name: torch.lerp(tensors[name].to(weight), weight, 1 - decay) for name, weight in weights.items()}


def put_average(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives the module its average weights, where there are some, in place; → those it had instead of them."""
    weights = {PLACE + name: weight for name, weight in module.named_parameters() if PLACE + name in tensors}
    last = {name: weight.detach().clone() for name, weight in weights.items()}
    _put(weights, tensors)
    return last


@contextmanager
def averaged(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The module with its average weights for a while; with its own where there are none."""
    last = put_average(module, tensors)
    try:
        yield
    finally:
        put_average(module, last)


@torch.no_grad()
def _put(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        weight.copy_(values[name])
