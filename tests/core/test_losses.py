"""The losses of PPO and of reward modelling."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import reference
import torch
from core_cases import (
    POISONS,
    assert_close,
    assert_masked_slots_do_not_matter,
    examples,
    floats,
    leaf,
    random_rows,
    rows,
    tensors,
)
from hypothesis import given
from torch.autograd import gradcheck

from ppo_rlhf.core import (
    Evaluation,
    Experience,
    approx_kl,
    bradley_terry_loss,
    clipped_policy_loss,
    exact_kl,
    ppo_loss,
    reference_kl_loss,
    value_loss,
)
from ppo_rlhf.core.losses import kl_old_new

ALL = torch.ones(1, 1, dtype=torch.bool)
FULL_LOSS = {
    "clip_range": 0.2,
    "dual_clip": 3.0,
    "value_clip_range": 0.3,
    "value_coef": 0.7,
    "entropy_coef": 0.05,
    "kl_penalty_coef": 0.4,
}


def one(number):
    return torch.tensor([[number]], dtype=torch.float64)


def policy_loss_of(ratio, advantage, **settings):
    """The loss and its derivative in the log-probability, of one decision with the given ratio."""
    logprobs = leaf(one(math.log(ratio)))
    loss = clipped_policy_loss(logprobs, one(0.0), one(advantage), ALL, **settings)
    loss.backward()
    return loss.item(), logprobs.grad.item()


# The clipped objective.


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside the clip: −ρA, and d(−ρA)/d log π = −ρA
        (1.5, 2.0, -2.4, 0.0),  # too far up: −1.2·2, no gradient
        (0.5, 2.0, -1.0, -1.0),  # below, but the objective wants it up again: unclipped
        (0.5, -2.0, 1.6, 0.0),  # too far down: 0.8·2, no gradient
        (1.5, -2.0, 3.0, 3.0),  # above, but the objective wants it down again: unclipped
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_the_clipped_policy_loss_by_hand(ratio, advantage, loss, gradient):
    assert policy_loss_of(ratio, advantage, clip_range=0.2) == pytest.approx((loss, gradient))


def test_without_a_clip_range_the_ratio_is_free():
    assert policy_loss_of(5.0, 2.0, clip_range=None) == pytest.approx((-10.0, -10.0))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (2.0, -1.0, 2.0, 2.0),  # below c = 3: as without
        (5.0, -1.0, 3.0, 0.0),  # bounded to −c·A = 3, no gradient
        (5.0, 1.0, -1.2, 0.0),  # a positive advantage never meets the dual clip
        (0.5, 1.0, -0.5, -0.5),
    ],
)
def test_the_dual_clip_bounds_the_loss_of_negative_advantages(ratio, advantage, loss, gradient):
    assert policy_loss_of(ratio, advantage, clip_range=0.2, dual_clip=3.0) == pytest.approx((loss, gradient))


@pytest.mark.parametrize(("advantage", "loss"), [(1.0, -1.2), (-1.0, 3.0)])
def test_a_ratio_too_large_for_its_float_is_clipped_like_any_other(advantage, loss):
    """e^200 is infinite in float32. Its clipped loss does not depend on it, so its gradient is 0, not 0 · inf."""
    logprobs = torch.tensor([[200.0]], requires_grad=True)
    actual = clipped_policy_loss(
        logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), ALL, clip_range=0.2, dual_clip=3
    )
    actual.backward()
    assert actual.item() == pytest.approx(loss)
    assert logprobs.grad.item() == 0


def test_at_the_old_policy_the_loss_is_minus_the_mean_advantage():
    logprobs, advantages, mask = random_rows(2)
    loss = clipped_policy_loss(logprobs, logprobs, advantages, mask, clip_range=0.2)
    assert_close(loss, -reference.masked_mean(advantages.tolist(), mask.tolist()))


def test_at_the_old_policy_the_gradient_is_the_policy_gradient():
    """∇ of −mean(A · log π): −A/n at each decision."""
    logprobs, advantages, mask = random_rows(2)
    new = leaf(logprobs)
    clipped_policy_loss(new, logprobs, advantages, mask, clip_range=0.2).backward()
    assert_close(new.grad, torch.where(mask, -advantages / mask.sum(), 0))


@examples
@given(rows(3), st.sampled_from([None, 0.1, 0.2]), st.sampled_from([None, 1.5, 3.0]), st.sampled_from([None, 7]))
def test_the_clipped_policy_loss_agrees_with_the_reference(case, clip_range, dual_clip, count):
    *inputs, mask = case
    settings = {"clip_range": clip_range, "dual_clip": dual_clip, "count": count}
    expected = reference.clipped_policy_loss(*(x.tolist() for x in case), **settings)
    assert_close(clipped_policy_loss(*inputs, mask, **settings), expected, rtol=1e-7)


@examples
@given(rows(3))
def test_clipping_only_ever_raises_the_loss(case):
    clipped = clipped_policy_loss(*case, clip_range=0.2)
    assert clipped >= clipped_policy_loss(*case, clip_range=None) - 1e-12


# The value loss.


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient"),
    [
        (1.1, 1.0, 3.0, 1.805, -1.9),  # moved 0.1 < 0.2: ½·1.9², derivative V − R
        (2.0, 1.0, 3.0, 1.62, 0.0),  # moved 1, seen as 1.2: ½·max(1, 1.8²), no gradient
        (0.0, 1.0, 3.0, 4.5, -3.0),  # moved away: ½·max(3², 2.2²)
    ],
)
def test_the_value_loss_by_hand(value, old, target, loss, gradient):
    values = leaf(one(value))
    actual = value_loss(values, one(old), one(target), ALL, clip_range=0.2)
    actual.backward()
    assert (actual.item(), values.grad.item()) == pytest.approx((loss, gradient))


def test_the_value_loss_without_a_clip_is_half_the_squared_error():
    # ½·((2 − 5)² + (1 − 0)²)/2 = 2.5; the old values play no part.
    mask = torch.ones(1, 2, dtype=torch.bool)
    old = torch.full((1, 2), float("nan"))
    assert value_loss(torch.tensor([[2.0, 1.0]]), old, torch.tensor([[5.0, 0.0]]), mask).item() == 2.5


@examples
@given(rows(3), st.sampled_from([None, 0.2, 1.0]), st.sampled_from([None, 7]))
def test_the_value_loss_agrees_with_the_reference(case, clip_range, count):
    *inputs, mask = case
    expected = reference.value_loss(*(x.tolist() for x in case), clip_range, count)
    assert_close(value_loss(*inputs, mask, clip_range=clip_range, count=count), expected)


# The whole loss.


def ppo_case(num_rows=3, steps=5, seed=0):
    """(new, new entropy, new values) to differentiate, and the experience."""
    shape = (num_rows, steps)
    *inputs, mask = random_rows(7, seed=seed, shape=shape)
    old, values, advantages, returns, new, entropy, new_values = inputs
    experience = Experience(inputs={}, logprobs=old, values=values, advantages=advantages, returns=returns, mask=mask)
    return (new * 0.3 + old, entropy.abs(), new_values), experience


def as_lists(experience):
    return {name: getattr(experience, name).tolist() for name in ("logprobs", "values", "advantages", "returns")}


@examples
@given(
    rows(7),
    st.sampled_from([None, 0.2]),
    st.sampled_from([None, 3.0]),
    st.sampled_from([None, 0.3]),
    floats(0, 1),
    floats(0, 1),
    floats(0, 1),
    st.sampled_from([None, 7]),
)
def test_the_ppo_loss_agrees_with_the_reference(case, clip_range, dual_clip, value_clip_range, vf, ent, kl, count):
    old, values, advantages, returns, new, entropy, new_values, mask = case
    experience = Experience(inputs={}, logprobs=old, values=values, advantages=advantages, returns=returns, mask=mask)
    settings = {
        "clip_range": clip_range,
        "dual_clip": dual_clip,
        "value_clip_range": value_clip_range,
        "value_coef": vf,
        "entropy_coef": ent,
        "kl_penalty_coef": kl,
        "count": count,
    }
    loss, _ = ppo_loss(Evaluation(new, entropy, new_values), experience, **settings)
    evaluation = {"logprobs": new.tolist(), "entropy": entropy.tolist(), "values": new_values.tolist()}
    assert_close(loss, reference.ppo_loss(evaluation, as_lists(experience), mask.tolist(), **settings), rtol=1e-7)


def test_the_statistics_by_hand():
    # Ratios 1.5, 0.9 and 0.5 (a fourth slot is masked), ε = 0.2, A = 1, 2, −1; entropies 1, 2, 6.
    # Policy: −(min(1.5, 1.2)·1 + 0.9·2 + min(−0.5, −0.8))/3 = −(1.2 + 1.8 − 0.8)/3 = −2.2/3
    # Value: errors 1, 2, 0: ½·(1 + 4)/3 = 5/6. Outside the clip: two of three. k3 of a ratio: ρ − 1 − log ρ.
    mask = torch.tensor([[True, True, True, False]])
    rows = {
        "new": [math.log(1.5), math.log(0.9), math.log(0.5), 0.3],
        "advantages": [1, 2, -1, 8],
        "values": [1, 0, 3, 3],
        "returns": [2, 2, 3, 8],
        "entropy": [1, 2, 6, -50],
    }
    rows = {name: torch.tensor([row], dtype=torch.float64) for name, row in rows.items()}
    old = torch.zeros(1, 4, dtype=torch.float64)
    experience = Experience({}, old, rows["values"], rows["advantages"], rows["returns"], mask)
    _, statistics = ppo_loss(Evaluation(rows["new"], rows["entropy"], rows["values"]), experience)
    k3 = (0.5 - math.log(1.5)) + (-0.1 - math.log(0.9)) + (-0.5 - math.log(0.5))
    expected = {
        "loss/policy": -2.2 / 3,
        "loss/value": 5 / 6,
        "objective/entropy": 3.0,
        "policy/approx_kl": k3 / 3,
        "policy/clip_fraction": 2 / 3,
        "policy/ratio": 2.9 / 3,
    }
    assert {name: value.item() for name, value in statistics.items()} == pytest.approx(expected)


def test_at_the_old_policy_ratio_is_one_and_nothing_is_clipped():
    (_, entropy, values), experience = ppo_case()
    _, statistics = ppo_loss(Evaluation(experience.logprobs, entropy, values), experience)
    assert_close(statistics["policy/ratio"], 1.0)
    assert statistics["policy/approx_kl"] == 0
    assert statistics["policy/clip_fraction"] == 0
    assert_close(
        statistics["loss/policy"], -reference.masked_mean(experience.advantages.tolist(), experience.mask.tolist())
    )


def test_nothing_is_clipped_without_a_clip_range():
    evaluation, experience = ppo_case()
    _, statistics = ppo_loss(Evaluation(*evaluation), experience, clip_range=None)
    assert statistics["policy/clip_fraction"] == 0


def test_statistics_hold_no_graph():
    evaluation, experience = ppo_case()
    loss, statistics = ppo_loss(Evaluation(*(leaf(x) for x in evaluation)), experience, **FULL_LOSS)
    assert loss.requires_grad
    assert not any(value.requires_grad for value in statistics.values())


def test_the_ppo_loss_passes_gradcheck():
    evaluation, experience = ppo_case(2, 3)
    assert gradcheck(
        lambda *evaluation: ppo_loss(Evaluation(*evaluation), experience, **FULL_LOSS)[0],
        tuple(leaf(x) for x in evaluation),
    )


@pytest.mark.parametrize("clip_range", [None, 0.2])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_the_clipped_policy_loss_passes_gradcheck(clip_range, dual_clip):
    new, old, advantages, mask = random_rows(3, shape=(2, 3))
    assert gradcheck(
        lambda new, advantages: clipped_policy_loss(
            new, old, advantages, mask, clip_range=clip_range, dual_clip=dual_clip
        ),
        (leaf(new), leaf(advantages)),
    )


@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_the_value_loss_passes_gradcheck(clip_range):
    values, old, returns, mask = random_rows(3, shape=(2, 3))
    assert gradcheck(lambda v, r: value_loss(v, old, r, mask, clip_range=clip_range), (leaf(values), leaf(returns)))


def test_nan_in_masked_slots_changes_no_policy_loss():
    *inputs, mask = random_rows(3)
    assert_masked_slots_do_not_matter(
        lambda *x: clipped_policy_loss(*x, clip_range=0.2, dual_clip=3.0), tuple(inputs), mask
    )


@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_nan_in_masked_slots_changes_no_value_loss(clip_range):
    *inputs, mask = random_rows(3)
    assert_masked_slots_do_not_matter(lambda *x: value_loss(*x, clip_range=clip_range), tuple(inputs), mask)


@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_nan_in_masked_slots_changes_no_ppo_loss(clip_range):
    *inputs, mask = random_rows(7)

    def loss(old, values, advantages, returns, new, entropy, new_values, mask):
        experience = Experience({}, old, values, advantages, returns, mask)
        return ppo_loss(Evaluation(new, entropy, new_values), experience, **{**FULL_LOSS, "clip_range": clip_range})[0]

    assert_masked_slots_do_not_matter(loss, tuple(inputs), mask)


def test_nan_in_masked_slots_changes_no_statistic():
    evaluation, experience = ppo_case()
    _, clean = ppo_loss(Evaluation(*evaluation), experience)
    mask = experience.mask
    for poison in POISONS:
        names = ("logprobs", "values", "advantages", "returns")
        poisoned = Experience({}, *(torch.where(mask, getattr(experience, name), poison) for name in names), mask)
        _, statistics = ppo_loss(Evaluation(*(torch.where(mask, x, poison) for x in evaluation)), poisoned)
        for name, value in statistics.items():
            assert_close(value, clean[name])


def test_a_batch_without_a_decision_has_no_loss_and_no_gradient():
    evaluation, experience = ppo_case()
    empty = Experience(**{**vars(experience), "mask": torch.zeros_like(experience.mask)})
    evaluation = [leaf(x) for x in evaluation]
    loss, statistics = ppo_loss(Evaluation(*evaluation), empty, **FULL_LOSS)
    loss.backward()
    assert loss == 0
    assert all(value == 0 for value in statistics.values())
    assert all((x.grad == 0).all() for x in evaluation)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 1), (1, 2, 1), (4,)])
def test_uneven_micro_batches_sum_to_the_whole_batch(sizes):
    """Loss, gradients and every statistic, with rows of unequal lengths."""
    evaluation, experience = ppo_case(num_rows=4)
    whole = [leaf(x) for x in evaluation]
    loss, statistics = ppo_loss(Evaluation(*whole), experience, **FULL_LOSS)
    loss.backward()

    pieces = [leaf(x) for x in evaluation]
    start, total, summed = 0, 0.0, dict.fromkeys(statistics, 0.0)
    for size in sizes:
        part = slice(start, start + size)
        piece, of_piece = ppo_loss(
            Evaluation(*(x[part] for x in pieces)), experience[part], **FULL_LOSS, count=experience.mask.sum()
        )
        piece.backward()
        total, start = total + piece.item(), start + size
        summed = {name: summed[name] + of_piece[name].item() for name in summed}
    assert_close(total, loss, rtol=1e-6)  # the count divides in float32
    for name, value in statistics.items():
        assert_close(summed[name], value, rtol=1e-6)
    for piece, each in zip(pieces, whole, strict=True):
        if each.grad is not None:
            assert_close(piece.grad, each.grad)


@pytest.mark.parametrize("seed", range(3))
def test_the_entropy_bonus_and_the_penalty_enter_with_their_signs(seed):
    evaluation, experience = ppo_case(seed=seed)
    plain, statistics = ppo_loss(Evaluation(*evaluation), experience)
    with_bonus, _ = ppo_loss(Evaluation(*evaluation), experience, entropy_coef=0.1)
    with_penalty, _ = ppo_loss(Evaluation(*evaluation), experience, kl_penalty_coef=0.1)
    assert_close(with_bonus, plain - 0.1 * statistics["objective/entropy"])
    assert_close(with_penalty, plain + 0.1 * statistics["policy/approx_kl"])


def gaussian_kl(old, new):
    """KL of normal distributions, each (mean, standard deviation)."""
    (old_mean, old_std), (new_mean, new_std) = old, new
    return (new_std / old_std).log() + (old_std**2 + (old_mean - new_mean) ** 2) / (2 * new_std**2) - 0.5


def test_an_exact_divergence_takes_the_place_of_the_estimate():
    # Standard deviations 1, means 0 and 1 apart by 2, 0: KL = 2²/2 = 2 and 0; the third is masked. Mean 1.
    zeros, mask = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([[True, True, False]])
    ones = torch.ones_like(zeros)
    experience = Experience({}, zeros, zeros, zeros, zeros, mask, distribution=(zeros, ones))
    evaluation = Evaluation(
        zeros, zeros, zeros, distribution=(torch.tensor([[2.0, 0.0, 5.0]], dtype=torch.float64), ones)
    )
    assert kl_old_new(evaluation, experience).item() == 0
    assert kl_old_new(evaluation, experience, kl_divergence=gaussian_kl).item() == 1
    loss, _ = ppo_loss(evaluation, experience, kl_penalty_coef=0.3, kl_divergence=gaussian_kl)
    assert_close(loss, 0.3)


def test_the_divergence_is_of_the_old_policy_from_the_new():
    """KL(old‖new), not KL(new‖old)."""
    zeros = torch.zeros(1, 1, dtype=torch.float64)
    old, new = torch.tensor([[[0.0, 0.0]]], dtype=torch.float64), torch.tensor([[[0.0, 2.0]]], dtype=torch.float64)
    experience = Experience({}, zeros, zeros, zeros, zeros, ALL, distribution=old)
    exact = kl_old_new(Evaluation(zeros, zeros, zeros, distribution=new), experience, kl_divergence=exact_kl)
    assert_close(exact, reference.exact_kl([0, 0], [0, 2]))
    assert abs(exact.item() - reference.exact_kl([0, 2], [0, 0])) > 0.01


@pytest.mark.parametrize("poison", POISONS)
def test_nan_in_masked_slots_of_the_old_distribution_changes_neither_the_divergence_nor_its_gradient(poison):
    zeros, mask = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[True, False]])
    ones = torch.ones_like(zeros)
    experience = Experience({}, zeros, zeros, zeros, zeros, mask, distribution=(torch.where(mask, zeros, poison), ones))
    mean = leaf(torch.tensor([[2.0, 1.0]], dtype=torch.float64))
    divergence = kl_old_new(Evaluation(zeros, zeros, zeros, (mean, ones)), experience, kl_divergence=gaussian_kl)
    divergence.backward()
    assert divergence.item() == 2
    assert mean.grad.tolist() == [[2, 0]]


# The reward model's loss.


def test_the_bradley_terry_loss_by_hand():
    # Differences 0 and log 3: −log ½ and −log ¾; their mean is ½ log(8/3).
    chosen, rejected = (
        torch.tensor([1.0, math.log(3)], dtype=torch.float64),
        torch.tensor([1.0, 0.0], dtype=torch.float64),
    )
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx(0.5 * math.log(8 / 3))


def test_the_margin_is_what_the_chosen_one_must_be_better_by():
    # Better by 2, asked for 2: as good as a draw.
    loss = bradley_terry_loss(torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([2.0]))
    assert loss.item() == pytest.approx(math.log(2))


def test_weights_and_count_average_over_rankings():
    # One ranking of three, three pairs of difference 0, weight 1/3 each, one ranking: log 2.
    zeros = torch.zeros(3)
    loss = bradley_terry_loss(zeros, zeros, weight=torch.full((3,), 1 / 3), count=1)
    assert loss.item() == pytest.approx(math.log(2))


@examples
@given(
    st.integers(1, 5).flatmap(lambda n: st.tuples(*(tensors(n) for _ in range(4)))),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 7]),
)
def test_the_bradley_terry_loss_agrees_with_the_reference(case, with_margin, with_weight, count):
    chosen, rejected, margin, weight = case
    margin, weight = margin if with_margin else None, weight.abs() if with_weight else None
    expected = reference.bradley_terry_loss(
        *(None if x is None else x.tolist() for x in (chosen, rejected, margin, weight)), count
    )
    assert_close(bradley_terry_loss(chosen, rejected, margin, weight=weight, count=count), expected)


def test_the_bradley_terry_loss_passes_gradcheck():
    generator = torch.Generator().manual_seed(0)
    inputs = [leaf(torch.randn(3, generator=generator, dtype=torch.float64)) for _ in range(3)]
    assert gradcheck(bradley_terry_loss, inputs)


def test_half_precision_scores_are_compared_in_float32():
    """−log σ of the difference that the two bfloat16 numbers have, not of a difference rounded to bfloat16."""
    chosen, rejected = torch.tensor([3.0]).bfloat16(), torch.tensor([0.01]).bfloat16()
    loss = bradley_terry_loss(chosen, rejected)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log1p(math.exp(rejected.item() - chosen.item())), rel=1e-5)


def test_hopeless_and_certain_pairs_have_finite_losses():
    chosen = leaf(torch.tensor([1000.0, -1000.0], dtype=torch.float64))
    loss = bradley_terry_loss(chosen, torch.zeros(2, dtype=torch.float64))
    loss.backward()
    assert loss.item() == 500
    assert_close(chosen.grad, [0.0, -0.5])


def test_no_pairs_have_no_loss():
    assert bradley_terry_loss(torch.zeros(0), torch.zeros(0)).item() == 0


@pytest.mark.parametrize("sizes", [(1, 3), (2, 2), (1, 1, 1, 1)])
def test_uneven_micro_batches_of_pairs_sum_to_the_whole(sizes):
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 4, generator=generator)
    pieces = zip(chosen.split(sizes), rejected.split(sizes), strict=True)
    total = sum(bradley_terry_loss(*pair, count=4) for pair in pieces)
    assert total.item() == pytest.approx(bradley_terry_loss(chosen, rejected).item())


def test_the_loss_does_not_see_a_common_shift_of_the_scores():
    chosen, rejected = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0])
    assert bradley_terry_loss(chosen + 4, rejected + 4).item() == bradley_terry_loss(chosen, rejected).item()


# ---------------------------------------------------------------------------------------------------- KL in the loss


def expected_gradient(estimator, logits, old_logits, ref_logits):
    """∇ of the loss's expectation over decisions of the old policy, all of a small vocabulary enumerated."""
    logits = logits.clone().requires_grad_()
    logprobs, old, ref = logits.log_softmax(0), old_logits.log_softmax(0), ref_logits.log_softmax(0)
    decided = torch.ones(1, 1, dtype=torch.bool)
    total = torch.zeros((), dtype=logits.dtype)
    for a, probability in enumerate(old.exp()):
        one = (x[a].reshape(1, 1) for x in (logprobs, old, ref))
        total = total + probability * reference_kl_loss(*one, decided, estimator=estimator)
    return float(total.detach()), torch.autograd.grad(total, logits)[0]


def exact_gradient(logits, ref_logits):
    logits = logits.clone().requires_grad_()
    kl = exact_kl(logits, ref_logits)
    return float(kl.detach()), torch.autograd.grad(kl, logits)[0]


VOCABULARY_LOGITS = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_gradient_of_kl_in_the_loss_is_the_exact_kls_where_the_policy_sampled(estimator):
    logits, _, ref_logits = VOCABULARY_LOGITS
    _, gradient = expected_gradient(estimator, logits, logits, ref_logits)
    torch.testing.assert_close(gradient, exact_gradient(logits, ref_logits)[1], rtol=1e-10, atol=1e-12)


def test_weighted_k3_is_the_exact_kl_and_has_its_gradient_wherever_the_policy_has_moved_to():
    logits, old_logits, ref_logits = VOCABULARY_LOGITS
    value, gradient = expected_gradient("k3", logits, old_logits, ref_logits)
    exact, expected = exact_gradient(logits, ref_logits)
    assert value == pytest.approx(exact, rel=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_plain_k3_would_have_the_gradient_of_the_other_kl():
    logits, _, ref_logits = VOCABULARY_LOGITS
    moving = logits.clone().requires_grad_()
    plain = (logits.softmax(0) * approx_kl(moving.log_softmax(0), ref_logits.log_softmax(0), "k3")).sum()
    other = exact_kl(ref_logits, moving)
    torch.testing.assert_close(*(torch.autograd.grad(each, moving)[0] for each in (plain, other)))


def test_kl_in_the_loss_is_added_with_its_coefficient_and_told():
    mask = torch.tensor([[True, True, False]])
    nan = math.nan
    evaluation = Evaluation(
        torch.tensor([[-1.0, -2.0, nan]], requires_grad=True), torch.zeros(1, 3), torch.zeros(1, 3, requires_grad=True)
    )
    experience = Experience(
        inputs={},
        logprobs=torch.tensor([[-1.0, -2.0, nan]]),
        values=torch.zeros(1, 3),
        advantages=torch.zeros(1, 3),
        returns=torch.zeros(1, 3),
        mask=mask,
        ref_logprobs=torch.tensor([[-3.0, -1.0, nan]]),
    )
    loss, statistics = ppo_loss(evaluation, experience, reference_kl_coef=0.1)
    # ½·2² and ½·1², their mean 1.25
    assert float(loss.detach()) == pytest.approx(0.125)
    assert float(statistics["loss/reference_kl"]) == pytest.approx(1.25)
    (gradient,) = torch.autograd.grad(loss, evaluation.logprobs)
    torch.testing.assert_close(gradient, torch.tensor([[0.1, -0.05, 0.0]]))
    assert "loss/reference_kl" not in ppo_loss(evaluation, experience)[1]
