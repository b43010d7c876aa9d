"""What k1, k2 and k3 estimate, as a value, as a loss and as a reward, on a vocabulary small enough to be summed over.

One token is drawn from a policy p = softmax(z) and compared with a reference q. Every expectation is a sum over the
vocabulary, in float64: there is no sampling noise in any number here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from ppo_rlhf.core import approx_kl, exact_kl
from ppo_rlhf.document import Chart, Document, Section, Series, Table
from ppo_rlhf.study.claims import Claim, table_of

Estimator = Literal["k1", "k2", "k3"]
ESTIMATORS: tuple[Estimator, ...] = ("k1", "k2", "k3")
VOCABULARY = 16
DISTANCES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # nats a token: an update's to a run's
KL_COEF = 0.5  # β of the optimum that is looked for
ASCENT_STEPS, ASCENT_RATE = 10_000, 0.1
DRIVEN_OUT = 1e-100  # p/q at which a token is gone, and the ascent over: k3 of it would overflow soon
EXACT = 1e-9  # relative error of a sum of VOCABULARY float64 terms, with room


@dataclass(frozen=True)
class Plan:
    """What is drawn."""

    seed: int = 0


@dataclass(frozen=True)
class Accuracy:
    """An estimator at one distance between policy and reference."""

    estimator: str
    kl: float  # KL(p‖q), nats
    bias: float  # E_p[k] − KL
    std: float  # of one token's estimate
    lowest: float  # over the vocabulary
    loss_gradient_error: float  # ‖E_p[∇k] − ∇KL‖ ÷ ‖∇KL‖, k differentiated: what a loss term follows
    reverse_gradient_error: float  # ‖E_p[∇k] − ∇KL(q‖p)‖ ÷ ‖∇KL(q‖p)‖, which is p − q of a softmax's logits
    loss_gradient_norm: float  # ‖E_p[∇k]‖
    reward_gradient_error: float  # ‖E_p[k·∇log p] − ∇KL‖ ÷ ‖∇KL‖, k a number: what a reward follows


@dataclass(frozen=True)
class Optimum:
    """Where ascent on the reward r − β·k ends, seen by the true objective J(p) = E_p[r] − β·KL(p‖q)."""

    estimator: str
    regret: float  # max J − J(p): what is lost
    kl: float  # KL(p‖q), nats; the best policy's is in `best_kl`
    best_kl: float
    gradient_at_best: float  # norm of the expected gradient at the best policy: 0 where that is the optimum
    lowest_ratio: float  # p/q of the token that was driven down most


@dataclass(frozen=True)
class Results:
    """The whole study."""

    accuracies: list[Accuracy]
    optima: list[Optimum]
    claims: list[Claim]


def run(seed: int = 0) -> Results:
    """The study on one random reference, direction and reward. Where the direction ends before the farthest distance,
    the opposite one is taken.
    """
    generator = torch.Generator().manual_seed(seed)
    reference, direction, rewards = torch.randn(3, VOCABULARY, generator=generator, dtype=torch.float64)
    if reach(reference, direction) <= max(DISTANCES):
        direction = -direction
    accuracies = [
        accuracy(estimator, policy_at(kl, reference, direction), reference)
        for kl in DISTANCES
        for estimator in ESTIMATORS
    ]
    optima = [optimum(estimator, rewards, reference, kl_coef=KL_COEF) for estimator in ESTIMATORS]
    return Results(accuracies, optima, claims_of(accuracies, optima))


def reach(reference: Tensor, direction: Tensor) -> float:
    """What KL(p‖q) stays below for logits reference + s·direction, s > 0. (V,), (V,).

    It is −log q of the direction's largest token, since p becomes that token alone.
    """
    return -float(reference.log_softmax(-1)[direction.argmax()])


def policy_at(kl: float, reference: Tensor, direction: Tensor) -> Tensor:
    """Logits z = reference + s·direction with KL(p‖q) = kl nats, s > 0 by bisection: KL grows with s, since
    d KL/ds = s·Var_p(direction). reference, direction (V,) → (V,).

    Raises ValueError beyond the direction's reach.
    """
    most = reach(reference, direction)
    if kl >= most:
        raise ValueError(f"in this direction KL(p‖q) stays below {most:.3f} nats; {kl} was asked for.")
    low, high = 0.0, 1.0
    while exact_kl(reference + high * direction, reference) < kl:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if exact_kl(reference + middle * direction, reference) < kl else (low, middle)
    return reference + high * direction


def accuracy(estimator: Estimator, logits: Tensor, reference: Tensor) -> Accuracy:
    """An estimator's bias, spread and gradients at the policy softmax(logits). (V,), (V,)."""
    logits = logits.clone().requires_grad_()
    logprobs = logits.log_softmax(-1)
    probabilities = logprobs.detach().exp()
    kl = exact_kl(logits, reference)
    nats = float(kl.detach())
    estimates = approx_kl(logprobs, reference.log_softmax(-1), estimator)
    fixed = estimates.detach()

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    true = gradient(kl)
    as_loss = gradient((probabilities * estimates).sum())
    as_reward = gradient((probabilities * fixed * logprobs).sum())
    reverse = probabilities - reference.softmax(-1)
    mean = (probabilities * fixed).sum()
    return Accuracy(
        estimator,
        kl=nats,
        bias=float(mean) - nats,
        std=float((probabilities * (fixed - mean) ** 2).sum().sqrt()),
        lowest=float(fixed.min()),
        loss_gradient_error=float((as_loss - true).norm() / true.norm()),
        reverse_gradient_error=float((as_loss - reverse).norm() / reverse.norm()),
        loss_gradient_norm=float(as_loss.norm()),
        reward_gradient_error=float((as_reward - true).norm() / true.norm()),
    )


def optimum(estimator: Estimator, rewards: Tensor, reference: Tensor, *, kl_coef: float) -> Optimum:
    """Gradient ascent with the reward r − β·k, from the reference on, by expected policy gradients. (V,), (V,).

    The best policy is p ∝ q·exp(r/β), with J = β·log E_q[exp(r/β)].
    """
    reference_logprobs = reference.log_softmax(-1)
    best = reference + rewards / kl_coef

    def ascent(logits: Tensor) -> Tensor:
        """E_p[(r − β·k)·∇log p]: of a softmax, p·(A − E_p[A])."""
        logprobs = logits.log_softmax(-1)
        probabilities = logprobs.exp()
        paid = rewards - kl_coef * approx_kl(logprobs, reference_logprobs, estimator)
        return probabilities * (paid - (probabilities * paid).sum())

    def lowest_ratio(logits: Tensor) -> float:
        return float((logits.log_softmax(-1) - reference_logprobs).exp().min())

    logits, steps = reference, 0
    while steps < ASCENT_STEPS and lowest_ratio(logits) > DRIVEN_OUT:
        logits, steps = logits + ASCENT_RATE * ascent(logits), steps + 1

    def objective(logits: Tensor) -> Tensor:
        return (logits.softmax(-1) * rewards).sum() - kl_coef * exact_kl(logits, reference)

    return Optimum(
        estimator,
        regret=float(objective(best) - objective(logits)),
        kl=float(exact_kl(logits, reference)),
        best_kl=float(exact_kl(best, reference)),
        gradient_at_best=float(ascent(best).norm()),
        lowest_ratio=lowest_ratio(logits),
    )


def claims_of(accuracies: Sequence[Accuracy], optima: Sequence[Optimum]) -> list[Claim]:
    """The known facts (Schulman, 2020, "Approximating KL divergence"), each held against the numbers."""

    def series(estimator: Estimator, name: str) -> list[float]:
        return [getattr(each, name) for each in accuracies if each.estimator == estimator]

    def exact(estimator: Estimator, name: str) -> bool:
        return max(map(abs, series(estimator, name))) < EXACT

    nearest, farthest = f"{accuracies[0].kl:.3f} nats", f"{accuracies[-1].kl:.0f} nat"
    ends = {each.estimator: each for each in optima}
    k1_std, k3_std = series("k1", "std"), series("k3", "std")
    k2_bias = series("k2", "bias")
    k3_loss, k3_reward, k2_reward = (
        series("k3", "loss_gradient_error"),
        series("k3", "reward_gradient_error"),
        series("k2", "reward_gradient_error"),
    )
    return [
        Claim(
            "As a value, k1 is unbiased, but of either sign.",
            exact("k1", "bias") and max(series("k1", "lowest")) < 0,
            f"largest bias {max(map(abs, series('k1', 'bias'))):.0e}, lowest estimate "
            f"{min(series('k1', 'lowest')):.2f}",
        ),
        Claim(
            "As a value, k3 is unbiased, never negative, and of less variance than k1 where the policies are near.",
            exact("k3", "bias") and min(series("k3", "lowest")) >= 0 and k3_std[0] < k1_std[0],
            f"largest bias {max(map(abs, series('k3', 'bias'))):.0e}; at {nearest} its standard deviation is "
            f"{k3_std[0] / k1_std[0]:.2f} of k1's",
        ),
        Claim(
            "As a value, k2 is biased, by more the farther apart the policies are.",
            abs(k2_bias[-1]) > abs(k2_bias[0]) > EXACT,
            f"{k2_bias[0] / accuracies[0].kl:+.1%} of the KL at {nearest}, "
            f"{k2_bias[-1] / accuracies[-1].kl:+.1%} at {farthest}",
        ),
        Claim(
            "As a loss, k2 has exactly the gradient of the KL.",
            exact("k2", "loss_gradient_error"),
            f"largest relative error {max(series('k2', 'loss_gradient_error')):.0e}",
        ),
        Claim(
            "As a loss, k1 has no gradient at all in expectation.",
            exact("k1", "loss_gradient_norm"),
            f"largest norm {max(series('k1', 'loss_gradient_norm')):.0e}",
        ),
        Claim(
            "As a loss, k3 has the gradient of the other direction, KL(q‖p): near the KL's only where they are near.",
            exact("k3", "reverse_gradient_error") and k3_loss[-1] > k3_loss[0] > EXACT,
            f"largest relative error to it {max(series('k3', 'reverse_gradient_error')):.0e}; to the KL's "
            f"{k3_loss[0]:.1%} at {nearest}, {k3_loss[-1]:.0%} at {farthest}",
        ),
        Claim(
            "As a reward, k1 has exactly the gradient of the KL, and its optimum is the objective's.",
            exact("k1", "reward_gradient_error") and ends["k1"].gradient_at_best < EXACT,
            f"largest relative error {max(series('k1', 'reward_gradient_error')):.0e}; gradient at the best policy "
            f"{ends['k1'].gradient_at_best:.0e}",
        ),
        Claim(
            "As a reward, k2 and k3 change the optimum; k3 drives a token below the reference ever further down.",
            min(*k3_reward, *k2_reward) > EXACT
            and min(ends[name].gradient_at_best for name in ("k2", "k3")) > 1e-3
            and ends["k3"].lowest_ratio < 1e-6 * ends["k1"].lowest_ratio,
            f"at the best policy a gradient of norm {ends['k2'].gradient_at_best:.2f} (k2), "
            f"{ends['k3'].gradient_at_best:.2f} (k3) is left; ascent ends {ends['k2'].regret:.2f}, "
            f"{ends['k3'].regret:.2f} below it (k1: {ends['k1'].regret:.0e}); smallest p/q "
            f"{ends['k2'].lowest_ratio:.1g}, {ends['k3'].lowest_ratio:.0e} (k1: {ends['k1'].lowest_ratio:.1g})",
        ),
    ]


PANELS = {
    "bias": "As a value: |bias|, nats",
    "std": "As a value: standard deviation, nats",
    "loss_gradient_error": "As a loss: relative error of the gradient",
    "reward_gradient_error": "As a reward: relative error of the gradient",
}


def document_of(results: Results) -> Document:
    """The claims, the four errors over the exact KL, one line an estimator, and all numbers."""
    text = (
        f"One token of a vocabulary of {VOCABULARY} is drawn from a policy p and compared with a reference q: "
        "k1 = log p/q, k2 = (log p/q)²/2, k3 = q/p − 1 + log p/q. Every expectation is a sum over the vocabulary, in "
        "float64, so that no number has sampling noise; the reference, the direction in which the policy leaves it and "
        "the rewards are drawn once by the seed."
    )
    optima_text = (
        f"Where gradient ascent on r − β·k ends, β = {KL_COEF}, seen by J = E_p[r] − β·KL(p‖q). regret: max J − J; "
        "gradient_at_best: the norm that is left at the best policy; lowest_ratio: the least p/q."
    )
    charts = [_chart(name, title, results.accuracies) for name, title in PANELS.items()]
    return Document(
        "What k1, k2 and k3 estimate",
        [text],
        [
            Section("Findings", tables=[table_of(results.claims)]),
            Section("Value and gradients", tables=[_rows_table(results.accuracies)], charts=charts),
            Section("Optima of the reward", [optima_text], tables=[_rows_table(results.optima)]),
        ],
    )


def _chart(name: str, title: str, accuracies: Sequence[Accuracy]) -> Chart:
    lines = []
    for estimator in ESTIMATORS:
        rows = [each for each in accuracies if each.estimator == estimator]
        nats, errors = [math.log10(row.kl) for row in rows], [abs(getattr(row, name)) for row in rows]
        lines.append(Series(estimator, nats, errors))
    return Chart(title, tuple(lines), x_label="log₁₀ KL(p‖q), nats a token")


def _rows_table(rows: Sequence[Accuracy] | Sequence[Optimum]) -> Table:
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else cell for cell in asdict(row).values()] for row in rows]
    return Table([field.name for field in fields(rows[0])], cells)
