"""Distinct runs of words, and the best of n, against counting by hand and over all subsets."""

import itertools
import math

import pytest
import torch

from ppo_rlhf.measures import best_of_n, best_of_n_kl, distinct_n


def test_distinct_2_is_the_share_of_different_word_pairs():
    assert distinct_n(["a b a b", "a b"], 2) == pytest.approx(2 / 4)  # ab ba ab | ab
    assert distinct_n(["a", "", "b"], 2) == 0
    assert distinct_n(["a b c d"], 2) == 1
    assert distinct_n(["a b a b"], 2, num_ngrams=2) == 1  # ab ba
    assert distinct_n(["a", "b"], 2) == 0  # no pair reaches over two texts


def test_distinct_1_and_3_count_words_and_triples():
    texts = ["a b a b", "a b a"]
    assert distinct_n(texts, 1) == pytest.approx(2 / 7)
    assert distinct_n(texts, 3) == pytest.approx(2 / 3)  # aba bab | aba


def over_all_subsets(scores, values, n):
    """The mean value of the best by its score, of those that score alike the mean, over all subsets of n."""
    means = []
    for subset in itertools.combinations(range(len(scores)), n):
        best = max(scores[i] for i in subset)
        equal = [values[i] for i in subset if scores[i] == best]
        means.append(sum(equal) / len(equal))
    return sum(means) / len(means)


@pytest.mark.parametrize("n", range(1, 8))
@pytest.mark.parametrize("levels", [1, 3, 100])
def test_best_of_n_is_the_mean_over_all_subsets_also_with_ties(n, levels):
    generator = torch.Generator().manual_seed(10 * n + levels)
    scores = torch.randint(levels, (4, 7), generator=generator).double()
    gold = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    for values in (scores, gold):
        expected = [over_all_subsets(*rows, n) for rows in zip(scores.tolist(), values.tolist(), strict=True)]
        assert best_of_n(scores, values, n).tolist() == pytest.approx(expected)


def test_best_of_one_is_the_mean_and_best_of_all_is_the_best():
    scores, gold = torch.tensor([[1.0, 5.0, 3.0]]), torch.tensor([[10.0, -2.0, 4.0]])
    assert best_of_n(scores, gold, 1).item() == pytest.approx(4.0)
    assert best_of_n(scores, gold, 2).item() == pytest.approx((-2 - 2 + 4) / 3)  # 1|5, 5|3, 1|3
    assert best_of_n(scores, gold, 3).item() == -2.0


def test_the_kl_of_the_best_of_n_is_that_of_a_density_of_n_times_the_rank_to_the_n_minus_1():
    assert best_of_n_kl(1) == 0
    for n in (2, 4, 16):
        ranks = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
        density = n * ranks ** (n - 1)
        assert best_of_n_kl(n) == pytest.approx(float((density * density.log()).mean()), abs=1e-4)
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5)
