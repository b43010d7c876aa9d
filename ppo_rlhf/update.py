"""`ppo_update`: epochs × minibatches × micro-batches over a rollout. The only place where PPO takes a gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ppo_rlhf.core import Experience, ppo_loss, whiten
from ppo_rlhf.core.losses import kl_old_new
from ppo_rlhf.settings import PPOSettings

__all__ = ["PPOSettings", "measured_kl", "ppo_update"]

KLDivergence = Callable[[Any, Any], Tensor]


def ppo_update(
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    settings: PPOSettings,
    *,
    accelerator: Accelerator,
    generator: torch.Generator,
    kl_penalty_coef: float = 0.0,
    kl_divergence: KLDivergence | None = None,
) -> dict[str, float]:
    """Improves the policy on one rollout: exactly num_epochs × num_minibatches optimizer steps, unless one is skipped
    for a gradient that is not finite, or the target-KL stop ends the update (Schulman et al., 2017, algorithm 1).

    policy(**experience.inputs) -> Evaluation. experience: this process's rows; each process must hold as many.
    generator: shuffles the rows, on the CPU. kl_penalty_coef, kl_divergence: PPO-Penalty's β and exact KL(old‖new).

    A minibatch's loss is its sum over micro-batches and processes divided by the decisions in all of them, so how it is
    split changes memory and speed and nothing else. → the statistics of `ppo_loss` averaged over the steps, `grad_norm`
    before clipping, and how many steps were taken, skipped and left out.

    Raises ValueError when num_minibatches does not divide the rows.
    """
    size, rest = divmod(len(experience), settings.num_minibatches)
    if rest or not size:
        raise ValueError(
            f"num_minibatches={settings.num_minibatches} does not divide the {len(experience)} rows of a rollout."
        )
    history: list[Tensor] = []
    names: list[str] = []
    taken = skipped = 0
    for minibatch in _minibatches(experience, size, settings, accelerator, generator):
        statistics = _accumulate_gradient(policy, minibatch, settings, accelerator, kl_penalty_coef, kl_divergence)
        names = list(statistics)
        means = accelerator.reduce(torch.stack(list(statistics.values())), "mean")
        # All processes see the reduced value and stop together, or the next all-reduce would wait forever.
        if settings.target_kl is not None and means[names.index("policy/approx_kl")] > 1.5 * settings.target_kl:
            optimizer.zero_grad()
            break
        grad_norm = _full(accelerator.clip_grad_norm_(policy.parameters(), settings.max_grad_norm))
        finite = bool(torch.isfinite(grad_norm))
        if finite or accelerator.scaler is not None:  # fp16: the scaler itself leaves out a bad step
            optimizer.step()
        if finite:
            taken += 1
            history.append(torch.cat([means, grad_norm.detach().to(means).reshape(1)]))
        else:
            skipped += 1
        optimizer.zero_grad()

    planned = settings.num_epochs * settings.num_minibatches
    averages = torch.stack(history).mean(0).tolist() if history else [float("nan")] * (len(names) + 1)
    return {
        **dict(zip([*names, "grad_norm"], averages, strict=True)),
        "optimizer_steps": taken,
        "skipped_steps": skipped,
        "stopped_steps": planned - taken - skipped,
    }


def measured_kl(
    policy: nn.Module,
    experience: Experience,
    settings: PPOSettings,
    *,
    accelerator: Accelerator,
    kl_divergence: KLDivergence | None = None,
) -> float:
    """d = KL(old‖new) in nats per decision, over the whole rollout and all processes, by one more forward.

    What `adapt_kl_coef_ppo_penalty` compares with its target: exact with `kl_divergence`, else the k3 estimate.
    """
    count = _global_count(experience, accelerator)
    total = torch.zeros((), device=experience.mask.device)
    with torch.no_grad():
        for piece in experience.split(settings.micro_batch_size or len(experience)):
            total += kl_old_new(policy(**piece.inputs), piece, kl_divergence=kl_divergence, count=count)
    return float(accelerator.reduce(total, "mean"))


def _minibatches(
    experience: Experience, size: int, settings: PPOSettings, accelerator: Accelerator, generator: torch.Generator
) -> Iterator[Experience]:
    for _ in range(settings.num_epochs):
        for minibatch in experience.shuffled(size, generator):
            if settings.normalize_minibatches:
                advantages = whiten(minibatch.advantages, minibatch.mask, sum_across=accelerator.reduce)
                minibatch = replace(minibatch, advantages=advantages)
            yield minibatch


def _accumulate_gradient(
    policy: nn.Module,
    minibatch: Experience,
    settings: PPOSettings,
    accelerator: Accelerator,
    kl_penalty_coef: float,
    kl_divergence: KLDivergence | None,
) -> dict[str, Tensor]:
    """Adds the minibatch's gradient to the parameters', micro-batch by micro-batch; → its summed statistics."""
    count = _global_count(minibatch, accelerator)
    pieces = list(minibatch.split(settings.micro_batch_size or len(minibatch)))
    totals: dict[str, Tensor] = {}
    for index, piece in enumerate(pieces):
        last = index == len(pieces) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(policy):
            loss, statistics = ppo_loss(
                policy(**piece.inputs),
                piece,
                clip_range=settings.clip_range,
                dual_clip=settings.dual_clip,
                value_clip_range=settings.value_clip_range,
                value_coef=settings.value_coef,
                entropy_coef=settings.entropy_coef,
                kl_penalty_coef=kl_penalty_coef,
                kl_divergence=kl_divergence,
                count=count,
            )
            accelerator.backward(loss)
        totals = {name: totals.get(name, 0) + value for name, value in statistics.items()}
    return totals


def _global_count(experience: Experience, accelerator: Accelerator) -> Tensor:
    """Decisions across processes ÷ processes: DDP averages gradients, so this makes their sum right."""
    return accelerator.reduce(experience.mask.sum().float(), "mean")


def _full(grad_norm: Any) -> Tensor:
    """The norm as a plain tensor; a sharded model gives a DTensor."""
    return grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else torch.as_tensor(grad_norm)
