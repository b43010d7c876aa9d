"""What the choices say: agreement between annotators, bias, pace, and how sources compare."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from ppo_rlhf.intervals import Share, wilson
from ppo_rlhf.preferences.store import Choice

PRIOR = 0.1  # virtual ties between sources that met: keeps the strength of one that always wins finite


@dataclass(frozen=True)
class Agreement:
    """How far two annotators agree on the pairs that both judged."""

    annotators: tuple[str, str]
    pairs: int
    observed: float
    kappa: float | None  # None where all is one category


@dataclass(frozen=True)
class Annotator:
    """One annotator's pace and habits."""

    name: str
    choices: int
    results: dict[str, int]
    seconds: float | None  # median of a choice
    left: Share | None  # of the choices of left or right


@dataclass(frozen=True)
class Strength:
    """A source in the Bradley–Terry model."""

    source: str
    strength: float  # log-odds to win against a source of mean strength
    wins: float  # ties count half
    comparisons: int


@dataclass(frozen=True)
class Statistics:
    """All of it, for a page or a program."""

    pairs: int
    choices: int
    results: dict[str, int]
    annotators: list[Annotator]
    agreements: list[Agreement]  # Cohen's kappa
    fleiss_kappa: float | None
    left: Share | None
    seconds: float | None  # median of a choice
    sources: list[Strength]  # the strongest first


def statistics_of(choices: Sequence[Choice]) -> Statistics:
    """The statistics of choices that stand."""
    by_annotator: dict[str, list[Choice]] = defaultdict(list)
    judged: dict[str, dict[str, Hashable]] = defaultdict(dict)  # pair → annotator → judgement
    for choice in choices:
        by_annotator[choice.annotator].append(choice)
        if choice.ranks is not None:
            judged[choice.pair.digest][choice.annotator] = (choice.result == "both bad", *choice.ranks)
    return Statistics(
        pairs=len({choice.pair.digest for choice in choices}),
        choices=len(choices),
        results=_results(choices),
        annotators=[
            Annotator(name, len(own), _results(own), _median_seconds(own), left_share(own))
            for name, own in sorted(by_annotator.items())
        ],
        agreements=_agreements(judged),
        fleiss_kappa=fleiss_kappa([Counter(judgements.values()) for judgements in judged.values()]),
        left=left_share(choices),
        seconds=_median_seconds(choices),
        sources=ranked_sources(choices),
    )


def statistics_lines(found: Statistics) -> list[str]:
    """The statistics in a few lines of text."""

    def number(value: float | None, form: str = ".2f") -> str:
        return "—" if value is None else format(value, form)

    results = ", ".join(f"{result} {count}" for result, count in found.results.items())
    left = "—" if found.left is None else f"{found.left.share:.0%} ({found.left.low:.0%} to {found.left.high:.0%})"
    lines = [
        f"{found.choices} choices on {found.pairs} pairs: {results}",
        f"agreement: Fleiss' kappa {number(found.fleiss_kappa)}",
        f"left chosen: {left}",
        f"a choice takes: {number(found.seconds, '.1f')} s",
    ]
    for each in found.annotators:
        lines.append(f"{each.name}: {each.choices} choices, {number(each.seconds, '.1f')} s each")
    for pair in found.agreements:
        names, kappa = " and ".join(pair.annotators), number(pair.kappa)
        lines.append(f"{names}: {pair.pairs} pairs, {pair.observed:.0%} the same, Cohen's kappa {kappa}")
    for source in found.sources:
        wins = f"{source.wins:g} of {source.comparisons}"
        lines.append(f"{source.source}: strength {source.strength:+.2f}, won {wins}")
    return lines


def _results(choices: Sequence[Choice]) -> dict[str, int]:
    return dict(Counter(choice.result for choice in choices).most_common())


def _median_seconds(choices: Sequence[Choice]) -> float | None:
    seconds = [choice.seconds for choice in choices if choice.seconds is not None]
    return statistics.median(seconds) if seconds else None


def left_share(choices: Sequence[Choice]) -> Share | None:
    """How often the left one was chosen, of all choices of left or right; without bias it is a half."""
    sides = [choice.result for choice in choices if choice.result in ("left", "right")]
    return wilson(sides.count("left"), len(sides)) if sides else None


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """κ = (p_o − p_e) / (1 − p_e) of two annotators' judgements of the same things (Cohen, 1960).

    p_e: the agreement expected of two who judge independently, each as often so and so as he did. None where that is 1.
    """
    count = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / count
    one, other = Counter(first), Counter(second)
    expected = sum(one[name] * other[name] for name in one) / count**2
    return (observed - expected) / (1 - expected) if expected < 1 else None


def _agreements(judged: Mapping[str, Mapping[str, Hashable]]) -> list[Agreement]:
    names = sorted({name for judgements in judged.values() for name in judgements})
    found = []
    for one, other in itertools.combinations(names, 2):
        both = [(each[one], each[other]) for each in judged.values() if one in each and other in each]
        if both:
            first, second = zip(*both, strict=True)
            observed = sum(a == b for a, b in both) / len(both)
            found.append(Agreement((one, other), len(both), observed, cohen_kappa(first, second)))
    return found


def fleiss_kappa(judgements: Sequence[Mapping[Hashable, int]]) -> float | None:
    """κ = (P̄ − P_e) / (1 − P_e) over things judged by several people each (Fleiss, 1971).

    judgements: of each thing, how many people put it into which category. Their number may differ from thing to thing;
    those judged by one alone tell nothing and are left out. None where none is left, or where all is one category.
    """
    several = [counts for counts in judgements if sum(counts.values()) > 1]
    if not several:
        return None
    totals: Counter[Hashable] = Counter()
    agreement = 0.0
    for counts in several:
        people = sum(counts.values())
        totals.update(counts)
        agreement += sum(count * (count - 1) for count in counts.values()) / (people * (people - 1))
    observed = agreement / len(several)
    expected = sum((count / totals.total()) ** 2 for count in totals.values())
    return (observed - expected) / (1 - expected) if expected < 1 else None


def ranked_sources(choices: Sequence[Choice]) -> list[Strength]:
    """The sources by Bradley–Terry strength, the strongest first; empty where fewer than two were compared.

    A ranking counts as all of its pairs, a tie as half a win for each; "both bad" is a tie.
    """
    wins: dict[tuple[str, str], float] = defaultdict(float)
    for choice in choices:
        if choice.ranks is None or not choice.pair.sources:
            continue
        for a, b in itertools.permutations(range(len(choice.ranks)), 2):
            better, worse = choice.pair.sources[a], choice.pair.sources[b]
            if better is not None and worse is not None and better != worse and choice.ranks[a] <= choice.ranks[b]:
                wins[better, worse] += 1.0 if choice.ranks[a] < choice.ranks[b] else 0.5
    strengths = bradley_terry(wins, prior=PRIOR)
    return [
        Strength(
            source=name,
            strength=strengths[name],
            wins=sum(count for (better, _), count in wins.items() if better == name),
            comparisons=round(sum(count for names, count in wins.items() if name in names)),
        )
        for name in sorted(strengths, key=strengths.__getitem__, reverse=True)
    ]


def bradley_terry(
    wins: Mapping[tuple[str, str], float], *, prior: float = 0.0, tolerance: float = 1e-10, max_steps: int = 10_000
) -> dict[str, float]:
    """Log-strengths s, of mean 0, that make the wins most likely where P(a beats b) = σ(s_a − s_b).

    By Hunter's MM algorithm (2004): p_a ← W_a / Σ_b n_ab / (p_a + p_b), which never lowers the likelihood. wins:
    (winner, loser) → how often. prior: virtual ties between any two that met; without it one that always wins has no
    finite strength.
    """
    games: dict[tuple[str, str], float] = defaultdict(float)
    won: dict[str, float] = defaultdict(float)
    for (winner, loser), count in wins.items():
        won[winner] += count
        games[winner, loser] += count
        games[loser, winner] += count
    for one, other in list(games):
        games[one, other] += prior
        won[one] += prior / 2
    opponents: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for (one, other), count in games.items():
        opponents[one].append((other, count))
    strengths = dict.fromkeys(opponents, 1.0)
    for _ in range(max_steps):
        before = strengths
        raw = {
            name: won[name] / sum(count / (before[name] + before[other]) for other, count in met)
            for name, met in opponents.items()
        }
        scale = math.exp(statistics.fmean(map(math.log, raw.values()))) if raw else 1.0
        strengths = {name: value / scale for name, value in raw.items()}
        if all(abs(strengths[name] - before[name]) <= tolerance * before[name] for name in strengths):
            break
    return {name: math.log(value) for name, value in strengths.items()}


def win_rate(choices: Sequence[Choice], source: str, other: str) -> Share | None:
    """How often `source` was preferred to `other`: a tie counts half, several people's choices of a pair their mean.

    So the interval is over pairs, which are independent; opinions of the same pair are not. None without a choice.
    """
    by_pair: dict[str, list[float]] = defaultdict(list)
    for choice in choices:
        if choice.ranks is not None and set(choice.pair.sources) == {source, other}:
            mine, yours = (choice.ranks[choice.pair.sources.index(name)] for name in (source, other))
            by_pair[choice.pair.digest].append(0.5 * (1 + (mine < yours) - (mine > yours)))
    outcomes = [statistics.fmean(several) for several in by_pair.values()]
    return wilson(sum(outcomes), len(outcomes)) if outcomes else None
