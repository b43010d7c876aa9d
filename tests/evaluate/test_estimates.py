"""Intervals: that they cover as often as they say, and that responses to one prompt belong together."""

import math

import pytest
import torch

from ppo_rlhf.errors import UserError
from ppo_rlhf.evaluate.estimates import distinct_estimate, mean_estimate, perplexity_estimate, share_estimate
from ppo_rlhf.evaluate.win_rates import wins_by_judge, wins_by_score
from ppo_rlhf.measures import NUM_NGRAMS


def clustered(generator, prompts, samples):
    """Scores of mean 0: half of the variance is the prompt's, half the response's."""
    return torch.randn(prompts, 1, generator=generator) + torch.randn(prompts, samples, generator=generator)


def test_the_interval_of_a_mean_covers_it_though_responses_to_a_prompt_are_alike():
    generator = torch.Generator().manual_seed(0)
    found = [mean_estimate(clustered(generator, 60, 8), seed) for seed in range(200)]
    covered = sum(each.low <= 0 <= each.high for each in found)
    assert 0.90 * 200 <= covered <= 0.985 * 200
    apart = [mean_estimate(clustered(generator, 60, 8).reshape(-1, 1), seed) for seed in range(50)]
    assert sum(each.low <= 0 <= each.high for each in apart) < 0.8 * 50  # as if all were independent


def test_the_width_of_the_interval_is_that_of_the_standard_error():
    values = torch.arange(100.0)[:, None]
    found = mean_estimate(values, 0)
    assert found.value == 49.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * 28.866 / 10, rel=0.1)


def test_the_interval_of_the_perplexity_covers_it():
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for seed in range(100):
        tokens = torch.randint(5, 20, (80,), generator=generator)
        losses = torch.stack([(2.0 + torch.randn(int(n), generator=generator)).sum() for n in tokens])
        found = perplexity_estimate(torch.stack([losses, tokens.float()], dim=1), seed)
        covered += found.low <= math.exp(2) <= found.high
    assert covered >= 88


def test_a_perplexity_weighs_tokens_not_texts():
    losses = torch.tensor([[1.0, 1.0], [9.0, 3.0]])
    assert perplexity_estimate(losses, 0).value == pytest.approx(math.exp(10 / 4))


def test_the_interval_of_distinct_n_covers_what_other_texts_of_that_number_have_on_average():
    words, frequencies = [f"w{k}" for k in range(300)], 1 / torch.arange(1.0, 301)
    generator = torch.Generator().manual_seed(2)

    def texts():
        drawn = torch.multinomial(frequencies, 60 * 6, replacement=True, generator=generator).view(60, 6)
        return [" ".join(words[k] for k in row) for row in drawn.tolist()]

    found = [distinct_estimate(texts(), 1) for _ in range(100)]
    mean = sum(each.value for each in found) / 100
    assert sum(each.low <= mean <= each.high for each in found) >= 90


def test_texts_that_distinct_n_does_not_reach_leave_its_interval_alone():
    generator = torch.Generator().manual_seed(4)
    texts = [" ".join(map(str, row)) for row in torch.randint(500, (200, 50), generator=generator).tolist()]
    assert NUM_NGRAMS == 60 * 50
    assert distinct_estimate(texts, 1) == distinct_estimate(texts[:61], 1)


def test_a_share_of_all_still_has_an_interval():
    found = share_estimate([1.0] * 10)
    assert (found.value, found.high) == (1, 1)
    assert 0.7 < found.low < 0.75


def test_same_seed_same_interval():
    values = torch.randn(30, 2, generator=torch.Generator().manual_seed(3))
    assert mean_estimate(values, 5) == mean_estimate(values, 5) != mean_estimate(values, 6)


# ----------------------------------------------------------------------------------------------------- judges


def test_equal_scores_are_half_a_win():
    assert wins_by_score([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]) == [0.0, 0.5, 1.0]


JUDGES = """
def longer(prompts, a, b):
    return ["a" if len(x) > len(y) else "b" if len(x) < len(y) else "tie" for x, y in zip(a, b)]

def first(prompts, a, b):
    return ["a"] * len(prompts)

def half_blind(prompts, a, b):
    return ["a" if x == "good" else "tie" for x in a]

def shouts(prompts, a, b):
    return ["A"] * len(prompts)

def too_few(prompts, a, b):
    return ["a"]

def text(prompts, a, b):
    return "ab"

def raises(prompts, a, b):
    raise ValueError("no opinion")
"""
PAIRS = (["p", "q"], ["good", "x"], ["bad", "longest"])


@pytest.fixture
def judges(tmp_path):
    (tmp_path / "judges.py").write_text(JUDGES)


@pytest.mark.parametrize(
    ("judge", "wins"), [("longer", [1.0, 0.0]), ("first", [0.5, 0.5]), ("half_blind", [0.75, 0.5])]
)
def test_a_judge_is_asked_in_both_orders(judges, judge, wins):
    assert wins_by_judge(f"judges.py:{judge}", *PAIRS) == wins


@pytest.mark.parametrize(
    ("judge", "named"),
    [("shouts", "'A'"), ("too_few", "2 prompts"), ("text", "2 prompts"), ("raises", "no opinion")],
)
def test_a_judge_that_answers_otherwise_is_named(judges, judge, named):
    with pytest.raises(UserError, match=named) as raised:
        wins_by_judge(f"judges.py:{judge}", *PAIRS)
    assert f"judges.py:{judge}" in str(raised.value)
