"""The gold reward of the embedded task: what the simulated annotators really want, known exactly."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ppo_rlhf.toy import grammar, lexicon
from ppo_rlhf.toy.grammar import Clause

SENTIMENT_SCALE = 2.0
GRAMMAR_CHARGE = 1.5  # for a review in which every word stands in a broken clause
REPEATED_WORD_CHARGE = 0.25
REPEATED_BIGRAM_CHARGE = 0.15
REPEATED_CLAUSE_CHARGE = 0.5
LENGTH_CHARGE = 0.1
SHORTEST, LONGEST = 12, 38
ENDING_CHARGE = 0.5
OFF_TOPIC_CHARGE = 0.3
LOWEST = -6.0

_GENRES = frozenset(lexicon.GENRES)


def sentiment(clauses: Sequence[Clause]) -> float:
    """Mean sentiment of the clauses, weighted by their place in the sentence; broken clauses count 0."""
    total = sum(clause.weight for clause in clauses)
    return sum(clause.weight * clause.sentiment for clause in clauses) / total if total else 0.0


def broken_share(clauses: Sequence[Clause]) -> float:
    """Share of the review's words that stand in broken clauses. An empty sentence counts as one broken word."""
    sizes = [max(1, len(clause.words)) for clause in clauses]
    broken = sum(size for size, clause in zip(sizes, clauses, strict=True) if not clause.grammatical)
    return broken / sum(sizes) if sizes else 0.0


def repetition_charge(words: Sequence[str], clauses: Sequence[Clause]) -> float:
    """Every occurrence after the first is charged: of a content word, of a bigram with one, of a clause."""
    content = [word for word in words if word not in lexicon.FUNCTION_WORDS]
    function = lexicon.FUNCTION_WORDS
    bigrams = [pair for pair in pairwise(words) if pair[0] not in function or pair[1] not in function]
    return (
        REPEATED_WORD_CHARGE * (len(content) - len(set(content)))
        + REPEATED_BIGRAM_CHARGE * (len(bigrams) - len(set(bigrams)))
        + REPEATED_CLAUSE_CHARGE * (len(clauses) - len({clause.words for clause in clauses}))
    )


def length_charge(num_words: int) -> float:
    """LENGTH_CHARGE for each word below SHORTEST or above LONGEST."""
    return LENGTH_CHARGE * max(0, SHORTEST - num_words, num_words - LONGEST)


def off_topic_charge(prompt: str, words: Sequence[str]) -> float:
    """OFF_TOPIC_CHARGE for each genre that the review names and the prompt does not, if the prompt names one."""
    asked = _GENRES.intersection(grammar.tokens_of(prompt))
    return OFF_TOPIC_CHARGE * len(_GENRES.intersection(words) - asked) if asked else 0.0


def _gold(prompt: str, response: str) -> float:
    tokens = grammar.tokens_of(response)
    words = [token for token in tokens if grammar.is_word(token)]
    if not words:
        return LOWEST
    clauses = grammar.read(tokens)
    reward = (
        SENTIMENT_SCALE * sentiment(clauses)
        - GRAMMAR_CHARGE * broken_share(clauses)
        - repetition_charge(words, clauses)
        - length_charge(len(words))
        - off_topic_charge(prompt, words)
        - (0.0 if tokens[-1] in grammar.SENTENCE_ENDS else ENDING_CHARGE)
    )
    return max(LOWEST, reward)


def gold(prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
    """The true reward of each response: a reading of its clauses, not a count of its words.

        gold = 2 · sentiment − 1.5 · broken − repetition − length − topic − ending        (never below −6)

        sentiment   mean over the clauses, weighted by contrast: in "X but Y" and "although X , Y" X weighs 0.6 and Y
                    1.4; sentences opened by "overall ," and the like weigh 1.5 times as much, a verdict that opens
                    the review 4 times (`grammar.SKELETONS`).
                    A clause: value of its opinion (0.4 to 1, signed) × degree ("slightly" 0.5 … "utterly" 1.6)
                    × adjunct ("at times" 0.7 … "throughout" 1.2) × −1/2 if negated (`grammar.sentiment_of`)
        broken      share of the words that stand in clauses which the grammar does not derive: wrong word order,
                    "the jokes is", "a awful film", unknown words. Such clauses have no sentiment either
        repetition  0.25 for each repeated content word, 0.15 for each repeated bigram that has one, 0.5 for each
                    repeated clause
        length      0.1 for each word below 12 or above 38
        topic       0.3 for each genre named that is not the prompt's
        ending      0.5 where the last mark is not "." or "!"

    A response without a word scores −6. Any text has a finite score; other columns of the data set are ignored.
    """
    return [_gold(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
