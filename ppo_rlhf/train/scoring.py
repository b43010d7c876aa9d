"""Responses scored, with all that a reward may ask for."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from ppo_rlhf.rewards import RewardFunction, Scores, score, wants_tokens
from ppo_rlhf.sampling import Responses


def scores_of(
    reward: RewardFunction,
    prompts: list[str],
    responses: Responses,
    columns: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    must_be_finite: bool,
) -> Scores:
    """What the responses earn, on their device. Raises UserError as `ppo_rlhf.rewards.score` does."""
    tokens = None
    if wants_tokens(reward):
        tokens = [token_texts(tokenizer, responses, row) for row in range(len(prompts))]
    found = score(reward, prompts, responses.texts, columns, response_tokens=tokens, must_be_finite=must_be_finite)
    return found.to(responses.ids.device)


def token_texts(tokenizer: PreTrainedTokenizerBase, responses: Responses, row: int) -> list[str]:
    """The tokens of a response, its stop token too, each as a text of its own."""
    return [str(tokenizer.decode([token])) for token in responses.ids[row][responses.mask[row]].tolist()]
