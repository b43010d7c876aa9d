"""Simulated annotators: people who see the gold reward through noise and a small taste of their own."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from ppo_rlhf.toy import grammar, reward


@dataclass(frozen=True)
class Annotator:
    """Chooses A over B with probability sigmoid((taste(A) − taste(B)) / temperature): Bradley and Terry's model."""

    name: str
    temperature: float
    long_word_charge: float = 0.0  # for each word above 24
    contrast_bonus: float = 0.0  # for a review that weighs two sides
    exclamation_bonus: float = 0.0


ANNOTATORS = (
    Annotator("ada", temperature=0.3),
    Annotator("ben", temperature=0.42, long_word_charge=0.02),
    Annotator("cleo", temperature=0.55, contrast_bonus=0.1, exclamation_bonus=0.15),
)


SECOND_OPINION_EVERY = 4  # pairs


def taste(annotator: Annotator, prompt: str, response: str) -> float:
    """The gold reward as this annotator sees it: gold plus his quirks."""
    tokens = grammar.tokens_of(response)
    num_words = sum(map(grammar.is_word, tokens))
    return (
        reward.gold([prompt], [response])[0]
        - annotator.long_word_charge * max(0, num_words - 24)
        + annotator.contrast_bonus * (not grammar.CONTRASTS.isdisjoint(tokens))
        + annotator.exclamation_bonus * ("!" in tokens)
    )


def preference(annotator: Annotator, prompt: str, first: str, second: str) -> float:
    """Probability that the annotator chooses the first response."""
    margin = (taste(annotator, prompt, first) - taste(annotator, prompt, second)) / annotator.temperature
    return 0.5 * (1.0 + math.tanh(0.5 * margin))  # the sigmoid, without overflow


def annotate(prompts: Sequence[str], responses: Sequence[Sequence[str]], *, seed: int) -> list[dict[str, str]]:
    """A judgement of every pair, two of every fourth: rows {"prompt", "chosen", "rejected", "annotator"}.

    responses[i] holds the two responses to prompts[i]. The annotators are drawn by lot; two who judge the same pair do
    not know of each other, which shows how far they agree.
    """
    generator = random.Random(seed)
    rows: list[dict[str, str]] = []
    for number, (prompt, pair) in enumerate(zip(prompts, responses, strict=True)):
        first, second = pair
        for annotator in generator.sample(ANNOTATORS, 2 if number % SECOND_OPINION_EVERY == 0 else 1):
            takes_first = generator.random() < preference(annotator, prompt, first, second)
            chosen, rejected = (first, second) if takes_first else (second, first)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "annotator": annotator.name})
    return rows
