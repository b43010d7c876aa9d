"""Means over runs and their intervals, against numbers worked by hand and the bootstrap's own definition."""

import itertools

import numpy as np
import pytest

from ppo_rlhf.statistics import difference, estimate, interquartile_mean, mean_and_interval


def test_the_interquartile_mean_leaves_a_quarter_out_at_either_end():
    assert interquartile_mean(np.array([100.0, 2, 3, -50, 4, 5, 6, 8])) == (3 + 4 + 5 + 6) / 4


def test_of_five_runs_the_interquartile_mean_leaves_out_the_best_and_the_worst():
    assert interquartile_mean(np.array([[1.0, 2, 3, 4, 1000], [0, 0, 6, 9, 9]])) == pytest.approx([3, 5])


def test_the_t_interval_is_that_of_the_mean():
    values = np.array([[1.0, 10.0], [2.0, 10.0], [6.0, 10.0]])
    mean, half = mean_and_interval(values)
    assert mean == pytest.approx([3.0, 10.0])
    assert half == pytest.approx([4.302653 * np.sqrt(7 / 3), 0.0])  # t(2) · s / √3, s² = (4 + 1 + 9) / 2


def test_one_seed_has_no_t_interval():
    mean, half = mean_and_interval(np.array([[1.0, 2.0]]))
    assert mean.tolist() == [1.0, 2.0]
    assert np.isnan(half).all()


def test_an_estimate_is_of_all_runs_of_all_strata_together():
    assert estimate([[0.0, 1.0], [5.0, 6.0, 8.0]]).value == 4
    assert estimate([[0.0, 1.0], [5.0, 6.0, 1000.0]], interquartile_mean).value == 4  # of 1, 5, 6


def test_the_interval_of_two_runs_is_that_of_their_four_equally_likely_resamples():
    # (0, 0), (0, 1), (1, 0), (1, 1): means 0, ½, ½, 1, each end with probability ¼ > 2.5 %
    assert (estimate([[0.0, 1.0]]).low, estimate([[0.0, 1.0]]).high) == (0, 1)


def test_the_interval_is_between_the_quantiles_of_all_resamples():
    runs = np.array([0.0, 1, 3, 4, 9])
    means = [np.mean(drawn) for drawn in itertools.product(runs, repeat=5)]
    found = estimate([runs])
    assert [found.low, found.high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.21)  # a step is 0.2


def test_seeds_are_drawn_again_within_their_stratum_alone():
    # Between the two environments lies a gap, which would widen the interval if runs were drawn from both together.
    found = estimate([[0.0, 0.0, 0.0], [10.0, 10.0, 10.0]])
    assert (found.value, found.low, found.high) == (5, 5, 5)


def test_one_seed_alone_has_no_interval():
    found = estimate([[3.0], [4.0, 6.0]])
    assert (found.low, found.high) == (None, None)
    assert found.value == pytest.approx(13 / 3)


def test_a_difference_is_of_both_statistics_and_both_are_drawn_again():
    found = difference([[1.0, 2.0], [5.0, 6.0]], [[1.0, 1.0], [2.0, 4.0]])
    assert found.value == 1.5
    # Four times the difference is 12 + a binomial number of 4 less 6 + twice one of 2: 2 with probability 1/64, less
    # than 2.5 %, up to 3 with 5/64, more; and above likewise.
    assert (found.low, found.high) == (3 / 4, 9 / 4)
    assert difference([[1.0], [2.0]], [[0.0], [0.0]]).low is None


def test_the_same_scores_have_the_same_interval():
    runs = [[0.3, 1.2, 2.2, 0.1], [1.0, 1.4, 0.2, 5.0]]
    assert estimate(runs, interquartile_mean) == estimate(runs, interquartile_mean)


def test_an_estimate_reads_as_its_value_and_its_interval():
    assert str(estimate([[0.0, 1.0]])) == "0.50 [0.00, 1.00]"
    assert str(estimate([[0.25]])) == "0.25"
