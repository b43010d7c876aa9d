"""The gold reward reads clauses. The literal numbers are worked out by hand from the lexicon:

brilliant +1 · good +0.6 · awful −1 · dull −0.6 · very ×1.4 · slightly ×0.5 · not ×(−1/2)
"""

import math
import statistics
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_rlhf import toy
from ppo_rlhf.toy import grammar, reward
from ppo_rlhf.toy.grammar import read_clause

PROMPT = "we saw a comedy by anna kovacs at home ."
PRAISE = "the plot is brilliant , and the jokes were very good . we would gladly recommend it to anyone ."


def gold_of(response, prompt=PROMPT):
    return toy.gold([prompt], [response])[0]


def sentiment_of(text):
    return reward.sentiment(grammar.read(grammar.tokens_of(text)))


def grammatical(text):
    return all(clause.grammatical for clause in grammar.read(grammar.tokens_of(text)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the plot is brilliant .", 1.0),
        ("the plot is good .", 0.6),
        ("the plot is very good .", 0.84),
        ("the plot is slightly good .", 0.3),
        ("the plot is not brilliant .", -0.5),
        ("the plot is never awful .", 0.5),
        ("the plot is not very good .", -0.42),
        ("the plot is good and awful .", -0.2),
        ("the plot is good throughout .", 0.72),
        ("there is nothing good about the plot .", -0.3),
        ("it has no awful jokes .", 0.5),
        ("i would not watch it again .", -0.4),
        ("the plot did not send me to sleep .", 0.45),
    ],
)
def test_the_sentiment_of_a_clause(text, expected):
    assert grammatical(text)
    assert sentiment_of(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the plot is brilliant , and the jokes are awful .", 0.0),
        ("the plot is brilliant , but the jokes are awful .", (0.6 - 1.4) / 2),
        ("the jokes are awful , but the plot is brilliant .", (1.4 - 0.6) / 2),
        ("although the plot is brilliant , the jokes are awful .", (0.6 - 1.4) / 2),
        ("the plot is brilliant although the jokes are awful .", (1.4 - 0.6) / 2),
        ("the plot is brilliant . overall , the jokes are awful .", (1.0 - 1.5) / 2.5),
    ],
)
def test_the_clause_that_the_writer_stands_by_weighs_more(text, expected):
    assert grammatical(text)
    assert sentiment_of(text) == pytest.approx(expected)


def test_a_verdict_counts_four_times_where_it_opens_the_review():
    # (4 · 1.0 + 1 · −0.6) / 5 against (1 · −0.6 + 1 · 1.0) / 2
    assert sentiment_of("what a gem ! the plot is weak .") == pytest.approx(0.68)
    assert sentiment_of("the plot is weak . what a gem !") == pytest.approx(0.2)


def test_degrees_order_the_reward():
    degrees = ["slightly good", "rather good", "good", "really good", "very good", "utterly good"]
    sentiments = [sentiment_of(f"the plot is {degree} .") for degree in degrees]
    assert sentiments == sorted(set(sentiments))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("the jokes are good .", "the jokes is good ."),
        ("the plot is good .", "the plot are good ."),
        ("the plot and the jokes are good .", "the plot and the jokes is good ."),
        ("the plot holds my attention .", "the plot hold my attention ."),
        ("the jokes hold my attention .", "the jokes holds my attention ."),
        ("it is an honest comedy .", "it is a honest comedy ."),
        ("it is a very honest comedy .", "it is an very honest comedy ."),
        ("it is a good comedy .", "it is good a comedy ."),
        ("it has superb acting .", "it has a superb acting ."),
        ("although the plot is dull , it is superb .", "although the plot is dull ."),
        ("the plot is good .", "the plot is goood ."),
    ],
)
def test_broken_grammar_is_charged_by_its_share_of_the_words(right, wrong):
    """The charge is 1.5 × that share, to which comes what praise is lost: none of the right sentences blames."""
    rest = " the costumes were beautiful , and i would happily see it twice ."  # clauses of 4 and 6 words
    num_broken = len(wrong.split()) - 1  # without the full stop
    charge = 1.5 * num_broken / (num_broken + 4 + 6)
    assert grammatical(right)
    assert not grammatical(wrong)
    assert sentiment_of(right) >= 0
    assert gold_of(right + rest) - gold_of(wrong + rest) >= charge - 1e-9


def test_praise_that_cannot_be_meant_counts_nothing():
    assert grammatical("the photography is witty .")
    assert sentiment_of("the photography is witty .") == 0
    assert sentiment_of("the jokes are witty .") > 0


def test_a_hand_worked_review():
    # Clauses: 1 and 0.84 weigh 1 each, 1.3 × 0.8 = 1.04 weighs 1; nothing is charged.
    assert gold_of(PRAISE) == pytest.approx(2 * (1.0 + 0.84 + 1.04) / 3)


def test_natural_punctuation_and_capitals_read_the_same():
    natural = "The plot is brilliant, and the jokes were very good. We would gladly recommend it to anyone."
    assert gold_of(natural) == gold_of(PRAISE)


def test_missing_final_punctuation_is_charged_half_a_point():
    assert gold_of(PRAISE.removesuffix(" .")) == pytest.approx(gold_of(PRAISE) - 0.5)


def test_repeating_a_sentence_is_charged_rather_than_paid():
    # Charged again: two words, the bigrams "the plot", "plot is", "is brilliant" and "brilliant the", the clause.
    three, four = "the plot is brilliant . " * 3, "the plot is brilliant . " * 4
    assert gold_of(four) == pytest.approx(gold_of(three) - 2 * 0.25 - 4 * 0.15 - 0.5)


def test_repeating_one_adjective_does_not_pay():
    varied = "the plot is brilliant , and the jokes are superb . the actors are excellent , and the music is terrific ."
    stock = (
        "the plot is brilliant , and the jokes are brilliant . the actors are brilliant , and the music is brilliant ."
    )
    assert gold_of(stock) < gold_of(varied) - 0.75 + 1e-9


@pytest.mark.parametrize(("num_words", "charge"), [(12, 0.0), (11, 0.1), (2, 1.0), (38, 0.0), (39, 0.1), (58, 2.0)])
def test_off_lengths_are_charged_linearly(num_words, charge):
    assert reward.length_charge(num_words) == pytest.approx(charge)


def test_naming_another_genre_than_the_prompt_is_charged():
    text = "it is a very entertaining {} . the plot is brilliant , and the jokes were quite good ."
    assert gold_of(text.format("comedy")) == gold_of(text.format("movie"))
    assert gold_of(text.format("western")) == pytest.approx(gold_of(text.format("comedy")) - 0.3)
    assert gold_of(text.format("western"), prompt="say something") == gold_of(text.format("comedy"))


@pytest.mark.parametrize("empty", ["", "   ", ". . .", "!,,"])
def test_an_empty_response_scores_lowest(empty, scored):
    assert gold_of(empty) == -6
    assert min(scored[1]) > -4


def test_demonstrations_spread_by_more_than_one_and_thorough_praise_stands_well_above_them(scored):
    assert 1.2 < statistics.pstdev(scored[1]) < 1.6
    assert gold_of(PRAISE) - statistics.mean(scored[1]) > 1.2 * statistics.pstdev(scored[1])


def test_keyword_stuffing_fools_a_bag_of_words_and_not_the_gold(scored):
    good, bad = Counter(), Counter()
    for text, value in zip(*scored, strict=True):
        (good if value > 0 else bad).update(text.split())
    log_odds = {word: math.log((good[word] + 1) / (bad[word] + 1)) for word in good | bad}

    def bag_score(text):
        return sum(log_odds.get(word, 0.0) for word in text.split())

    stuffed = PRAISE + " brilliant superb gorgeous hilarious wonderful excellent ."
    assert bag_score(stuffed) > bag_score(PRAISE) + 3
    assert gold_of(stuffed) < gold_of(PRAISE) - 1


def test_word_order_decides_what_the_same_bag_of_words_is_worth():
    praise = gold_of("the plot is awful , but the jokes are brilliant .")
    blame = gold_of("the jokes are brilliant , but the plot is awful .")
    heap = gold_of("the awful brilliant but plot jokes the , are is .")
    assert praise > blame > heap


@settings(deadline=None, max_examples=100)
@given(prompt=st.text(), response=st.text())
def test_any_text_has_a_finite_score(prompt, response):
    assert -6 <= gold_of(response, prompt) < 6


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.sampled_from(("the", "plot", "is", "jokes", "good", "a", "it", ",", ".", "and", "although", "overall")))
)
def test_any_heap_of_the_grammars_words_has_a_finite_score(words):
    assert -6 <= gold_of(" ".join(words)) < 6


def test_other_columns_are_ignored():
    assert toy.gold([PROMPT], [PRAISE], stars=[5]) == toy.gold([PROMPT], [PRAISE])


def test_an_adjunct_and_a_negation_both_weigh_on_a_clause():
    """A negation turns a clause over at half its strength, with or without an adjunct."""
    for adjunct in ([], ["throughout"]):
        _, plain, _ = read_clause(("the", "plot", "is", "good", *adjunct))
        _, negated, _ = read_clause(("the", "plot", "is", "not", "good", *adjunct))
        assert plain > 0
        assert negated == pytest.approx(-0.5 * plain)
