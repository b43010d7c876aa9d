"""`ppo_update`: epochs × minibatches × micro-batches over a rollout. The only place where PPO takes a gradient."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ppo_rlhf.core import Evaluation, Experience, ppo_loss, whiten
from ppo_rlhf.core.losses import kl_old_new
from ppo_rlhf.core.masked import SumAcross, identity
from ppo_rlhf.micro_batches import MicroBatch, average_gradients, local_gradients
from ppo_rlhf.settings import PPOSettings

__all__ = ["PPOSettings", "measured_kl", "ppo_update"]

KLDivergence = Callable[[Any, Any], Tensor]
AuxiliaryLosses = Callable[[int], Iterator[Tensor]]


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
    micro_batch: MicroBatch | None = None,
    after_epoch: Callable[[], None] | None = None,
    reference_kl_coef: float = 0.0,
    reference_kl_estimator: Literal["k2", "k3"] = "k2",
    auxiliary_losses: AuxiliaryLosses | None = None,
) -> dict[str, float]:
    """Improves the policy on one rollout: exactly num_epochs × num_minibatches optimizer steps, unless one is skipped
    for a gradient that is not finite, or the target-KL stop ends the update (Schulman et al., 2017, algorithm 1).

    policy(**experience.inputs) -> Evaluation. experience: this process's rows; each process must hold as many.
    generator: shuffles the rows, on the CPU. kl_penalty_coef, kl_divergence: PPO-Penalty's β and exact KL(old‖new).
    micro_batch: the one to keep between updates, which shrinks where memory runs out.
    after_epoch: called after the last step of each epoch, by all processes, to look at the policy.
    reference_kl_coef, reference_kl_estimator: β of the KL to the reference where it is a part of the loss.
    auxiliary_losses: called with the number of each optimizer step, for losses whose gradients join it; each is a sum
    over this process's share divided by the count across processes ÷ processes.

    A minibatch's loss is its sum over micro-batches and processes divided by the decisions in all of them, so how it is
    split changes memory and speed and nothing else. → the statistics of `ppo_loss` averaged over the steps, `grad_norm`
    before clipping, `policy/first_kl` of the first minibatch before any step, 0 where the policy is the one that the
    rollout was evaluated with, and how many steps were taken, skipped and left out.

    Raises ValueError when num_minibatches does not divide the rows.
    """
    size, rest = divmod(len(experience), settings.num_minibatches)
    if rest or not size:
        raise ValueError(
            f"num_minibatches={settings.num_minibatches} does not divide the {len(experience)} rows of a rollout."
        )
    alone = accelerator.distributed_type == DistributedType.NO and accelerator.scaler is None
    mean_across = identity if alone else functools.partial(accelerator.reduce, reduction="mean")
    sum_across = identity if alone else accelerator.reduce
    raw = getattr(optimizer, "optimizer", optimizer)
    fused = alone and raw.defaults.get("fused")
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    micro_batch = micro_batch or MicroBatch(settings.micro_batch_size, accelerator, setting="ppo.micro_batch_size")
    compiled = alone and settings.compile
    gradient_of = _compiled_gradient if compiled else _gradient
    loss_settings = {
        **_loss_settings(settings, kl_penalty_coef, reference_kl_coef, experience.mask.device),
        "kl_divergence": kl_divergence,
        "reference_kl_estimator": reference_kl_estimator,
    }
    history: list[Tensor] = []
    names: list[str] = []
    first_kl = torch.zeros(())
    with _tracing_gradients() if compiled else contextlib.nullcontext():
        for minibatch, count in _minibatches(experience, size, settings, sum_across, mean_across, generator):
            gradient = functools.partial(
                gradient_of, policy, minibatch, loss_settings, count, None if alone else accelerator
            )
            statistics = micro_batch.fitting(gradient, size, undo=raw.zero_grad)
            if auxiliary_losses is not None:
                statistics |= _auxiliary_gradient(policy, auxiliary_losses(len(history)), accelerator)
            average_gradients(parameters, accelerator)
            names = list(statistics)
            means = mean_across(torch.stack(list(statistics.values())))
            if not history:  # nothing has moved yet
                first_kl = means[names.index("policy/approx_kl")]
            # All processes see the reduced value and stop together, or the next all-reduce would wait forever.
            if settings.target_kl is not None and means[names.index("policy/approx_kl")] > 1.5 * settings.target_kl:
                raw.zero_grad()
                break
            if fused:
                grad_norm = _fused_step(raw, parameters, settings.max_grad_norm)
            else:
                grad_norm = _step(optimizer, parameters, settings.max_grad_norm, accelerator)
            raw.zero_grad()
            history.append(torch.cat([means, grad_norm.to(means).reshape(1)]))
            if after_epoch is not None and len(history) % settings.num_minibatches == 0:
                after_epoch()

    averages = _averages(history, [*names, "grad_norm"])
    left_out = settings.num_epochs * settings.num_minibatches - len(history)
    return {**averages, "policy/first_kl": float(first_kl), "stopped_steps": left_out}


def _averages(history: Sequence[Tensor], names: Sequence[str]) -> dict[str, float]:
    """Means of the statistics over the steps whose last one, the gradient's norm, is finite; and how many are and are
    not. NaN where no step was taken.
    """
    steps = torch.stack(list(history)) if history else torch.zeros(0, len(names))
    finite = steps[:, -1].isfinite()
    averages = dict(zip(names, steps[finite].mean(0).tolist(), strict=True))
    return {**averages, "optimizer_steps": int(finite.sum()), "skipped_steps": int((~finite).sum())}


def measured_kl(
    policy: nn.Module,
    experience: Experience,
    settings: PPOSettings,
    *,
    accelerator: Accelerator,
    kl_divergence: KLDivergence | None = None,
    micro_batch: MicroBatch | None = None,
) -> float:
    """d = KL(old‖new) in nats per decision, over the whole rollout and all processes, by one more forward.

    What `adapt_kl_coef_ppo_penalty` compares with its target: exact with `kl_divergence`, else the k3 estimate.
    micro_batch: the one that `ppo_update` keeps.
    """
    mean_across = functools.partial(accelerator.reduce, reduction="mean")
    count = _global_count(experience, mean_across)
    micro_batch = micro_batch or MicroBatch(settings.micro_batch_size, accelerator, setting="ppo.micro_batch_size")

    @torch.no_grad()
    def kl(size: int) -> Tensor:
        total = torch.zeros((), device=experience.mask.device)
        for piece in experience.split(size):
            total += kl_old_new(policy(**piece.inputs), piece, kl_divergence=kl_divergence, count=count)
        return total

    return float(mean_across(micro_batch.fitting(kl, len(experience))))


def _minibatches(
    experience: Experience,
    size: int,
    settings: PPOSettings,
    sum_across: SumAcross,
    mean_across: SumAcross,
    generator: torch.Generator,
) -> Iterator[tuple[Experience, Tensor]]:
    """All epochs' minibatches, each with its count: decisions across processes ÷ processes, since DDP averages."""

    def prepared(minibatch: Experience) -> tuple[Experience, Tensor]:
        if settings.whiten_advantages == "minibatch":
            advantages = whiten(minibatch.advantages, minibatch.mask, sum_across=sum_across)
            minibatch = replace(minibatch, advantages=advantages)
        return minibatch, _global_count(minibatch, mean_across)

    if size == len(experience):  # no order of the rows changes a sum
        yield from itertools.repeat(prepared(experience), settings.num_epochs)
        return
    for _ in range(settings.num_epochs):
        for minibatch in experience.shuffled(size, generator):
            yield prepared(minibatch)


def _loss_settings(
    settings: PPOSettings, kl_penalty_coef: float, reference_kl_coef: float, device: torch.device
) -> dict[str, Any]:
    """The keyword arguments of `ppo_loss` that stay the same in an update."""
    changing: dict[str, Tensor | float | None] = {
        "clip_range": settings.clip_range,
        "kl_penalty_coef": kl_penalty_coef,
        "reference_kl_coef": reference_kl_coef,
    }
    if settings.compile:  # a number that differs from update to update would be compiled in, anew each time
        changing = {name: torch.tensor(x, device=device) if x else x for name, x in changing.items()}
    return {
        **changing,
        "dual_clip": settings.dual_clip,
        "value_clip_range": settings.value_clip_range,
        "value_coef": settings.value_coef,
        "entropy_coef": settings.entropy_coef,
    }


def _gradient(
    policy: nn.Module,
    minibatch: Experience,
    loss_settings: dict[str, Any],
    count: Tensor,
    accelerator: Accelerator | None,
    micro_batch_size: int,
) -> dict[str, Tensor]:
    """Adds this process's gradient of a minibatch to the parameters', by micro-batches; → its summed statistics.

    accelerator: None in a process that works alone, without a loss scaler.
    """
    totals: dict[str, Tensor] = {}
    pieces = list(minibatch.split(micro_batch_size))
    for index, piece in enumerate(pieces):
        last = index == len(pieces) - 1
        statistics: dict[str, Tensor] = {}
        with contextlib.nullcontext() if accelerator is None else local_gradients(policy, accelerator, last=last):
            for evaluation, measured in _evaluations(policy, piece, accelerator):
                loss, found = ppo_loss(evaluation, piece, **loss_settings, count=count)
                loss.backward() if accelerator is None else accelerator.backward(loss)
                statistics |= found if measured is None else {name: found[name] for name in measured}
        totals = _summed(totals, statistics)
    return totals


def _evaluations(
    policy: nn.Module, piece: Experience, accelerator: Accelerator | None
) -> Iterator[tuple[Evaluation, Sequence[str] | None]]:
    """What the policy says of a micro-batch, and the statistics that can be taken from it; None: all.

    Where its decisions and values come from models apart they come in turn, each with the other as it was in the
    rollout, which adds a constant to the loss: the gradient is the same, and memory holds the activations of one model.
    """
    module: Any = policy if accelerator is None else accelerator.unwrap_model(policy)
    if not getattr(module, "evaluates_in_turn", False):
        yield policy(**piece.inputs), None
        return
    decisions = policy(**piece.inputs, only="decisions")
    yield decisions._replace(values=piece.values), None
    values = policy(**piece.inputs, only="values").values
    yield Evaluation(piece.logprobs, decisions.entropy.detach(), values), ["loss/value"]


def _auxiliary_gradient(policy: nn.Module, losses: Iterator[Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """Adds the losses' gradients to the parameters', in this process alone; → their sum."""
    total: Tensor | float = 0.0
    for loss in losses:
        with local_gradients(policy, accelerator, last=True):
            accelerator.backward(loss)
        total = total + loss.detach()
    return {"loss/auxiliary": torch.as_tensor(total)}


def _compiled_gradient(
    policy: nn.Module,
    minibatch: Experience,
    loss_settings: dict[str, Any],
    count: Tensor,
    _: None,
    micro_batch_size: int,
) -> dict[str, Tensor]:
    """The same of a process that works alone, forward and backward pass compiled into one graph."""
    totals: dict[str, Tensor] = {}
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    for piece in minibatch.split(micro_batch_size):
        gradients, statistics = _compiled_loss_gradient()(policy, parameters, piece, loss_settings, count)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        totals = _summed(totals, statistics)
    return totals


def _tracing_gradients() -> contextlib.AbstractContextManager[None]:
    """Lets torch.compile take the backward pass into the same graph as the forward pass."""
    from torch._dynamo import config

    return config.patch(trace_autograd_ops=True)


@functools.cache
def _compiled_loss_gradient() -> Any:
    return torch.compile(_loss_gradient)


def _loss_gradient(
    policy: nn.Module, parameters: list[nn.Parameter], piece: Experience, loss_settings: dict[str, Any], count: Tensor
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    loss, statistics = ppo_loss(policy(**piece.inputs), piece, **loss_settings, count=count)
    return torch.autograd.grad(loss, parameters, allow_unused=True), statistics


def _summed(totals: dict[str, Tensor], statistics: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: totals[name] + value for name, value in statistics.items()} if totals else statistics


def _step(optimizer: Any, parameters: list[nn.Parameter], max_grad_norm: float, accelerator: Accelerator) -> Tensor:
    """One step with the gradient clipped to max_grad_norm, none where it is not finite; → the norm before clipping."""
    grad_norm = _full(accelerator.clip_grad_norm_(parameters, max_grad_norm))
    if accelerator.scaler is not None or torch.isfinite(grad_norm):  # fp16: the scaler itself leaves out a bad step
        optimizer.step()
    return grad_norm.detach()


def _fused_step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], max_grad_norm: float) -> Tensor:
    """The same inside a fused optimizer's own kernel, which scales the gradient and leaves out a bad step itself.

    The gradients are not written once more, and the host waits for no value of a GPU.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    extra: Any = optimizer  # a fused optimizer reads these two, which a loss scaler sets otherwise
    extra.grad_scale = ((grad_norm.float() + 1e-6) / max_grad_norm).clamp(min=1)
    if grad_norm.is_cuda:  # pragma: no cover - needs a GPU
        extra.found_inf = (~grad_norm.isfinite()).float()
        optimizer.step()
        del extra.found_inf
    elif grad_norm.isfinite():
        optimizer.step()
    del extra.grad_scale
    return grad_norm


def _global_count(experience: Experience, mean_across: SumAcross) -> Tensor:
    """Decisions across processes ÷ processes: DDP averages gradients, so this makes their sum right."""
    return mean_across(experience.mask.sum().float())


def _full(grad_norm: Any) -> Tensor:
    """The norm as a plain tensor; a sharded model gives a DTensor."""
    return grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else torch.as_tensor(grad_norm)
