"""Agreement, bias and strengths, against published and hand-worked numbers."""

import math
from collections import Counter

import pytest
from sklearn.metrics import cohen_kappa_score

from ppo_rlhf.intervals import wilson
from ppo_rlhf.preferences import Choice, Pair, statistics_of, win_rate
from ppo_rlhf.preferences.statistics import bradley_terry, cohen_kappa, fleiss_kappa, left_share, ranked_sources


def choice(number, annotator, result, ranks=None, *, sources=(), seconds=None):
    ranks = ranks or {"left": [1, 2], "right": [2, 1], "tie": [1, 1], "both bad": [1, 1], "skip": None}[result]
    pair = Pair(f"prompt {number}", ["a", "b", "c"][: len(ranks or "ab")], list(sources))
    return Choice(pair, annotator, result, ranks, shown=[0, 1], seconds=seconds)


def test_cohen_s_kappa_of_the_textbook_table():
    # 50 proposals, both say yes 20, both no 15, 5 and 10 apart: p_o = 0.7, p_e = 0.5, κ = 0.4
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)


def test_cohen_s_kappa_is_that_of_scikit_learn():
    first, second = [1, 2, 3, 1, 2, 2, 3, 1, 1], [1, 2, 1, 1, 3, 2, 3, 2, 1]
    assert cohen_kappa(first, second) == pytest.approx(cohen_kappa_score(first, second))


def test_kappa_says_nothing_where_there_is_one_category():
    assert cohen_kappa(["a", "a"], ["a", "a"]) is None
    assert fleiss_kappa([{"a": 2}, {"a": 3}]) is None


def test_fleiss_kappa_of_the_published_example():
    # ten subjects, fourteen raters, five categories: κ = 0.210
    table = [
        (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
        (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
    ]  # fmt: skip
    assert fleiss_kappa([dict(enumerate(row)) for row in table]) == pytest.approx(0.210, abs=5e-4)


def test_fleiss_kappa_leaves_out_what_one_alone_judged():
    assert fleiss_kappa([{"a": 1}, {"b": 1}]) is None
    assert fleiss_kappa([{"a": 2}, {"b": 2}, {"a": 1}]) == fleiss_kappa([{"a": 2}, {"b": 2}]) == 1.0


def test_bradley_terry_strengths_of_the_american_league_of_1987():
    # Agresti, Categorical Data Analysis (2002), table 10.10; strengths as R's BradleyTerry2 prints them
    teams = ("Milwaukee", "Detroit", "Toronto", "New York", "Boston", "Cleveland", "Baltimore")
    won = [
        (0, 7, 9, 7, 7, 9, 11), (6, 0, 7, 5, 11, 9, 9), (4, 6, 0, 7, 7, 8, 12), (6, 8, 6, 0, 6, 7, 10),
        (6, 2, 6, 7, 0, 7, 12), (4, 4, 5, 6, 6, 0, 6), (2, 4, 1, 3, 1, 7, 0),
    ]  # fmt: skip
    wins = {(a, b): won[i][j] for i, a in enumerate(teams) for j, b in enumerate(teams) if a != b}
    strengths = bradley_terry(wins)
    published = dict(zip(teams, (1.5814, 1.4364, 1.2945, 1.2476, 1.1077, 0.6839, 0.0), strict=True))
    against_baltimore = {team: strengths[team] - strengths["Baltimore"] for team in teams}
    assert against_baltimore == pytest.approx(published, abs=6e-5)
    assert sum(strengths.values()) == pytest.approx(0, abs=1e-9)


def test_two_sources_differ_by_the_log_odds_of_their_wins():
    strengths = bradley_terry({("a", "b"): 6, ("b", "a"): 2})
    assert strengths["a"] - strengths["b"] == pytest.approx(math.log(3))


def test_a_source_that_always_wins_has_a_finite_strength():
    choices = [choice(i, "ada", "left", sources=("new", "old")) for i in range(20)]
    first, second = ranked_sources(choices)
    assert (first.source, first.wins, first.comparisons) == ("new", 20, 20)
    assert math.isfinite(first.strength)
    assert first.strength > 1 > -1 > second.strength


def test_a_ranking_counts_as_all_of_its_pairs():
    ranked = choice(0, "ada", "ranking", [2, 1, 2], sources=("x", "y", "z"))
    found = {each.source: (each.wins, each.comparisons) for each in ranked_sources([ranked])}
    assert found == {"y": (2, 2), "x": (0.5, 2), "z": (0.5, 2)}


def test_one_source_alone_is_not_ranked():
    assert ranked_sources([choice(0, "ada", "left", sources=("x", "x")), choice(1, "ada", "left")]) == []


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],  # Newcombe (1998), table I
)
def test_wilson_s_interval(successes, count, low, high):
    share = wilson(successes, count)
    assert (share.low, share.high) == pytest.approx((low, high), abs=5e-5)
    assert share.share == successes / count


def test_left_bias_is_a_share_of_the_choices_of_a_side():
    choices = [choice(i, "ada", result) for i, result in enumerate(["left"] * 3 + ["right"] + ["tie", "skip"])]
    assert (left_share(choices).share, left_share(choices).count) == (0.75, 4)
    assert left_share(choices[-2:]) is None


def test_the_statistics_of_two_annotators():
    results = {"ada": ["left", "left", "right", "tie"], "ben": ["left", "right", "right", "both bad"]}
    choices = [choice(i, name, r, seconds=i + 1.0) for name, line in results.items() for i, r in enumerate(line)]
    found = statistics_of(choices)
    assert (found.pairs, found.choices, found.seconds) == (4, 8, 2.5)
    assert [(each.name, each.choices) for each in found.annotators] == [("ada", 4), ("ben", 4)]
    (agreement,) = found.agreements
    # p_o = 2/4; p_e = (2·1 + 1·2) / 16: a tie is not "both bad"
    assert (agreement.pairs, agreement.observed) == (4, 0.5)
    assert agreement.kappa == pytest.approx((0.5 - 0.25) / 0.75)
    assert found.results == Counter(left=3, right=3, tie=1, **{"both bad": 1})


def test_there_are_statistics_of_nothing():
    found = statistics_of([])
    assert (found.choices, found.fleiss_kappa, found.left, found.sources) == (0, None, None, [])


def test_the_win_rate_is_over_pairs_and_a_tie_is_half_a_win():
    told = [(0, "ada", "left"), (0, "ben", "right"), (1, "ada", "left"), (2, "ada", "tie"), (3, "ada", "skip")]
    choices = [choice(*each, sources=("new", "old")) for each in told]
    rate = win_rate(choices, "new", "old")
    assert (rate.share, rate.count) == (pytest.approx((0.5 + 1 + 0.5) / 3), 3)
    assert win_rate(choices, "old", "new").share == pytest.approx(1 - rate.share)
    assert win_rate(choices, "new", "other") is None
