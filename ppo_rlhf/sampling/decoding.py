"""`decode`: a key–value cache in place; finished rows leave the batch, waiting ones enter.

A prompt is read up to its last token. Then each step reads one token of every row and draws the next, so that rows of
any age go together, and a prompt that is sampled many times is read once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_rlhf.errors import UserError
from ppo_rlhf.forwards import Forward, forward_of, has_windows
from ppo_rlhf.kv_cache import ColumnCache
from ppo_rlhf.models import context_length, evaluating, takes_position_ids
from ppo_rlhf.sampling.tokens import draw, stop_ids_of, stop_strings_end
from ppo_rlhf.settings import SamplingSettings

ADMISSION_SHARE = 0.25  # prompts enter when so many rows are free: reading several costs little more than reading one
SPARE_COLUMNS = 64  # steps between two moves of the whole cache, where prompts wait
TOKENS_READ_TOGETHER = (256, 2**14)  # on a CPU and on a GPU: prompts of like length in one pass, with little padding
MIN_SHARED_PREFIX = 8  # a beginning common to all prompts is read once from this length on


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
    last_tokens: Tensor  # (B + 1,) of the prompts; of no prompt 0
    last_positions: Tensor  # (B + 1,) of these tokens
    running: int = 0

    @classmethod
    def free(cls, prompts: list[list[int]], num_slots: int, device: torch.device) -> Slots:
        """Before the first prompt."""
        rows = torch.full((num_slots,), len(prompts), device=device)
        last_tokens = torch.tensor([line[-1] for line in prompts] + [0], device=device)
        last_positions = torch.tensor([len(line) - 1 for line in prompts] + [0], device=device)
        return cls(rows, torch.zeros_like(rows), last_tokens, last_positions)

    @property
    def idle(self) -> int:
        """The number of no prompt."""
        return len(self.last_tokens) - 1

    def admitted(self, waiting: list[int]) -> list[int]:
        """Takes the next prompts from those that wait, the last one first; none while too few slots are free."""
        free = len(self.rows) - self.running
        if free < min(len(waiting), max(1, ADMISSION_SHARE * len(self.rows))):
            return []
        return [waiting.pop() for _ in range(min(free, len(waiting)))]

    def take(self, group: list[int], cache: ColumnCache) -> Tensor:
        """Free slots for these prompts. → (k,)"""
        slots = (self.rows == self.idle).nonzero().squeeze(1)[: len(group)]
        self.rows[slots] = torch.tensor(group, device=slots.device)
        self.tokens[slots] = self.last_tokens[self.rows[slots]]
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
    device, limit = model.device, settings.max_new_tokens
    cache = _cache_for(model, prompts, settings, static=device.type == "cuda" if static is None else static)
    slots = Slots.free(prompts, cache.window.num_rows, device)
    drawn = Drawn.nothing(len(prompts), limit, int(tokenizer.pad_token_id), device)
    noise = torch.cat([noise[:, :limit].to(device), noise.new_zeros(1, limit, device=device)])
    stop_ids = torch.tensor(stop_ids_of(settings, tokenizer), device=device)
    waiting = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), prompts[row]))  # the last one first

    with evaluating(model):
        read = forward_of(model, num_rows=len(slots.rows))
        step = _step_of(read, cache)
        prefix = _read_shared_prefix(model, read, cache, prompts)
        while waiting or slots.running:
            if group := slots.admitted(waiting):
                places = slots.take(group, cache)
                _read_prompts(read, cache, [prompts[row][:-1] for row in group], places, prefix)

            used = cache.window.used
            rows, steps = slots.rows[:used], drawn.lengths[slots.rows[:used]]
            positions = (slots.last_positions[rows] + steps)[:, None]
            forward = step if cache.is_initialized else read  # prompts of one token leave the buffers to be made here
            logits = forward(slots.tokens[:used, None], positions, cache.open_column(), cache)
            cache.close_column()
            slots.tokens[:used], logprobs = draw(logits, noise[rows, steps], settings)
            drawn.add(rows, steps, slots.tokens[:used], logprobs)
            stopped = (slots.tokens[:used, None] == stop_ids).any(1)
            if settings.stop_strings:
                stopped |= stop_strings_end(tokenizer, drawn.ids, rows, steps, settings)
            ended = drawn.end(rows, stopped)
            yield drawn
            if len(drawn.ended):
                slots.leave(ended, cache)


def _step_of(read: Forward, cache: ColumnCache) -> Forward:
    """The forward pass of one token a row, compiled on a GPU, where its shape stays the same."""
    if cache.window.static and cache.visible.is_cuda:  # pragma: no cover - needs a GPU
        return torch.compile(read, mode="reduce-overhead", fullgraph=True)
    return read


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


def _cache_for(
    model: PreTrainedModel, prompts: list[list[int]], settings: SamplingSettings, *, static: bool
) -> ColumnCache:
    longest = max(map(len, prompts)) - 1
    num_slots, num_columns = cache_room(settings, len(prompts), longest)
    num_layers = model.config.get_text_config().num_hidden_layers
    return ColumnCache(num_layers, num_slots, num_columns, longest, device=model.device, static=static)


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
