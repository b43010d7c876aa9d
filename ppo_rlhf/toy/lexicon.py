"""The words of the embedded task: which category each belongs to and what it contributes to an opinion.

A *lexeme* is one word or one fixed phrase ("kept me smiling"). Its surface belongs to exactly one category, so reading
a clause is a greedy longest match and never a search. Opinion values are signed strengths: +1 "brilliant", +0.6 "good",
−1 "awful". The kinds of a lexeme say what it can be about: jokes may be stale, photography may not.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

KINDS = frozenset({"story", "humor", "people", "look", "sound", "film"})

OPINION_CATEGORIES = frozenset({"ADJECTIVE", "PAST", "BASE", "THIRD", "RECOMMEND", "VERDICT"})
DEGREE_CATEGORIES = frozenset({"DEGREE", "WILLING"})  # they stand right before the opinion that they grade
SUBJECT_CATEGORIES = frozenset({"COUNT", "MASS", "PLURAL", "GENRE", "it"})
NEGATIONS = frozenset({"NOT", "NEVER", "no", "nothing"})


@dataclass(frozen=True)
class Lexeme:
    """One entry of the lexicon."""

    words: tuple[str, ...]
    category: str  # an upper-case word class, or the word itself for a function word
    value: float = 0.0  # signed strength of an opinion; the factor of a degree word or an adjunct
    kinds: frozenset[str] = frozenset()  # what an opinion can be about; what a subject is


ASPECTS = {  # kind: (countable singular, uncountable singular, plural)
    "story": (
        "plot story ending premise script finale opening screenplay backstory climax",
        "suspense pacing storytelling exposition",
        "twists scenes subplots flashbacks themes ideas surprises",
    ),
    "humor": (
        "monologue prank punchline sketch",
        "humor dialogue banter wit slapstick",
        "jokes gags puns lines one-liners insults impressions",
    ),
    "people": (
        "cast lead villain hero heroine narrator ensemble newcomer",
        "acting chemistry casting",
        "actors performances characters sidekicks children cameos teenagers",
    ),
    "look": (
        "setting palette backdrop wardrobe",
        "photography lighting scenery animation camerawork makeup",
        "costumes sets effects visuals colors locations landscapes stunts",
    ),
    "sound": (
        "score soundtrack theme chorus overture narration",
        "music singing drumming",
        "songs melodies lyrics tunes ballads duets",
    ),
}

FILM_NOUNS = ("film", "movie", "picture")  # they suit every prompt
GENRES = (
    "comedy", "drama", "thriller", "western", "musical", "documentary", "romance", "mystery", "cartoon", "fantasy",
    "adventure", "biopic", "sequel", "remake", "satire", "melodrama", "parody", "epic", "fable", "whodunit",
)  # fmt: skip

ADJECTIVES = {  # kind: {value: words}; the kind "any" suits every subject
    "any": {
        1.0: "wonderful superb excellent brilliant outstanding terrific magnificent fantastic exceptional remarkable",
        0.6: "good solid pleasant enjoyable memorable charming engaging appealing impressive satisfying",
        0.4: "fine decent likeable acceptable",
        -0.4: "ordinary uneven unremarkable average",
        -0.6: "bad weak poor dull bland mediocre forgettable disappointing tedious tiresome irritating annoying",
        -1.0: "terrible awful dreadful horrible atrocious unbearable painful hopeless abysmal appalling",
    },
    "story": {
        1.0: "gripping ingenious absorbing suspenseful",
        0.6: "original inventive surprising thoughtful moving intelligent touching",
        -0.6: "predictable confusing silly contrived implausible muddled slow shallow obvious",
        -1.0: "pointless incoherent preposterous nonsensical",
    },
    "humor": {
        1.0: "hilarious uproarious side-splitting",
        0.6: "funny witty sharp playful fresh irreverent cheeky",
        -0.6: "stale corny flat forced lazy childish crude",
        -1.0: "unfunny tasteless idiotic",
    },
    "people": {
        1.0: "charismatic fearless magnetic captivating",
        0.6: "convincing talented sincere believable natural warm honest expressive endearing",
        -0.6: "stiff unconvincing awkward cold artificial bored unlikeable hammy",
        -1.0: "wooden lifeless insufferable",
    },
    "look": {
        1.0: "gorgeous stunning dazzling exquisite",
        0.6: "beautiful elegant vivid colorful striking stylish lavish imaginative",
        -0.6: "drab murky cheap garish gloomy tacky clumsy dated amateurish",
        -1.0: "ugly hideous shabby",
    },
    "sound": {
        1.0: "haunting unforgettable enchanting",
        0.6: "lovely catchy soothing stirring lively melodic tender rousing",
        -0.6: "loud shrill monotonous repetitive noisy intrusive jarring syrupy",
        -1.0: "grating deafening excruciating",
    },
    "film": {
        1.0: "thrilling uplifting exhilarating triumphant",
        0.6: "entertaining rewarding heartfelt ambitious exciting refreshing",
        -0.6: "boring overlong pretentious unoriginal empty cynical bloated",
        -1.0: "soulless exhausting depressing",
    },
}

# (past, base, third person, value, kinds); plural subjects take the base form in the present
VERB_PHRASES = (
    ("kept me smiling", "keep me smiling", "keeps me smiling", 0.8, "humor people film"),
    ("made me laugh out loud", "make me laugh out loud", "makes me laugh out loud", 1.0, "humor people film"),
    ("kept me guessing", "keep me guessing", "keeps me guessing", 0.8, "story film"),
    ("moved me to tears", "move me to tears", "moves me to tears", 1.0, "story people sound film"),
    ("won me over", "win me over", "wins me over", 0.8, "any"),
    ("held my attention", "hold my attention", "holds my attention", 0.7, "any"),
    ("touched my heart", "touch my heart", "touches my heart", 0.9, "story people sound film"),
    ("took my breath away", "take my breath away", "takes my breath away", 1.0, "look sound people film"),
    ("drew me in", "draw me in", "draws me in", 0.7, "any"),
    ("stayed with me for days", "stay with me for days", "stays with me for days", 0.8, "story people sound film"),
    ("lifted my spirits", "lift my spirits", "lifts my spirits", 0.8, "humor sound film"),
    ("exceeded my hopes", "exceed my hopes", "exceeds my hopes", 0.9, "any"),
    ("blew me away", "blow me away", "blows me away", 1.0, "any"),
    ("cheered everyone up", "cheer everyone up", "cheers everyone up", 0.7, "humor sound people film"),
    ("delighted the whole room", "delight the whole room", "delights the whole room", 0.9, "humor people film"),
    ("rewarded my patience", "reward my patience", "rewards my patience", 0.6, "story film"),
    ("bored me to tears", "bore me to tears", "bores me to tears", -1.0, "story humor people film"),
    ("sent me to sleep", "send me to sleep", "sends me to sleep", -0.9, "story sound film"),
    ("left me cold", "leave me cold", "leaves me cold", -0.7, "any"),
    ("fell apart", "fall apart", "falls apart", -0.8, "story film"),
    ("wore me out", "wear me out", "wears me out", -0.7, "any"),
    ("got on my nerves", "get on my nerves", "gets on my nerves", -0.8, "humor people sound"),
    ("gave me a headache", "give me a headache", "gives me a headache", -0.9, "story look sound film"),
    ("tested my patience", "test my patience", "tests my patience", -0.7, "any"),
    ("went nowhere", "go nowhere", "goes nowhere", -0.7, "story humor film"),
    ("lost my interest", "lose my interest", "loses my interest", -0.7, "story people film"),
    ("insulted my intelligence", "insult my intelligence", "insults my intelligence", -1.0, "story humor film"),
    ("dragged on forever", "drag on forever", "drags on forever", -0.8, "story film"),
    ("ruined the mood", "ruin the mood", "ruins the mood", -0.8, "humor people look sound"),
    ("made me cringe", "make me cringe", "makes me cringe", -0.9, "humor people sound film"),
    ("tried too hard", "try too hard", "tries too hard", -0.5, "humor people film"),
    ("wasted my evening", "waste my evening", "wastes my evening", -0.9, "story film"),
    ("missed the mark", "miss the mark", "misses the mark", -0.6, "any"),
    ("drove us mad", "drive us mad", "drives us mad", -0.9, "humor people sound"),
)

RECOMMENDATIONS = {  # after "i would"
    1.0: ("give it full marks", "call it a masterpiece", "watch it every year", "stand up and applaud it"),
    0.8: ("watch it again", "see it twice", "recommend it to anyone", "show it to my friends", "buy it on disc",
          "take my parents to it", "put it on my list of favorites", "send people to it"),
    -0.8: ("avoid it", "skip it", "warn my friends about it", "walk out of it", "switch it off", "return my ticket",
           "choose something else", "regret the choice"),
    -1.0: ("ask for a refund", "call it a disaster", "burn every copy", "pay to forget it"),
}  # fmt: skip

VERDICTS = {  # what a film was, in a word
    1.0: ("masterpiece", "triumph", "gem", "marvel", "delight"),
    0.3: ("treat", "pleasure", "success", "nice surprise"),
    0.0: ("mixed bag", "curiosity", "puzzle", "middling affair"),
    -0.3: ("letdown", "disappointment", "misfire", "missed chance"),
    -1.0: ("disaster", "failure", "mess", "nightmare", "insult"),
}  # fmt: skip

DEGREES = {
    1.6: ("utterly", "incredibly", "extremely"),
    1.4: ("very", "truly", "deeply", "absolutely"),
    1.2: ("really", "genuinely", "quite"),
    0.8: ("fairly", "rather", "mostly"),
    0.5: ("slightly", "somewhat", "vaguely"),
}
WILLINGNESS = {1.3: ("gladly", "definitely", "happily"), 1.1: ("certainly", "surely"), 0.6: ("probably", "perhaps")}
ADJUNCTS = {
    1.2: ("throughout", "from start to finish", "all the way through", "without exception", "beyond doubt"),
    1.0: ("in the second half", "in the first act", "near the end", "from the beginning", "to my surprise",
          "as always", "in my view", "during the quiet moments", "in the final minutes", "despite the small budget"),
    0.7: ("at times", "now and then", "in places", "every so often", "on occasion", "for the most part", "at first"),
}  # fmt: skip
OPENERS = {  # the factor on the weight of the clauses they open
    1.5: ("overall", "in the end", "in short", "on balance", "all things considered"),
    1.0: ("honestly", "for me", "frankly", "to be honest", "personally", "if you ask me"),
}

CLOSED_CLASSES = {
    "ARTICLE": "a an",
    "BE_S": "is was",
    "BE_P": "are were",
    "LINK_S": "seems feels remains",
    "LINK_P": "seem feel remain",
    "HAVE_S": "has had offers delivers",
    "PERSON": "i we",
    "MODAL": "would will",
    "NOT": "not",
    "NEVER": "never",
}
LITERALS = "the and it there nothing no about did find found what"

VOWEL_SOUNDS = frozenset({"honest"})  # spelt with a consonant, spoken with a vowel; the lexicon has no converse case

# Words that any two clauses may share without repeating themselves.
FUNCTION_WORDS = frozenset((
    "a", "an", "the", "i", "we", "it", "me", "us", "my", "you", "is", "was", "are", "were", "has", "had", "would",
    "will", "did", "what", "not", "never", "no", "nothing", "there", "and", "but", "yet", "although", "while",
    "because", "about", "in", "to", "of", "on", "at", "for", "with", "from", "by", "up", "out", "off",
))  # fmt: skip


def _kinds(text: str) -> frozenset[str]:
    return KINDS if text == "any" else frozenset(text.split())


def _aspects() -> Iterator[Lexeme]:
    for kind, columns in ASPECTS.items():
        for category, words in zip(("COUNT", "MASS", "PLURAL"), columns, strict=True):
            yield from (Lexeme((word,), category, kinds=frozenset({kind})) for word in words.split())
    yield from (Lexeme((word,), "GENRE", kinds=frozenset({"film"})) for word in (*FILM_NOUNS, *GENRES))


def _opinions() -> Iterator[Lexeme]:
    for kind, values in ADJECTIVES.items():
        for value, words in values.items():
            yield from (Lexeme((word,), "ADJECTIVE", value, _kinds(kind)) for word in words.split())
    for *forms, strength, kinds in VERB_PHRASES:
        for category, form in zip(("PAST", "BASE", "THIRD"), forms, strict=True):
            yield Lexeme(tuple(str(form).split()), category, float(strength), _kinds(str(kinds)))
    yield from _graded("RECOMMEND", RECOMMENDATIONS, kinds=KINDS)
    yield from _graded("VERDICT", VERDICTS, kinds=KINDS)


def _graded(
    category: str, table: dict[float, tuple[str, ...]], kinds: frozenset[str] = frozenset()
) -> Iterator[Lexeme]:
    for value, phrases in table.items():
        yield from (Lexeme(tuple(phrase.split()), category, value, kinds) for phrase in phrases)


def _closed() -> Iterator[Lexeme]:
    for category, words in CLOSED_CLASSES.items():
        yield from (Lexeme((word,), category) for word in words.split())
    # "it" stands for the film, so what is said of it must suit a film.
    yield from (
        Lexeme((word,), word, kinds=frozenset({"film"}) if word == "it" else frozenset()) for word in LITERALS.split()
    )


def openers() -> Iterator[Lexeme]:
    """The phrases that open a sentence, set off by a comma; they stand outside its clauses."""
    return _graded("OPENER", OPENERS)


def lexemes() -> Iterator[Lexeme]:
    """Every entry that a clause can contain."""
    yield from _aspects()
    yield from _opinions()
    yield from _closed()
    yield from _graded("DEGREE", DEGREES)
    yield from _graded("WILLING", WILLINGNESS)
    yield from _graded("ADJUNCT", ADJUNCTS)


def by_first_word(entries: Iterable[Lexeme]) -> dict[str, list[Lexeme]]:
    """Entries that can start with a word, longest first: the table of a greedy longest match."""
    table: dict[str, list[Lexeme]] = {}
    for entry in entries:
        table.setdefault(entry.words[0], []).append(entry)
    return {word: sorted(group, key=lambda entry: -len(entry.words)) for word, group in table.items()}
