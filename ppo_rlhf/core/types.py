"""What flows through PPO: the policy's `Evaluation` of decisions, and the `Experience` an update learns from.

Everything is B rows × T decisions. A row is an environment's stream of steps or one response of a language model; a
decision is an action or a token. The index convention, stated once:

    mask[b, t]      True where the policy really decided: not padding, not an environment's reset step
    logprobs[b, t]  log-probability of decision t, from the position that predicts it
    values[b, t]    value of the state in which decision t was taken; a rollout appends one column, V of the state after
    rewards[b, t]   paid for decision t

Masked slots may hold anything, NaN too: every function of the core selects with `torch.where` and never multiplies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Evaluation(NamedTuple):
    """What a policy says of given decisions: `policy(**experience.inputs) -> Evaluation`."""

    logprobs: Tensor  # (B, T) of the decisions taken
    entropy: Tensor  # (B, T) of the distributions they were drawn from, nats
    values: Tensor  # (B, T) of the states they were taken in
    distribution: Any = None  # parameters of the distributions, each (B, T, …), where a policy offers them for exact KL


@dataclass(frozen=True)
class Experience:
    """A rollout with its advantages: all that `ppo_update` needs. Shapes are checked here, once.

    Raises ValueError for shapes that do not fit together.
    """

    inputs: Mapping[str, Tensor]  # name → (B, …): the keyword arguments of the policy
    logprobs: Tensor  # (B, T) under the policy that decided
    values: Tensor  # (B, T) predicted by the value function at that time
    advantages: Tensor  # (B, T)
    returns: Tensor  # (B, T) regression target of the value function
    mask: Tensor  # (B, T) bool
    distribution: Any = None  # the old distribution's parameters: a tensor or a tuple of tensors, each (B, T, …)
    ref_logprobs: Tensor | None = None  # (B, T) under the reference, for a KL penalty in the loss

    def __post_init__(self) -> None:
        shape = self.mask.shape
        if self.mask.ndim != 2 or self.mask.dtype != torch.bool:
            raise ValueError(f"mask must be a boolean tensor (B, T), not {self.mask.dtype} {tuple(shape)}.")
        for name in ("logprobs", "values", "advantages", "returns"):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {tuple(getattr(self, name).shape)}, the mask {tuple(shape)}.")
        if self.ref_logprobs is not None and self.ref_logprobs.shape != shape:
            raise ValueError(f"ref_logprobs has shape {tuple(self.ref_logprobs.shape)}, the mask {tuple(shape)}.")
        for name, tensor in self.inputs.items():
            if len(tensor) != shape[0]:
                raise ValueError(f"inputs[{name!r}] has {len(tensor)} rows, the mask {shape[0]}.")

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, rows: Tensor | slice) -> Experience:
        """The experience of some rows."""
        return self._map(lambda tensor: tensor[rows])

    def split(self, size: int) -> Iterator[Experience]:
        """Consecutive pieces of at most `size` rows."""
        if size >= len(self):
            yield self
            return
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def shuffled(self, size: int, generator: torch.Generator) -> Iterator[Experience]:
        """Minibatches of `size` rows in a fresh random order; the generator lives on the CPU."""
        order = torch.randperm(len(self), generator=generator).to(self.mask.device)
        for rows in order.split(size):
            yield self[rows]

    def by_step(self) -> Experience:
        """One row a decision, (B·T, 1): the view in which single steps are shuffled instead of whole streams.

        Every input must be (B, T, …). Masked decisions stay, at weight zero, so that all processes count the same rows.
        """
        batch, steps = self.mask.shape
        for name, tensor in self.inputs.items():
            if tensor.shape[:2] != (batch, steps):
                raise ValueError(f"inputs[{name!r}]: {tuple(tensor.shape)}; by_step() needs ({batch}, {steps}, …).")
        return self._map(lambda tensor: tensor.reshape(batch * steps, 1, *tensor.shape[2:]))

    def _map(self, function: Any) -> Experience:
        distribution = self.distribution
        if isinstance(distribution, tuple):
            distribution = tuple(function(tensor) for tensor in distribution)
        elif distribution is not None:
            distribution = function(distribution)
        return Experience(
            inputs={name: function(tensor) for name, tensor in self.inputs.items()},
            logprobs=function(self.logprobs),
            values=function(self.values),
            advantages=function(self.advantages),
            returns=function(self.returns),
            mask=function(self.mask),
            distribution=distribution,
            ref_logprobs=None if self.ref_logprobs is None else function(self.ref_logprobs),
        )
