"""The grammar of the embedded task, defined once and used in both directions: to write clauses and to recognise them.

A clause pattern is a row of word classes; `PATTERNS` is the list of all of them. In a pattern

    lower case   the word itself            DEGREE?     may be left out
    UPPER case   a word class               COUNT|MASS  either class
    ASPECT# BE#  agree in number: the pattern stands for its singular and its plural form

A sentence is `[OPENER ,] skeleton (. or !)`, where a skeleton (`SKELETONS`) joins clauses C by commas and connectives
and says how much each clause weighs: after "but", and after an "although" clause, comes what the writer really thinks.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from ppo_rlhf.toy import lexicon
from ppo_rlhf.toy.lexicon import Lexeme

PATTERNS: dict[str, float] = {  # pattern: how often the generator picks it
    "the ASPECT# BE# NOT|NEVER? DEGREE? ADJECTIVE ADJUNCT?": 6.0,
    "the ASPECT# BE# DEGREE? ADJECTIVE and DEGREE? ADJECTIVE ADJUNCT?": 2.0,
    "the ASPECT# LINK# DEGREE? ADJECTIVE ADJUNCT?": 2.0,
    "the COUNT|MASS|PLURAL NEVER? PAST ADJUNCT?": 3.0,
    "the COUNT|MASS THIRD ADJUNCT?": 1.0,
    "the PLURAL BASE ADJUNCT?": 1.0,
    "the COUNT|MASS|PLURAL did NOT BASE": 0.4,
    "the ASPECT# and the COUNT|MASS|PLURAL BE_P NOT? DEGREE? ADJECTIVE ADJUNCT?": 1.5,
    "the GENRE BE_S NOT|NEVER? DEGREE? ADJECTIVE ADJUNCT?": 1.5,
    "the GENRE NEVER? PAST": 1.0,
    "it BE_S NOT|NEVER? DEGREE? ADJECTIVE ADJUNCT?": 1.0,
    "it NEVER? PAST ADJUNCT?": 1.0,
    "it BE_S NOT? ARTICLE DEGREE? ADJECTIVE GENRE": 2.5,
    "it HAVE_S ARTICLE DEGREE? ADJECTIVE COUNT": 1.0,
    "it HAVE_S DEGREE? ADJECTIVE MASS|PLURAL": 1.0,
    "it HAVE_S no ADJECTIVE COUNT|MASS|PLURAL": 0.3,
    "there BE_S nothing ADJECTIVE about the COUNT|MASS|PLURAL": 0.3,
    "nothing about the COUNT|MASS|PLURAL BE_S DEGREE? ADJECTIVE": 0.3,
    "PERSON found the COUNT|MASS|PLURAL DEGREE? ADJECTIVE": 1.5,
    "PERSON did NOT find the COUNT|MASS|PLURAL DEGREE? ADJECTIVE": 0.3,
    "PERSON MODAL WILLING? RECOMMEND": 2.0,
    "PERSON MODAL NOT|NEVER RECOMMEND": 0.4,
}
VERDICT_PATTERNS: dict[str, float] = {  # of a review's first sentence
    "what ARTICLE VERDICT": 2.0,
    "it BE_S ARTICLE VERDICT": 1.0,
    "the GENRE BE_S ARTICLE VERDICT": 1.0,
}
NUMBERS = {"S": {"ASPECT#": "COUNT|MASS", "BE#": "BE_S", "LINK#": "LINK_S"},
           "P": {"ASPECT#": "PLURAL", "BE#": "BE_P", "LINK#": "LINK_P"}}  # fmt: skip

SKELETONS: dict[str, tuple[float, ...]] = {  # skeleton: weight of each clause, 1 on average
    "C": (1.0,),
    "C , and C": (1.0, 1.0),
    "C because C": (1.0, 1.0),
    "C , but C": (0.6, 1.4),
    "C , yet C": (0.6, 1.4),
    "although C , C": (0.6, 1.4),
    "C although C": (1.4, 0.6),
    "while C , C": (0.8, 1.2),
    "C , and C , but C": (0.6, 0.6, 1.8),
    "although C , C because C": (0.6, 1.2, 1.2),
}
VERDICT_WEIGHT = 4.0  # of a verdict that opens a review: it says what the rest bears out
CONNECTIVES = frozenset({"but", "yet", "although", "while", "because"})
SENTENCE_ENDS = frozenset(".!")
CONTRASTS = frozenset({"but", "yet", "although", "while"})


@dataclass(frozen=True)
class Clause:
    """What the recogniser understood of one clause."""

    words: tuple[str, ...]
    weight: float  # share of the reader's attention, see SKELETONS
    grammatical: bool
    sentiment: float  # 0 where the clause is broken or says something that its subject cannot be


def with_numbers(pattern: str) -> list[list[str]]:
    """The slots of a pattern, once for each grammatical number it agrees in."""
    if "#" not in pattern:
        return [pattern.split()]
    return [[words.get(slot, slot) for slot in pattern.split()] for words in NUMBERS.values()]


_ENTRIES = lexicon.by_first_word(lexicon.lexemes())
_OPENERS = lexicon.by_first_word(lexicon.openers())
_CLASS_CODES = {
    category: chr(0x100 + index)
    for index, category in enumerate(sorted({entry.category for group in _ENTRIES.values() for entry in group}))
}


def _slot_regex(slot: str) -> str:
    codes = "".join(_CLASS_CODES[category] for category in slot.removesuffix("?").split("|"))
    return f"[{codes}]" + ("?" if slot.endswith("?") else "")


_CLAUSE = re.compile(
    "|".join(
        "".join(map(_slot_regex, slots))
        for pattern in (*PATTERNS, *VERDICT_PATTERNS)
        for slots in with_numbers(pattern)
    )
)
_TOKEN = re.compile(r"[^\W_]+(?:['-][^\W_]+)*|[^\w\s]|_")


def tokens_of(text: str) -> list[str]:
    """Lower-case words and single punctuation marks: "A good film." and "a good film ." read the same."""
    return _TOKEN.findall(text.lower())


def is_word(token: str) -> bool:
    return token not in SENTENCE_ENDS and token != ","


def article_for(word: str) -> str:
    return "an" if word[0] in "aeiou" or word in lexicon.VOWEL_SOUNDS else "a"


def _longest_match(words: Sequence[str], start: int, table: dict[str, list[Lexeme]] = _ENTRIES) -> Lexeme | None:
    for entry in table.get(words[start], ()):
        if tuple(words[start : start + len(entry.words)]) == entry.words:
            return entry
    return None


def units_of(words: Sequence[str]) -> list[Lexeme] | None:
    """The lexemes that a clause consists of, or None where a word is unknown."""
    units: list[Lexeme] = []
    position = 0
    while position < len(words):
        unit = _longest_match(words, position)
        if unit is None:
            return None
        units.append(unit)
        position += len(unit.words)
    return units


def derivable(units: Sequence[Lexeme]) -> bool:
    """Whether some clause pattern yields these lexemes, and "a" and "an" stand before the right sounds."""
    if not _CLAUSE.fullmatch("".join(_CLASS_CODES[unit.category] for unit in units)):
        return False
    return all(
        unit.words[0] == article_for(following.words[0])
        for unit, following in pairwise(units)
        if unit.category == "ARTICLE"
    )


def sentiment_of(units: Sequence[Lexeme]) -> float:
    """Signed strength of a grammatical clause.

        mean over its opinions of (value × degree)  ×  adjunct  ×  (−1/2 for a negation)

    A negated opinion turns round and weakens: "not brilliant" is mildly negative, "not awful" mildly positive. An
    opinion that its subject cannot have ("the photography is witty") says nothing and counts 0.
    """
    subjects = [unit.kinds for unit in units if unit.category in lexicon.SUBJECT_CATEGORIES]
    opinions = [
        _degree_of(before) * opinion.value if all(kinds <= opinion.kinds for kinds in subjects) else 0.0
        for before, opinion in pairwise(units)  # no clause begins with its opinion
        if opinion.category in lexicon.OPINION_CATEGORIES
    ]
    return _factor_of(units) * sum(opinions) / len(opinions)


def _degree_of(before: Lexeme) -> float:
    """What the word before an opinion makes of it: "very", "gladly"."""
    return before.value if before.category in lexicon.DEGREE_CATEGORIES else 1.0


def _factor_of(units: Sequence[Lexeme]) -> float:
    """What adjuncts and negations make of the whole clause."""
    factor = 1.0
    for unit in units:
        if unit.category == "ADJUNCT":
            factor *= unit.value
        elif unit.category in lexicon.NEGATIONS:
            factor *= -0.5
    return factor


@lru_cache(maxsize=1 << 12)
def read_clause(words: tuple[str, ...]) -> tuple[bool, float, bool]:
    """(grammatical, sentiment, whether it is a verdict on the whole) of one clause."""
    units = units_of(words)
    if units is None or not derivable(units):
        return False, 0.0, False
    return True, sentiment_of(units), any(unit.category == "VERDICT" for unit in units)


def _sentences(tokens: Sequence[str]) -> Iterator[Sequence[str]]:
    """The tokens of each sentence without its end mark."""
    start = 0
    for position, token in enumerate(tokens):
        if token in SENTENCE_ENDS:
            yield tokens[start:position]
            start = position + 1
    if start < len(tokens):
        yield tokens[start:]


def _without_opener(sentence: Sequence[str]) -> tuple[float, Sequence[str]]:
    """The factor that an opening phrase puts on the sentence's weight, and the sentence after it."""
    opener = _longest_match(sentence, 0, _OPENERS) if sentence else None
    if opener is None or sentence[len(opener.words) : len(opener.words) + 1] != [","]:
        return 1.0, sentence
    return opener.value, sentence[len(opener.words) + 1 :]


def _split_clauses(sentence: Sequence[str]) -> tuple[str, list[tuple[str, ...]]]:
    """The sentence's skeleton and its clauses. An "and" joins clauses only after a comma."""
    skeleton: list[str] = []
    clauses: list[list[str]] = []
    for token in sentence:
        after_comma = bool(skeleton) and skeleton[-1] == ","
        if token == "," or token in CONNECTIVES or (token == "and" and after_comma):
            skeleton.append(token)
        elif skeleton and skeleton[-1] == "C":
            clauses[-1].append(token)
        else:
            skeleton.append("C")
            clauses.append([token])
    return " ".join(skeleton), [tuple(clause) for clause in clauses]


def read(tokens: Sequence[str]) -> list[Clause]:
    """The clauses of a review; all clauses of a sentence whose skeleton is unknown are broken."""
    clauses: list[Clause] = []
    for sentence in _sentences(tokens):
        opener_factor, rest = _without_opener(sentence)
        skeleton, parts = _split_clauses(rest)
        weights = SKELETONS.get(skeleton)
        if weights is None:
            clauses.append(Clause(tuple(filter(is_word, sentence)), opener_factor, False, 0.0))
            continue
        for words, weight in zip(parts, weights, strict=True):
            grammatical, sentiment, verdict = read_clause(words)
            opening = VERDICT_WEIGHT if verdict and not clauses else 1.0
            clauses.append(Clause(words, weight * opener_factor * opening, grammatical, sentiment))
    return clauses
