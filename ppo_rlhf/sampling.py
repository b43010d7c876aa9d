"""`sample` and `stream`: decoding with a key–value cache in place; finished rows leave the batch, waiting ones enter.

A prompt is read up to its last token. Then each step reads one token of every row and draws the next, so that rows of
any age go together, and a prompt that is sampled many times is read once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_rlhf.core import top_k_filter, top_p_filter
from ppo_rlhf.errors import UserError
from ppo_rlhf.forwards import Forward, forward_of, has_windows
from ppo_rlhf.kv_cache import ColumnCache
from ppo_rlhf.models import context_length, evaluating, right_padded, takes_position_ids
from ppo_rlhf.prompts import PromptBatch
from ppo_rlhf.settings import SamplingSettings

__all__ = [
    "Responses",
    "Sampler",
    "SamplingSettings",
    "decode",
    "draw",
    "pieces_of",
    "responses_of",
    "sample",
    "stop_ids_of",
    "stream",
    "texts_of",
    "warn_of_truncation",
]

ADMISSION_SHARE = 0.25  # prompts enter when so many rows are free: reading several costs little more than reading one
SPARE_COLUMNS = 64  # steps between two moves of the whole cache, where prompts wait
TOKENS_READ_TOGETHER = (256, 2**14)  # on a CPU and on a GPU: prompts of like length in one pass, with little padding
MIN_SHARED_PREFIX = 8  # a beginning common to all prompts is read once from this length on


@dataclass(frozen=True)
class Responses:
    """What the model said. Token in, token out: these ids are trained on, the texts are for rewards and for eyes."""

    ids: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) bool, True through the stop token
    finished: Tensor  # (B,) bool: stopped by itself, not cut off
    texts: list[str]  # [B]
    # (B, T) float32 at the settings' temperature, without top-k and top-p; 0 where the mask is False. None: not told
    logprobs: Tensor | None = None


FinishedRows = Callable[[list[int], Responses], None]


class Sampler(Protocol):
    """Whatever responds to prompts; `sample` is the one that runs use by default.

    It is given the policy as it is now, and a line of uniform numbers for each row, from which all that is random
    should follow. on_finished, which it may leave alone, is for rewards that score meanwhile (`overlap_scoring`). Its
    log-probabilities are compared with the policy's own and never trained on.
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
    lines = [ids[mask].tolist() for ids, mask in zip(prompts.ids, prompts.mask, strict=True)]
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


def responses_of(
    lines: Sequence[Sequence[int]],
    finished: Sequence[bool],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    *,
    logprobs: Sequence[Sequence[float]] | None = None,
) -> Responses:
    """Responses of token ids, those of a stop token too. finished: stopped by themselves, not cut off."""
    ids, mask = right_padded(lines, device)
    told = None
    if logprobs is not None:
        numbers = torch.tensor([number for line in logprobs for number in line], device=device)
        told = torch.zeros(mask.shape, device=device).masked_scatter(mask, numbers)
    return Responses(ids, mask, torch.tensor(finished, device=device), texts_of(ids, mask, tokenizer), told)


def texts_of(ids: Tensor, mask: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Responses as texts, without special tokens: ids, mask (B, T) → [B]."""
    return [_text(tokenizer, line[kept].tolist()) for line, kept in zip(ids, mask, strict=True)]


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


def pieces_of(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens, piece by piece as they come."""
    ids: list[int] = []
    told, start = "", 0  # the text of ids[start:] that has been told
    for token in tokens:
        ids.append(token)
        text = _text(tokenizer, ids[start:])
        if text.endswith("\ufffd") or len(text) <= len(told):  # half a character, or nothing to see
            continue
        yield text[len(told) :]
        start, told = _last_whole(tokenizer, ids, start, text)
    yield _text(tokenizer, ids[start:])[len(told) :]


def _last_whole(tokenizer: PreTrainedTokenizerBase, ids: list[int], start: int, text: str) -> tuple[int, str]:
    """Where to decode from for the next piece: at the last token if it has a text of its own, else as before."""
    own = _text(tokenizer, ids[-1:])
    return (len(ids) - 1, own) if own and "\ufffd" not in own else (start, text)


# ------------------------------------------------------------------------------------------------------ the loop


@dataclass
class Drawn:
    """What has been drawn so far. One row more than prompts: the last catches what idle slots of the cache draw."""

    ids: Tensor  # (B + 1, max_new_tokens) int64
    logprobs: Tensor  # (B + 1, max_new_tokens) float32
    lengths: Tensor  # (B + 1,) int64
    finished: Tensor  # (B + 1,) bool
    ended: Tensor  # (k,) the rows whose last token came with the last step

    @classmethod
    def nothing(cls, num_rows: int, length: int, pad_id: int, device: torch.device) -> Drawn:
        """Before the first token."""
        return cls(
            torch.full((num_rows + 1, length), pad_id, device=device),
            torch.zeros(num_rows + 1, length, device=device),
            torch.zeros(num_rows + 1, dtype=torch.int64, device=device),
            torch.zeros(num_rows + 1, dtype=torch.bool, device=device),
            torch.zeros(0, dtype=torch.int64, device=device),
        )

    def add(self, rows: Tensor, steps: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
        """The token that each of these rows draws as its step-th, all (N,)."""
        self.ids[rows, steps], self.logprobs[rows, steps] = tokens, logprobs
        self.lengths[rows] = steps + 1
        self.lengths[-1] = 0

    def end(self, rows: Tensor, stopped: Tensor) -> Tensor:
        """Notes which rows stopped with their last token, and which ended, by that or by their length. → (N,) bool."""
        self.finished[rows] = stopped
        ended = (stopped | (self.lengths[rows] == self.ids.shape[1])) & (rows < len(self.ids) - 1)
        self.ended = rows[ended]
        return ended


@dataclass
class Slots:
    """The rows of the cache: which prompt each of them decodes, and what it reads next."""

    rows: Tensor  # (slots,) the prompt's number; `idle` for none
    tokens: Tensor  # (slots,)
    idle: int
    running: int = 0

    def take(self, group: list[int], last_tokens: Tensor, cache: ColumnCache) -> Tensor:
        """Free slots for these prompts. → (k,)"""
        slots = (self.rows == self.idle).nonzero().squeeze(1)[: len(group)]
        self.rows[slots] = torch.tensor(group, device=slots.device)
        self.tokens[slots] = last_tokens[self.rows[slots]]
        self.running += len(group)
        cache.window.used = len(self.rows) if cache.window.static else self.running
        return slots

    def leave(self, ended: Tensor, cache: ColumnCache) -> None:
        """Frees the slots whose rows have ended, (used,) bool."""
        self.running -= int(ended.sum())
        if cache.window.static:
            cache.free(ended.nonzero().squeeze(1))
            self.rows[ended] = self.idle
            return
        new, old = cache.close_ranks(ended)
        self.rows[new], self.tokens[new] = self.rows[old], self.tokens[old]
        self.rows[self.running :] = self.idle


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    settings: SamplingSettings,
    noise: Tensor,
    *,
    static: bool | None = None,
) -> Iterator[Drawn]:
    """One step after another; each yields the same `Drawn`, which has grown by a token in every running row.

    static: all steps have one shape, which is compiled into a CUDA graph on a GPU (the default there; it has never been
    run on one). The model is in evaluation mode until the iterator ends.
    """
    _check(model, prompts, settings, noise)
    device, limit, num_prompts = model.device, settings.max_new_tokens, len(prompts)
    static = device.type == "cuda" if static is None else static
    waiting = sorted(range(num_prompts), key=lambda row: (len(prompts[row]), prompts[row]))  # the last one first
    longest = len(prompts[waiting[-1]]) - 1
    num_slots, num_columns = cache_room(settings, num_prompts, longest)
    num_layers = model.config.get_text_config().num_hidden_layers
    cache = ColumnCache(num_layers, num_slots, num_columns, longest, device=device, static=static)
    drawn = Drawn.nothing(num_prompts, limit, int(tokenizer.pad_token_id), device)
    noise = torch.cat([noise[:, :limit].to(device), noise.new_zeros(1, limit, device=device)])
    last_tokens = torch.tensor([line[-1] for line in prompts] + [0], device=device)
    last_positions = torch.tensor([len(line) - 1 for line in prompts] + [0], device=device)
    rows = torch.full((num_slots,), num_prompts, device=device)
    stop_ids = torch.tensor(stop_ids_of(settings, tokenizer), device=device)
    slots = Slots(rows, tokens=torch.zeros_like(rows), idle=num_prompts)

    with evaluating(model):
        read = step = forward_of(model, num_rows=num_slots)
        if static and device.type == "cuda":  # pragma: no cover - needs a GPU
            step = torch.compile(read, mode="reduce-overhead", fullgraph=True)
        prefix = _read_shared_prefix(model, read, cache, prompts)
        while waiting or slots.running:
            free = num_slots - slots.running
            if waiting and free >= min(len(waiting), max(1, ADMISSION_SHARE * num_slots)):
                group = [waiting.pop() for _ in range(min(free, len(waiting)))]
                places = slots.take(group, last_tokens, cache)
                _read_prompts(read, cache, [prompts[row][:-1] for row in group], places, prefix)

            used = cache.window.used
            rows, steps = slots.rows[:used], drawn.lengths[slots.rows[:used]]
            positions = (last_positions[rows] + steps)[:, None]
            logits = step(slots.tokens[:used, None], positions, cache.open_column(), cache)
            cache.close_column()
            slots.tokens[:used], logprobs = draw(logits, noise[rows, steps], settings)
            drawn.add(rows, steps, slots.tokens[:used], logprobs)
            stopped = (slots.tokens[:used, None] == stop_ids).any(1)
            if settings.stop_strings:
                stopped |= _stop_strings_end(tokenizer, drawn.ids, rows, steps, settings)
            ended = drawn.end(rows, stopped)
            yield drawn
            if len(drawn.ended):
                slots.leave(ended, cache)


def _check(model: PreTrainedModel, prompts: list[list[int]], settings: SamplingSettings, noise: Tensor) -> None:
    if len(noise) != len(prompts) or noise.shape[1] < settings.max_new_tokens:
        raise ValueError(f"noise is {tuple(noise.shape)}; ({len(prompts)}, {settings.max_new_tokens}) is needed.")
    longest, context = max(map(len, prompts)), context_length(model)
    if longest + settings.max_new_tokens > context:
        raise UserError(
            f"a prompt of {longest} tokens and sampling.max_new_tokens={settings.max_new_tokens} do not fit into the "
            f"model's context of {context}: shorten the one or lower the other."
        )
    layers = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if not layers <= {"full_attention", "sliding_attention"}:
        raise UserError(
            f"{type(model).__name__} has layers other than attention, {', '.join(sorted(layers))}: the sampler keeps "
            "keys and values alone, and cannot decode it."
        )


def cache_room(settings: SamplingSettings, num_prompts: int, longest: int) -> tuple[int, int]:
    """How many rows and columns the cache has."""
    num_rows, num_columns = min(settings.batch_size, num_prompts), longest + settings.max_new_tokens
    budget = settings.cached_tokens or num_rows * (num_columns + SPARE_COLUMNS)
    if min(num_rows, budget // num_columns) < num_prompts:
        num_columns += SPARE_COLUMNS
    return max(1, min(num_rows, budget // num_columns)), num_columns


def _read_shared_prefix(model: PreTrainedModel, forward: Forward, cache: ColumnCache, prompts: list[list[int]]) -> int:
    """Reads the tokens that all prompts begin with, if they are many → how many it read.

    Not for models in which the distance of two columns matters: padding stands between prefix and prompt.
    """
    same = takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
    length = min(len(list(same)), min(map(len, prompts)) - 2)
    if length < MIN_SHARED_PREFIX or len(prompts) == 1 or has_windows(model) or not takes_position_ids(model):
        return 0
    ids = torch.tensor([prompts[0][:length]], device=model.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    with cache.reading(None, None, mask):
        forward(ids, mask.cumsum(1) - 1, mask, cache)
    return length


def _read_prompts(forward: Forward, cache: ColumnCache, lines: list[list[int]], slots: Tensor, prefix: int) -> None:
    """Reads prompts, the longest first, into rows of the cache: equal ones once, all after the shared prefix."""
    device = slots.device
    places: dict[tuple[int, ...], list[int]] = {}
    for line, slot in zip(lines, slots.tolist(), strict=True):
        places.setdefault(tuple(line[prefix:]), []).append(slot)
    unread = list(places)
    while unread:
        width = len(unread[0])
        count = max(1, TOKENS_READ_TOGETHER[device.type == "cuda"] // max(1, width))
        group, unread = unread[:count], unread[count:]
        ids = torch.tensor([[0] * (width - len(line)) + list(line) for line in group], device=device)
        mask = torch.arange(-width, 0) >= -torch.tensor([len(line) for line in group])[:, None]
        mask = torch.cat([mask.new_ones(len(group), prefix), mask], dim=1).to(device)
        pairs = torch.tensor([(slot, number) for number, line in enumerate(group) for slot in places[line]])
        with cache.reading(pairs[:, 0].to(device), pairs[:, 1].to(device), mask):
            if width:
                forward(ids, (mask.cumsum(1) - 1).clamp(min=0)[:, prefix:], mask, cache)


# ---------------------------------------------------------------------------------------------------- one token


def draw(logits: Tensor, noise: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor]:
    """One token a row, by the inverse of the cumulative distribution, and its log-probability before top-k and top-p.

    logits (B, V), noise (B,) → (B,) int64, (B,) float32.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if settings.temperature != 1.0:
        logits = logits / settings.temperature
    probabilities = kept = logits.softmax(-1)
    if settings.top_k:
        logits = top_k_filter(logits, settings.top_k)
    if settings.top_p < 1:
        logits = top_p_filter(logits, settings.top_p)
    if settings.top_k or settings.top_p < 1:
        kept = logits.softmax(-1)
    cumulative = kept.cumsum(-1)
    threshold = noise[:, None].to(cumulative) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logits.shape[-1] - 1)
    return tokens.squeeze(1), probabilities.gather(1, tokens).squeeze(1).log().float()


def stop_ids_of(settings: SamplingSettings, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a response: those of the settings, else the tokenizer's eos."""
    ids: Sequence[int] = settings.stop_token_ids or (tokenizer.eos_token_id,)
    return list(ids)


def _stop_strings_end(
    tokenizer: PreTrainedTokenizerBase, ids: Tensor, rows: Tensor, steps: Tensor, settings: SamplingSettings
) -> Tensor:
    """Whether each row's newest token completes a stop string, (N,) bool.

    A token has a byte at least, so the last tokens, as many as the longest string has bytes, hold it whole; with one
    more, whose leading space some tokenizers drop.
    """
    reach = 1 + max(len(string.encode()) for string in settings.stop_strings)
    columns = steps[:, None] + torch.arange(1 - reach, 1, device=ids.device)
    tails = ids[rows[:, None], columns.clamp(min=0)].tolist()
    lines = [tail[max(0, reach - 1 - step) :] for tail, step in zip(tails, steps.tolist(), strict=True)]
    texts = tokenizer.batch_decode(lines, skip_special_tokens=True)
    ends = [any(string in text for string in settings.stop_strings) for text in texts]
    return torch.tensor(ends, device=ids.device)


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def warn_of_truncation(settings: SamplingSettings) -> None:
    """Warns that a truncating sampler does not sample from the distribution whose log-probabilities train."""
    if settings.top_k or settings.top_p < 1:
        warnings.warn(
            f"sampling.top_k={settings.top_k}, top_p={settings.top_p} cut the distribution that is sampled, but not "
            "the one that is trained: KL estimates are biased and may turn negative. Train with top_k=0 and top_p=1.",
            stacklevel=2,
        )
