"""Simulated annotators follow the gold reward and disagree about as often as people do."""

import random

import pytest

from ppo_rlhf import toy
from ppo_rlhf.pipeline import disagreement


@pytest.fixture(scope="module")
def pairs(demonstrations):
    """Prompts with two independent demonstrations each."""
    generator = random.Random(7)
    prompts = [row["prompt"] for row in demonstrations[:2000]]
    completions = [row["completion"] for row in demonstrations[:2000]]
    return prompts, [[completion, generator.choice(completions)] for completion in completions]


@pytest.fixture(scope="module")
def rows(pairs):
    return toy.annotate(*pairs, seed=0)


def test_every_pair_is_judged_and_every_fourth_by_two_different_annotators(pairs, rows):
    assert len(rows) == len(pairs[0]) * 5 // 4
    for number, start in enumerate(range(0, len(rows), 5)):
        first, second, *alone = rows[start : start + 5]
        assert first["annotator"] != second["annotator"]
        expected = [pairs[1][4 * number + offset] for offset in (0, 0, 1, 2, 3)]
        for row, pair in zip((first, second, *alone), expected, strict=True):
            assert {row["chosen"], row["rejected"]} == set(pair)
    assert len({row["annotator"] for row in rows}) == 3


def test_annotators_disagree_on_10_to_25_percent_of_the_pairs(rows):
    assert 0.10 < disagreement(rows) < 0.25


def test_a_response_better_by_two_is_chosen_more_than_nine_times_in_ten(rows):
    prompts = [row["prompt"] for row in rows]
    chosen = toy.gold(prompts, [row["chosen"] for row in rows])
    rejected = toy.gold(prompts, [row["rejected"] for row in rows])
    clear = [better > worse for better, worse in zip(chosen, rejected, strict=True) if abs(better - worse) >= 2]
    assert len(clear) > 200
    assert sum(clear) / len(clear) > 0.9


def test_the_seed_decides_the_judgements(pairs, rows):
    assert toy.annotate(*pairs, seed=0) == rows
    assert toy.annotate(*pairs, seed=1) != rows


def test_disagreement_counts_doubly_judged_pairs_in_any_order():
    def judged(prompt, chosen, rejected):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    rows = [
        judged("p", "a", "b"),
        judged("q", "a", "b"),
        judged("p", "b", "a"),  # differs
        judged("q", "a", "b"),  # agrees
        judged("r", "a", "b"),  # judged once
        judged("s", "a", "a"),  # nothing to choose between
        judged("s", "a", "a"),
    ]
    assert disagreement(rows) == 0.5
    assert disagreement([]) is None
