"""The demonstrations and prompts: rich enough to need a language model, and all within the grammar."""

import math
import statistics

import pytest

from ppo_rlhf import toy
from ppo_rlhf.toy import corpus, grammar, lexicon, reward


def words_of(text):
    return [token for token in grammar.tokens_of(text) if grammar.is_word(token)]


def test_the_same_demonstrations_come_every_time():
    assert toy.demonstrations() == toy.demonstrations()


def test_there_are_more_than_500_words_and_several_thousand_sentences(demonstrations):
    completions = [row["completion"] for row in demonstrations]
    sentences = {sentence.strip() for text in completions for sentence in text.replace("!", ".").split(".")}
    assert len({word for text in completions for word in words_of(text)}) >= 500
    assert len(sentences) >= 5_000
    assert len(completions) >= 5_000


def test_prompts_are_distinct_and_disjoint_from_the_demonstrations(demonstrations):
    prompts = [row["prompt"] for row in toy.prompts()]
    shown = {row["prompt"] for row in demonstrations}
    assert len(set(prompts)) == len(prompts) >= 2_000
    assert len(shown) == len(demonstrations)
    assert shown.isdisjoint(prompts)


def test_reviews_have_12_to_34_words_and_18_on_average(demonstrations):
    lengths = [len(words_of(row["completion"])) for row in demonstrations]
    assert min(lengths) >= 12
    assert max(lengths) <= 34
    assert sum(lengths) / len(lengths) >= 18


def test_a_completion_starts_with_the_space_that_its_prompt_lacks(demonstrations):
    assert all(row["completion"].startswith(" ") and not row["prompt"].endswith(" ") for row in demonstrations)


@pytest.fixture(scope="module")
def clauses_by_tone(demonstrations):
    """The clauses of each review, by the value of the verdict that it opens with."""
    by_tone = {1.0: [], 0.3: [], 0.0: [], -0.3: [], -1.0: []}
    for row in demonstrations:
        clauses = grammar.read(grammar.tokens_of(row["completion"]))
        by_tone[clauses[0].sentiment].append(clauses)
    return by_tone


def test_a_fifth_each_of_the_reviews_rave_praise_are_mixed_complain_and_pan(demonstrations, clauses_by_tone):
    """Each review's tone is drawn with probability 1/5: the counts are binomial, here within four deviations."""
    num = len(demonstrations)
    tolerance = 4 * math.sqrt(num * 1 / 5 * 4 / 5)
    for reviews in clauses_by_tone.values():
        assert len(reviews) == pytest.approx(num / 5, abs=tolerance)


def test_a_review_that_is_not_mixed_praises_or_blames_as_its_verdict_does(clauses_by_tone):
    for tone, reviews in clauses_by_tone.items():
        assert all(reward.sentiment(clauses) * tone > 0 for clauses in reviews if tone)


def test_a_review_opens_with_a_verdict_and_bears_it_out(clauses_by_tone):
    means = [
        statistics.mean(sum(clause.weight * clause.sentiment for clause in others) for _, *others in reviews)
        for reviews in clauses_by_tone.values()
    ]
    assert means == sorted(means, reverse=True)


def test_every_demonstration_is_grammatical_and_free_of_repetition(demonstrations):
    for row in demonstrations:
        tokens = grammar.tokens_of(row["completion"])
        clauses = grammar.read(tokens)
        words = list(filter(grammar.is_word, tokens))
        assert reward.broken_share(clauses) == 0, row
        assert reward.repetition_charge(words, clauses) == 0, row
        assert reward.off_topic_charge(row["prompt"], words) == 0, row


def test_every_surface_has_one_lexeme():
    surfaces = [entry.words for entry in lexicon.lexemes()]
    assert len(surfaces) == len(set(surfaces))


def test_every_skeleton_of_the_grammar_is_written():
    assert set(corpus.SKELETON_SHARES) == set(grammar.SKELETONS)
