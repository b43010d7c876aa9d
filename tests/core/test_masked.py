"""Statistics over the decisions that count."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import reference
import torch
from core_cases import (
    as_processes,
    assert_close,
    assert_masked_slots_do_not_matter,
    examples,
    floats,
    leaf,
    random_rows,
    rows,
    rows_of,
    tensors,
)
from hypothesis import assume, given
from torch.autograd import gradcheck

from ppo_rlhf.core import (
    explained_variance,
    identity,
    masked_mean,
    masked_moments,
    masked_sum,
    merged_moments,
    unit_variance,
    whiten,
)

STATISTICS = {
    "masked_sum": masked_sum,
    "masked_mean": masked_mean,
    "mean": lambda x, mask: masked_moments(x, mask)[0],
    "variance": lambda x, mask: masked_moments(x, mask)[1],
    "whiten": whiten,
    "unit_variance": unit_variance,
    "explained_variance": lambda x, mask: explained_variance(x, 2 * x + torch.arange(x.shape[1]), mask),
}


def test_identity_is_the_sum_over_one_process():
    x = rows_of([1, 2])
    assert identity(x) is x


def test_masked_sum_adds_what_counts():
    # 1 + 3 + 10 = 14; the 100 is masked.
    mask = torch.tensor([[True, False], [True, True]])
    assert masked_sum(rows_of([1, 100], [3, 10]), mask).item() == 14


def test_masked_mean_divides_by_the_decisions():
    # (1 + 3 + 11) / 3 = 5
    mask = torch.tensor([[True, False], [True, True]])
    assert masked_mean(rows_of([1, 100], [3, 11]), mask).item() == 5


def test_masked_mean_divides_by_a_given_count():
    # (1 + 3 + 11) / 10 = 1.5, whether the count is a number or a tensor
    mask = torch.tensor([[True, False], [True, True]])
    x = rows_of([1, 100], [3, 11])
    assert masked_mean(x, mask, count=10).item() == 1.5
    assert masked_mean(x, mask, count=torch.tensor(10.0)).item() == 1.5


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0.0)])
def test_the_mean_of_no_decision_is_zero_with_a_zero_gradient(count):
    x = leaf(rows_of([1, float("nan")]))
    mean = masked_mean(x, torch.zeros(1, 2, dtype=torch.bool), count=count)
    mean.backward()
    assert mean.item() == 0
    assert x.grad.tolist() == [[0, 0]]


def test_moments_by_hand():
    # Of 1, 3, 8: mean 12/3 = 4, biased variance (9 + 1 + 16)/3 = 26/3 (unbiased it would be 13).
    mask = torch.tensor([[True, True, False, True]])
    mean, variance, count = masked_moments(rows_of([1, 3, 99, 8]), mask)
    assert (mean.item(), count.item()) == (4, 3)
    assert_close(variance, 26 / 3)


def test_moments_of_no_decision_are_zero():
    mean, variance, count = masked_moments(rows_of([1, 2]), torch.zeros(1, 2, dtype=torch.bool))
    assert (mean.item(), variance.item(), count.item()) == (0, 0, 0)


def test_the_variance_keeps_its_digits_when_the_mean_is_large():
    # 10 000 ± 0.0625, exact in float32. E[x²] − E[x]² in float32 would be a multiple of 8.
    x = torch.tensor([[10_000.0625, 9_999.9375]])
    _, variance, _ = masked_moments(x, torch.ones(1, 2, dtype=torch.bool))
    assert variance.item() == 0.0625**2


def test_whiten_by_hand():
    # Of 1 and 5: mean 3, biased variance 4, so −1 and 1; the unbiased variance, 8, would give ∓0.707.
    whitened = whiten(rows_of([1, 99, 5]), torch.tensor([[True, False, True]]))
    assert_close(whitened, [[-1.0, 0.0, 1.0]], atol=1e-8)


def test_unit_variance_by_hand():
    # Of 1 and 5: mean 3, deviation 2, so 3 − 1 = 2 and 3 + 1 = 4.
    scaled = unit_variance(rows_of([1, 99, 5]), torch.tensor([[True, False, True]]))
    assert_close(scaled, [[2.0, 0.0, 4.0]], atol=1e-8)


@pytest.mark.parametrize("function", [whiten, unit_variance])
def test_masked_slots_come_back_zero(function):
    x, mask = random_rows(1)
    x = torch.where(mask, x, torch.nan)
    assert (function(x, mask)[~mask] == 0).all()


def test_whitening_a_single_decision_gives_zero():
    assert whiten(torch.tensor([[7.3, 1.0]]), torch.tensor([[True, False]])).tolist() == [[0, 0]]


def test_unit_variance_leaves_a_single_decision_as_it_is():
    assert unit_variance(rows_of([7.5, 1.0]), torch.tensor([[True, False]])).tolist() == [[7.5, 0]]


@pytest.mark.parametrize("function", [whiten, unit_variance])
def test_without_a_decision_everything_is_zero(function):
    assert function(rows_of([1, 2]), torch.zeros(1, 2, dtype=torch.bool)).tolist() == [[0, 0]]


@examples
@given(rows(1))
def test_whitened_decisions_have_mean_zero_and_biased_variance_one(case):
    x, mask = case
    assume(reference.moments(x.tolist(), mask.tolist())[1] > 0.01)
    mean, variance = reference.moments(whiten(x, mask).tolist(), mask.tolist())
    assert abs(mean) < 1e-9
    assert abs(variance - 1) < 1e-5  # of the 1e-8 beside a variance above 0.01


@examples
@given(rows(1))
def test_unit_variance_keeps_the_mean(case):
    x, mask = case
    before, spread = reference.moments(x.tolist(), mask.tolist())
    assume(spread > 0.01)
    mean, variance = reference.moments(unit_variance(x, mask).tolist(), mask.tolist())
    assert abs(mean - before) < 1e-9
    assert abs(variance - 1) < 1e-5


@examples
@given(rows(1), floats(0.5, 4), floats(-5, 5))
def test_whitening_forgets_scale_and_shift(case, scale, shift):
    x, mask = case
    assume(reference.moments(x.tolist(), mask.tolist())[1] > 0.1)
    assert_close(whiten(scale * x + shift, mask), whiten(x, mask), atol=1e-6)


@examples
@given(rows(1), st.one_of(st.none(), floats(0.5, 9)))
def test_masked_mean_agrees_with_the_reference(case, count):
    x, mask = case
    assert_close(masked_mean(x, mask, count=count), reference.masked_mean(x.tolist(), mask.tolist(), count))


@examples
@given(rows(1))
def test_moments_whiten_and_unit_variance_agree_with_the_reference(case):
    x, mask = case
    lists = x.tolist(), mask.tolist()
    mean, variance, count = masked_moments(x, mask)
    assert_close(mean, reference.moments(*lists)[0])
    assert_close(variance, reference.moments(*lists)[1])
    assert count == len(reference.decisions(*lists))
    # Next to the 1e-8 under the root, a rounding error of equal numbers is magnified 10⁴ times.
    assert_close(whiten(x, mask), reference.whiten(*lists), atol=1e-9)
    assert_close(unit_variance(x, mask), reference.unit_variance(*lists), atol=1e-9)


@examples
@given(rows(2))
def test_explained_variance_agrees_with_the_reference(case):
    values, returns, mask = case
    assume(reference.moments(returns.tolist(), mask.tolist())[1] > 0.01)
    expected = reference.explained_variance(values.tolist(), returns.tolist(), mask.tolist())
    assert_close(explained_variance(values, returns, mask), expected)


def test_explained_variance_by_hand():
    # Returns 0, 2, 4: variance (4 + 0 + 4)/3 = 8/3. Errors 0, 1, 0 less their mean 1/3: (1/9 + 4/9 + 1/9)/3 = 2/9.
    # 1 − (2/9)/(8/3) = 1 − 1/12 = 11/12.
    mask = torch.tensor([[True, True, True, False]])
    assert_close(explained_variance(rows_of([0, 1, 4, 5]), rows_of([0, 2, 4, -5]), mask), 11 / 12)


def test_perfect_values_explain_all_and_constant_ones_nothing():
    _, returns, mask = random_rows(2)
    assert explained_variance(returns, returns, mask).item() == 1
    assert_close(explained_variance(torch.full_like(returns, 3.0), returns, mask), 0.0)


@pytest.mark.parametrize("constant", [0.0, 2.0, 0.1])
def test_explained_variance_of_returns_that_do_not_vary_is_zero(constant):
    # The float32 mean of seven 0.1 is not 0.1: what is left of their variance is rounding, not something to explain.
    returns = torch.full((1, 7), constant)
    assert explained_variance(torch.arange(7.0)[None], returns, torch.ones(1, 7, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize("name", STATISTICS)
def test_nan_in_masked_slots_changes_neither_values_nor_gradients(name):
    x, mask = random_rows(1)
    assert_masked_slots_do_not_matter(STATISTICS[name], (x,), mask)


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_pass_gradcheck(name):
    x, mask = random_rows(1, shape=(2, 3))
    assert gradcheck(lambda x: STATISTICS[name](x, mask), leaf(x))


@examples
@given(rows(1), st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_uneven_micro_batches_with_the_count_sum_to_the_whole(case, sizes):
    x, mask = case
    whole, pieces = leaf(x), leaf(x)
    masked_mean(whole, mask).backward()
    total, start = torch.zeros((), dtype=torch.float64), 0
    for size in [*sizes, len(x)]:
        part = slice(start, start + size)
        total = total + masked_mean(pieces[part], mask[part], count=mask.sum())
        start += size
    total.backward()
    assert_close(total, masked_mean(x, mask))
    assert_close(pieces.grad, whole.grad)


def test_the_mean_of_micro_batch_means_is_not_the_mean():
    # Four decisions of loss 1 and one of loss 5: the mean is 9/5; the mean of the two means would be 3.
    x, mask = rows_of([1, 1, 1, 1], [5, 0, 0, 0]), torch.tensor([[True] * 4, [True, False, False, False]])
    split = sum(masked_mean(x[row], mask[row], count=mask.sum()) for row in (slice(0, 1), slice(1, 2)))
    assert_close(split, 9 / 5)


@pytest.mark.parametrize("function", [whiten, unit_variance])
@pytest.mark.parametrize("splits", [(1, 3), (2, 2), (3, 1)])
def test_several_processes_normalise_like_one(function, splits):
    x, mask = random_rows(1, shape=(4, 5))
    mask[3] = False  # the last process of (3, 1) has no decision at all
    x_of, mask_of = x.split(splits), mask.split(splits)
    results = as_processes(
        lambda rank, sum_across: function(x_of[rank], mask_of[rank], sum_across=sum_across), len(splits)
    )
    assert_close(torch.cat(results), function(x, mask))


def test_several_processes_see_the_same_explained_variance_as_one():
    values, returns, mask = random_rows(2, shape=(4, 5))
    results = as_processes(
        lambda rank, sum_across: explained_variance(
            values[rank::2], returns[rank::2], mask[rank::2], sum_across=sum_across
        ),
        2,
    )
    for result in results:
        assert_close(result, explained_variance(values, returns, mask))


@examples
@given(tensors(2, 4), st.integers(1, 4))
def test_padding_columns_change_no_statistic(x, num):
    mask = torch.ones(x.shape, dtype=torch.bool)
    padded = torch.cat([x, torch.full((2, num), torch.nan)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros(2, num, dtype=torch.bool)], dim=1)
    assert_close(masked_mean(padded, padded_mask), masked_mean(x, mask))
    assert_close(whiten(padded, padded_mask)[:, :4], whiten(x, mask), atol=1e-9)


@pytest.mark.parametrize("size", [0, 1, 3, 7])
def test_merged_moments_are_those_of_both_batches_together(size):
    x = torch.tensor([1e4, 1e4 + 1, 1e4 - 3, 1e4 + 2, 1e4, 1e4 + 5, 1e4 - 1], dtype=torch.float64)
    whole = torch.ones(7, dtype=torch.bool)
    first = torch.arange(7) < size
    merged = merged_moments(masked_moments(x, first), masked_moments(x, ~first))
    for found, expected in zip(merged, masked_moments(x, whole), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9)
