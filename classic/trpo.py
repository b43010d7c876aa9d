"""Trust region policy optimisation (Schulman et al., 2015) on the rollouts that PPO learns from, to compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm, parameters_to_vector

from classic.config import TrustRegionSettings
from classic.policy import Policy
from ppo_rlhf.core import Experience, clipped_policy_loss, masked_mean, value_loss
from ppo_rlhf.seeding import keyed_generator


def trust_region_update(
    policy: Policy,
    optimizer: Any,
    experience: Experience,
    settings: TrustRegionSettings,
    *,
    seed: tuple[int, int],
) -> dict[str, float]:
    """One natural gradient step of the policy within a mean KL(old‖new) of δ, then the value function's regression.

        maximise E[A·π/π_old]  subject to  E[KL(π_old‖π)] ≤ δ          step = √(2δ / xᵀFx) · x,  F x = g

    F x by the conjugate gradient method on Hessian-vector products of the exact KL; the step is shortened until the
    surrogate improves and the constraint holds, and not taken where no length does (appendix C). Policy and value
    function share no parameters but in an encoder or recurrent core, which then follow the policy alone.

    → statistics, and how many steps of the regression were taken, and skipped for a gradient that is not finite; all of
    them where the surrogate's gradient is not.
    """
    parameters = [p for p in policy.parameters() if p.requires_grad]

    def surrogate_and_kl() -> tuple[Tensor, Tensor, Tensor]:
        evaluation = policy(**experience.inputs)
        loss = clipped_policy_loss(
            evaluation.logprobs, experience.logprobs, experience.advantages, experience.mask, clip_range=None
        )
        kl = masked_mean(policy.distribution.kl(experience.distribution, evaluation.distribution), experience.mask)
        return loss, kl, masked_mean(evaluation.entropy, experience.mask)

    loss, kl, entropy = surrogate_and_kl()
    gradient = _flat(loss, parameters, retain_graph=True)
    told = {"objective/entropy": entropy.item(), "grad_norm": gradient.norm().item()}
    if not math.isfinite(told["grad_norm"]):
        steps = settings.value_epochs * settings.value_minibatches
        still = {"policy/kl": 0.0, "line_search/step": 0.0, "optimizer_steps": 0, "skipped_steps": steps}
        return {"loss/policy": math.nan, "loss/value": math.nan, **told, **still}
    kl_gradient = _flat(kl, parameters, create_graph=True)

    def fisher(vector: Tensor) -> Tensor:
        return _flat(kl_gradient @ vector, parameters, retain_graph=True) + settings.damping * vector

    direction = conjugate_gradient(fisher, -gradient, settings.conjugate_gradient_steps)
    length = (2 * settings.max_kl / (direction @ fisher(direction)).clamp(min=1e-12)).sqrt()
    taken, after, kl_after = _line_search(parameters, length * direction, surrogate_and_kl, loss.detach(), settings)
    fitted = _fit_values(policy, optimizer, experience, settings, seed)
    return {"loss/policy": after, **told, "policy/kl": kl_after, "line_search/step": taken, **fitted}


def conjugate_gradient(product: Callable[[Tensor], Tensor], target: Tensor, steps: int) -> Tensor:
    """x with product(x) = target for a symmetric positive definite product (Hestenes and Stiefel, 1952)."""
    x = torch.zeros_like(target)
    residual, direction = target.clone(), target.clone()
    norm = residual @ residual
    for _ in range(steps):
        if norm < 1e-10:
            break
        image = product(direction)
        step = norm / (direction @ image)
        x = x + step * direction
        residual = residual - step * image
        following = residual @ residual
        direction = residual + following / norm * direction
        norm = following
    return x


@torch.no_grad()
def _line_search(
    parameters: Sequence[Tensor],
    step: Tensor,
    evaluate: Callable[[], tuple[Tensor, Tensor, Tensor]],
    before: Tensor,
    settings: TrustRegionSettings,
) -> tuple[float, float, float]:
    """Takes the longest of the shrunken steps that helps and stays within the region; → its share, loss and KL."""
    start = parameters_to_vector(parameters)
    share = 1.0
    for _ in range(settings.line_search_steps):
        _move_to(start + share * step, parameters)
        loss, kl, _ = evaluate()
        if loss < before and kl <= settings.max_kl:
            return share, loss.item(), kl.item()
        share *= settings.line_search_shrink
    _move_to(start, parameters)
    return 0.0, before.item(), 0.0


def _move_to(vector: Tensor, parameters: Sequence[Tensor]) -> None:
    """Writes the vector into the parameters' own memory: as views of one vector a checkpoint would keep only one."""
    for parameter, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
        parameter.copy_(part.view_as(parameter))


def _fit_values(
    policy: Policy, optimizer: Any, experience: Experience, settings: TrustRegionSettings, seed: tuple[int, int]
) -> dict[str, float]:
    """Regresses the value head's own parameters onto the returns; → the last pass's mean loss, NaN where it took no
    step, and how many steps of all passes were taken and skipped.
    """
    rows = experience if policy.core is not None else experience.by_step()
    still = [part.detach().clone() for part in policy.networks.policy_layers()]
    size = max(1, len(rows) // settings.value_minibatches)
    generator = keyed_generator(*seed, "value")
    losses: list[Tensor] = []
    optimizer_steps = skipped_steps = 0
    for _ in range(settings.value_epochs):
        losses = []
        for minibatch in rows.shuffled(size, generator):
            values = policy(**minibatch.inputs).values
            loss = value_loss(values, minibatch.values, minibatch.returns, minibatch.mask)
            optimizer.zero_grad()
            loss.backward()
            policy.keep_policy_still()
            if not get_total_norm([p.grad for p in policy.parameters() if p.grad is not None]).isfinite():
                skipped_steps += 1
                continue
            optimizer.step()
            optimizer_steps += 1
            losses.append(loss.detach())
    optimizer.zero_grad()
    with torch.no_grad():  # no gradient moves the policy, but weight decay does
        for part, before in zip(policy.networks.policy_layers(), still, strict=True):
            part.copy_(before)
    mean = torch.stack(losses).mean().item() if losses else math.nan
    return {"loss/value": mean, "optimizer_steps": optimizer_steps, "skipped_steps": skipped_steps}


def _flat(
    scalar: Tensor, parameters: Sequence[Tensor], *, create_graph: bool = False, retain_graph: bool | None = None
) -> Tensor:
    """The gradient as one vector, 0 where the scalar does not depend on a parameter."""
    found = torch.autograd.grad(
        scalar, parameters, create_graph=create_graph, retain_graph=retain_graph, allow_unused=True
    )
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(parameters, found, strict=True)]
    )
