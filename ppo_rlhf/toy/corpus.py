"""Short movie reviews from a seeded writer: the demonstrations and the prompts of the embedded task."""

import random
from collections.abc import Iterator
from functools import cache
from typing import Any

from ppo_rlhf.toy import grammar, lexicon
from ppo_rlhf.toy.lexicon import Lexeme

NUM_DEMONSTRATIONS = 12_000
NUM_PROMPTS = 2_000
DEMONSTRATION_SEED = 1
PROMPT_SEED = 2
SHORTEST, LONGEST = 12, 30  # words of a review

TONES = {1.0: 0.2, 0.3: 0.2, 0.0: 0.2, -0.3: 0.2, -1.0: 0.2}  # value of the verdict that a review opens with: its share
SENTENCE_COUNTS = {1: 0.6, 2: 0.4}  # after the verdict
OPENER_SHARE = 0.2
EXCLAMATION_SHARE = 0.06  # of the sentences of a review that is not mixed
CONCESSION_SHARE = 0.3  # how often the lighter half of a contrast says the opposite
STRONG = 0.8  # an opinion of this value or more is a strong one
GRADED = {"DEGREE": 1.2, "WILLING": 1.1, "ADJUNCT": 1.0}  # category: the grade that goes with strong and mild words
SKELETON_SHARES = {
    "C": 5.0,
    "C , and C": 4.0,
    "C because C": 2.0,
    "C , but C": 2.5,
    "C , yet C": 1.0,
    "although C , C": 2.0,
    "C although C": 1.0,
    "while C , C": 1.0,
    "C , and C , but C": 0.5,
    "although C , C because C": 0.5,
}
OPTIONAL_SHARES = {"NOT|NEVER?": 0.08, "NOT?": 0.08, "NEVER?": 0.06, "DEGREE?": 0.5, "WILLING?": 0.5, "ADJUNCT?": 0.25}

OPENINGS = (
    "{we} watched the {age} {genre} by {person} {place} {time} .",
    "{we} saw a {genre} by {person} {place} {time} .",
    "{time} , {we} went to see the {age} {genre} by {person} .",
    "the {age} {genre} by {person} was shown {place} {time} .",
    "a friend asked about the {genre} that {person} made {time} .",
    "here are some thoughts on the {age} {genre} by {person} .",
    "after a screening of the {genre} by {person} {place} ,",
    "{time} {we} caught the {age} {genre} with {person} {place} .",
    "review of the {genre} by {person} , seen {place} :",
    "{person} made a {genre} , and {we} saw it {place} {time} .",
)
PEOPLE = ("i", "we", "my brother and i", "my sister and i", "the two of us", "our class")
AGES = ("new", "old", "latest", "first", "second", "third", "restored")
FIRST_NAMES = (
    "anna", "boris", "clara", "dmitri", "elena", "felix", "greta", "hugo", "irene", "jonas", "karin", "leon",
    "maria", "nadia", "oscar", "paula", "rosa", "stefan", "teresa", "victor",
)  # fmt: skip
LAST_NAMES = (
    "kovacs", "lindgren", "moreau", "novak", "okafor", "petrov", "quintana", "rossi", "silva", "tanaka", "ulrich",
    "varga", "weber", "yilmaz", "zhang", "abbott", "bergman", "castro", "duarte", "ekberg",
)  # fmt: skip
PLACES = (
    "at home", "at the festival", "in the city", "on a plane", "in a small theater", "at school", "on television",
    "in the park", "at the museum", "with friends", "in a crowded hall", "on a laptop", "by the sea", "at the club",
)  # fmt: skip
TIMES = (
    "on sunday", "last night", "yesterday", "in march", "last week", "on a rainy evening", "this morning",
    "during the holidays", "two days ago", "on friday", "last summer", "in october", "after dinner", "before work",
)  # fmt: skip


@cache
def _entries() -> dict[str, list[Lexeme]]:
    """The lexicon by category."""
    table: dict[str, list[Lexeme]] = {}
    for entry in lexicon.lexemes():
        table.setdefault(entry.category, []).append(entry)
    return table


@cache
def _suitable(category: str, positive: bool, strong: bool, kinds: frozenset[str]) -> list[Lexeme]:
    """The opinions of a category that have the wanted sign and strength and suit every kind of subject."""
    return [
        entry
        for entry in _entries()[category]
        if (entry.value > 0) == positive and (abs(entry.value) >= STRONG) == strong and kinds <= entry.kinds
    ]


@cache
def _graded(category: str, strong: bool) -> list[Lexeme]:
    """The lexemes of a category that strong words, or mild ones, go with; all of them where they have no grade."""
    entries = _entries()[category]
    middle = GRADED.get(category)
    if middle is None:
        return entries
    return [entry for entry in entries if (entry.value >= middle if strong else entry.value <= middle)]


def _weighted(generator: random.Random, shares: dict[Any, float]) -> Any:
    return generator.choices(list(shares), list(shares.values()))[0]


def _framing(generator: random.Random) -> tuple[str, str]:
    """A neutral prompt and the genre it names."""
    genre = generator.choice(lexicon.GENRES)
    prompt = generator.choice(OPENINGS).format(
        genre=genre,
        we=generator.choice(PEOPLE),
        age=generator.choice(AGES),
        person=f"{generator.choice(FIRST_NAMES)} {generator.choice(LAST_NAMES)}",
        place=generator.choice(PLACES),
        time=generator.choice(TIMES),
    )
    return prompt, genre


def _framings(seed: int) -> Iterator[tuple[str, str]]:
    """Endless distinct prompts, each with its genre."""
    generator = random.Random(seed)
    seen: set[str] = set()
    while True:
        prompt, genre = _framing(generator)
        if prompt not in seen:
            seen.add(prompt)
            yield prompt, genre


class _Writer:
    """Writes one review. Remembers the content words it has used, because a good review does not repeat itself."""

    def __init__(self, generator: random.Random, genre: str) -> None:
        self.generator = generator
        self.genre = genre
        self.used: set[str] = set()
        self.strong = False  # whether words and degrees are strong ones

    def review(self, tone: float) -> str:
        """A verdict and one or two sentences that bear it out; those of a mixed review praise and complain in turn."""
        positive = self.generator.random() < 0.5 if tone == 0 else tone > 0
        self.strong = abs(tone) >= STRONG
        sentences = [self.verdict(tone)]
        for _ in range(_weighted(self.generator, SENTENCE_COUNTS)):
            sentences.append(self.sentence(positive, mark="." if tone == 0 else self.end_mark()))
            positive = positive != (tone == 0)
        return " ".join(sentences)

    def verdict(self, tone: float) -> str:
        """The sentence that says what the film was."""
        units = self.fill(_weighted(self.generator, grammar.VERDICT_PATTERNS).split(), tone > 0, verdict=tone)
        assert units is not None  # nothing was said before that it could repeat
        self.used.update(self.content_words(units))
        return " ".join([*(word for unit in units for word in unit.words), "!" if self.strong else "."])

    def end_mark(self) -> str:
        return "!" if self.generator.random() < EXCLAMATION_SHARE else "."

    def sentence(self, positive: bool, mark: str) -> str:
        skeleton = _weighted(self.generator, SKELETON_SHARES)
        weights = iter(grammar.SKELETONS[skeleton])
        words = [self.opener()] if self.generator.random() < OPENER_SHARE else []
        for token in skeleton.split():
            if token == "C":
                # The lighter clause of a contrast may concede the opposite; the heavier carries the tone.
                concedes = next(weights) < 1.0 and self.generator.random() < CONCESSION_SHARE
                words.append(self.clause(positive != concedes))
            else:
                words.append(token)
        return " ".join([*words, mark])

    def opener(self) -> str:
        fresh = [entry for entry in lexicon.openers() if self.used.isdisjoint(self.content_words([entry]))]
        opener = self.generator.choice(fresh)
        self.used.update(self.content_words([opener]))
        return " ".join((*opener.words, ","))

    def clause(self, positive: bool) -> str:
        """A clause of the wanted sign, from one of the grammar's patterns."""
        while True:
            pattern = _weighted(self.generator, grammar.PATTERNS)
            slots = [
                slot.removesuffix("?")
                for slot in self.generator.choice(grammar.with_numbers(pattern))
                if self.generator.random() < OPTIONAL_SHARES.get(slot, 1.0)
            ]
            units = self.fill(slots, positive)
            if units is not None:
                self.used.update(self.content_words(units))
                return " ".join(word for unit in units for word in unit.words)

    def fill(self, slots: list[str], positive: bool, verdict: float = 0.0) -> list[Lexeme] | None:
        """A lexeme for each slot, or None where the choice repeats itself or finds nothing suitable."""
        categories = [self.generator.choice(slot.split("|")) for slot in slots]
        if any(category in lexicon.NEGATIONS for category in categories):
            positive = not positive
        units: list[Lexeme | None] = [
            None if category in lexicon.OPINION_CATEGORIES or category == "ARTICLE" else self.plain(category)
            for category in categories
        ]
        kinds = frozenset[str]().union(*(u.kinds for u in units if u and u.category in lexicon.SUBJECT_CATEGORIES))
        for position in reversed(range(len(units))):
            if categories[position] in lexicon.OPINION_CATEGORIES:
                if categories[position] == "VERDICT":
                    choices = [entry for entry in _entries()["VERDICT"] if entry.value == verdict]
                else:
                    choices = _suitable(categories[position], positive, self.strong, kinds)
                if not choices:
                    return None
                units[position] = self.generator.choice(choices)
            elif categories[position] == "ARTICLE":
                following = units[position + 1]
                assert following is not None  # filled just before: the loop runs from the right
                units[position] = Lexeme((grammar.article_for(following.words[0]),), "ARTICLE")
        filled = [unit for unit in units if unit is not None]
        content = self.content_words(filled)
        repeats = len(set(content)) < len(content) or not self.used.isdisjoint(content)
        return None if repeats else filled

    def plain(self, category: str) -> Lexeme:
        if category == "GENRE":
            genre = self.generator.choice((self.genre, self.genre, *lexicon.FILM_NOUNS))
            return Lexeme((genre,), "GENRE", kinds=frozenset({"film"}))
        return self.generator.choice(_graded(category, self.strong))

    @staticmethod
    def content_words(units: list[Lexeme]) -> list[str]:
        return [word for unit in units for word in unit.words if word not in lexicon.FUNCTION_WORDS]


def _review(generator: random.Random, genre: str) -> str:
    """A review of SHORTEST to LONGEST words in a random tone."""
    tone = _weighted(generator, TONES)
    while True:
        text = _Writer(generator, genre).review(tone)
        if SHORTEST <= sum(map(grammar.is_word, text.split())) <= LONGEST:
            return text


def demonstrations() -> list[dict[str, str]]:
    """Reviews to imitate: rows {"prompt", "completion"}, the same in every call.

    A fifth each of the reviews rave, praise, are of two minds, complain, and pan; every one is grammatical and none
    repeats a content word. A completion starts with the space that parts it from its prompt, so that prompt and
    completion can be tokenized separately.
    """
    generator = random.Random(DEMONSTRATION_SEED)
    framings = _framings(DEMONSTRATION_SEED)
    return [
        {"prompt": prompt, "completion": " " + _review(generator, genre)}
        for prompt, genre in (next(framings) for _ in range(NUM_DEMONSTRATIONS))
    ]


def prompts() -> list[dict[str, str]]:
    """Prompts for reinforcement learning: rows {"prompt"}, none of them among the demonstrations."""
    framings = _framings(DEMONSTRATION_SEED)
    demonstrated = {next(framings)[0] for _ in range(NUM_DEMONSTRATIONS)}
    rows: list[dict[str, str]] = []
    for prompt, _ in _framings(PROMPT_SEED):
        if prompt not in demonstrated:
            rows.append({"prompt": prompt})
        if len(rows) == NUM_PROMPTS:
            break
    return rows
