"""`sample` and `stream`, and `Sampler`: what may take the place of `sample` in a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_rlhf.prompts import PromptBatch
from ppo_rlhf.sampling.decoding import Drawn, decode
from ppo_rlhf.sampling.responses import Responses, pieces_of, texts_of
from ppo_rlhf.settings import SamplingSettings

FinishedRows = Callable[[list[int], Responses], None]


class Sampler(Protocol):
    """Whatever responds to prompts; `sample` is the one that runs use by default.

    It is given the policy as it is now, and a line of uniform numbers for each row, from which all that is random
    should follow. on_finished, for rewards that score meanwhile (`overlap_scoring`), it tells of every row once, or of
    none. Its log-probabilities are compared with the policy's own and never trained on.
    """

    def __call__(
        self,
        language_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: PromptBatch,
        settings: SamplingSettings,
        noise: Tensor,
        *,
        on_finished: FinishedRows | None = None,
        group_size: int = 1,
    ) -> Responses: ...


def sample(
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptBatch,
    settings: SamplingSettings,
    noise: Tensor,
    *,
    on_finished: FinishedRows | None = None,
    group_size: int = 1,
) -> Responses:
    """Samples one response for each prompt.

    noise: uniform numbers in [0, 1), (B, max_new_tokens) or wider: token t of row b is the inverse of the cumulative
    distribution at noise[b, t]. So a row's response depends on its prompt and its noise, not on its
    neighbours or on when they stop.

    on_finished: called with the next group_size rows that have ended and their responses, while others are still being
    sampled, and at the end with those that are left; which rows make a group depends on their lengths alone.

    → Responses, T being the longest response's length. The model's mode is kept; no dropout acts here. Raises
    UserError for a prompt that leaves no room for max_new_tokens in the model's context, and for recurrent models.
    """
    lines = [ids[mask].tolist() for ids, mask in zip(prompts.ids.cpu(), prompts.mask.cpu(), strict=True)]
    ended: list[int] = []  # rows that no group has had yet
    for drawn in decode(language_model, tokenizer, lines, settings, noise):
        if on_finished is None:
            continue
        ended += drawn.ended.tolist()
        while len(ended) >= group_size:
            group, ended = ended[:group_size], ended[group_size:]
            on_finished(group, _responses(drawn, group, tokenizer))
    if on_finished is not None and ended:
        on_finished(ended, _responses(drawn, ended, tokenizer))
    return _responses(drawn, range(len(lines)), tokenizer)


def _responses(drawn: Drawn, rows: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Responses:
    """Those of some rows, all of which have ended."""
    places = torch.tensor(rows, device=drawn.ids.device)
    lengths = drawn.lengths[places]
    width = int(lengths.max())
    mask = torch.arange(width, device=places.device) < lengths[:, None]
    ids = drawn.ids[places, :width]
    return Responses(ids, mask, drawn.finished[places], texts_of(ids, mask, tokenizer), drawn.logprobs[places, :width])


def stream(
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    settings: SamplingSettings,
    generator: torch.Generator | None = None,
) -> Iterator[str]:
    """The response to one prompt, piece by piece as it is drawn; the pieces joined are the response's text.

    A character of several tokens comes whole. The generator is PyTorch's global one when none is given.
    """
    noise = torch.rand(1, settings.max_new_tokens, generator=generator)
    steps = decode(language_model, tokenizer, [tokenizer(prompt)["input_ids"]], settings, noise)
    return pieces_of(tokenizer, (int(drawn.ids[0, step]) for step, drawn in enumerate(steps)))
