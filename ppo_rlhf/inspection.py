"""What a model will really see of a stage's data: counts, lengths, and examples token by token with what is learnt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ppo_rlhf.config import PPOConfig, RewardConfig, SFTConfig
from ppo_rlhf.data import Example, comparisons, load_rows, with_chat_template
from ppo_rlhf.models import load_reader
from ppo_rlhf.prompts import Prompts
from ppo_rlhf.train.inputs import named
from ppo_rlhf.train.rankings import fitting, rankings_of
from ppo_rlhf.train.sft import demonstrations_of

PERCENTILES = {"shortest": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "longest": 1.0}
LONGEST_CHARACTER = 4  # tokens: UTF-8 takes as many bytes at most
SEEN, LEARNT, SPECIAL = ("blue", "cyan"), ("green", "bright_green"), "reverse"


@dataclass(frozen=True)
class Shown:
    """A text that the model sees."""

    name: str  # demonstration, prompt; chosen, rejected, or a rank
    tokens: list[str]
    ids: list[int]
    learnt: list[bool]  # in demonstrations; in comparisons the response


@dataclass(frozen=True)
class Inspection:
    """A stage's data as its model sees it."""

    stage: str
    data: str
    columns: list[str]
    rows: int
    dropped: int  # for their length
    cut: int
    tokens: int
    learnt_tokens: int
    lengths: dict[str, int]  # of the texts, in tokens: percentiles
    context: int  # what fits
    specials: dict[str, int]  # how often each special token occurs
    notes: list[str]
    shown: list[Shown]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def inspect_sft(config: SFTConfig, *, count: int) -> Inspection:
    """Demonstrations: the prompt is seen, what follows is learnt."""
    source, tokenizer, context = _read(config.policy, config.data, "data", config)
    rows = load_rows(source, required=(), setting="data", columns=config.columns)
    longest = min(config.max_length or context, context)
    examples = demonstrations_of(config, rows, tokenizer, longest=longest, setting="data")
    notes = examples.told("demonstrations")
    if not any(tokenizer.eos_token_id in _learnt(example) for example in examples):
        notes.append(
            f"no example learns {tokenizer.eos_token}, the eos token: responses will end by sampling.stop_token_ids "
            "or sampling.stop_strings alone."
        )
    return _inspection(
        "sft",
        source,
        rows,
        tokenizer,
        {"dropped": examples.num_dropped, "cut": examples.num_cut, "context": context, "notes": notes},
        texts=lambda: (("demonstration", example) for example in examples),
        count=count,
    )


def inspect_reward(config: RewardConfig, *, count: int) -> Inspection:
    """Comparisons: each response with its prompt."""
    source, tokenizer, context = _read(config.policy, config.data, "data", config)
    rows = load_rows(source, required=(), setting="data", columns=config.columns)
    rankings = rankings_of(comparisons(rows, tokenizer, setting="data"), setting="data", ties=config.ties)
    longest = min(config.max_length or context, context)
    fitted = fitting(rankings, tokenizer, longest=longest, too_long=config.too_long, setting="data")

    def texts() -> Iterator[tuple[str, Example]]:
        for ranking, lines in zip(fitted.rankings, fitted.encoded, strict=True):
            for place, ids in enumerate(lines):
                length = len(tokenizer(ranking.responses[place], add_special_tokens=False)["input_ids"]) + 1
                better = {pair[0] for pair in ranking.pairs}
                name = "chosen" if place in better else "rejected"
                yield name, Example(ids, [index >= len(ids) - length for index in range(len(ids))])

    numbers = {"dropped": fitted.num_dropped, "cut": fitted.num_cut, "context": context, "notes": fitted.told()}
    return _inspection("reward", source, rows, tokenizer, numbers, texts=texts, count=2 * count)


def inspect_ppo(config: PPOConfig, *, count: int) -> Inspection:
    """Prompts: nothing is learnt of them; the response follows."""
    source, tokenizer, context = _read(config.policy, config.prompts, "prompts", config)
    rows = load_rows(source, required=("prompt",), setting="prompts", columns=config.columns)
    room = context - config.sampling.max_new_tokens
    longest = min(config.max_prompt_length or room, room)
    prompts = Prompts(rows, tokenizer, longest=longest, setting="prompts", too_long=config.too_long)
    return _inspection(
        "ppo",
        source,
        rows,
        tokenizer,
        {"dropped": prompts.num_dropped, "cut": prompts.num_cut, "context": context, "notes": prompts.told()},
        texts=lambda: (("prompt", Example(ids, [False] * len(ids))) for ids in prompts.ids),
        count=count,
    )


def _read(
    policy: str | None, source: str | None, setting: str, config: SFTConfig | RewardConfig | PPOConfig
) -> tuple[str, PreTrainedTokenizerBase, int]:
    source = named(source, setting, "the rows to inspect")
    policy = named(policy, "policy", "the model whose tokenizer reads the data")
    tokenizer, context = load_reader(policy, setting="policy", trust_remote_code=config.trust_remote_code)
    return source, with_chat_template(tokenizer, config.chat_template), context


def _learnt(example: Example) -> list[int]:
    return [token for token, learnt in zip(example.ids, example.learnt, strict=True) if learnt]


def _inspection(
    stage: str,
    source: str,
    rows: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    numbers: dict[str, Any],
    *,
    texts: Callable[[], Iterable[tuple[str, Example]]],
    count: int,
) -> Inspection:
    lengths: list[int] = []
    shown: list[Shown] = []
    learnt, specials = 0, Counter[int]()
    special_ids = special_ids_of(tokenizer)
    for name, example in texts():
        lengths.append(len(example.ids))
        learnt += sum(example.learnt)
        specials.update(token for token in example.ids if token in special_ids)
        if len(shown) < count:
            shown.append(Shown(name, pieces_of(tokenizer, example.ids), example.ids, example.learnt))
    lengths.sort()
    return Inspection(
        stage=stage,
        data=source,
        columns=list(rows[0]),
        rows=len(rows),
        tokens=sum(lengths),
        learnt_tokens=learnt,
        lengths={name: lengths[round(share * (len(lengths) - 1))] for name, share in PERCENTILES.items()},
        specials={str(tokenizer.decode([token])): number for token, number in specials.most_common()},
        shown=shown,
        **numbers,
    )


def pieces_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token; where it takes several to make a character, the last of them has it, the others none."""
    pieces, begun = [], []
    for place, token in enumerate(ids):
        begun.append(token)
        text = str(tokenizer.decode(begun))
        whole = not text.endswith("�") or len(begun) == LONGEST_CHARACTER or place == len(ids) - 1
        pieces.append(text if whole else "")
        begun = [] if whole else begun
    return pieces


def special_ids_of(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids of tokens that are no text."""
    return {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}


def show(found: Inspection, console: Console) -> None:
    """Prints an inspection: what is learnt stands in ⟦ ⟧, and is green; neighbouring tokens differ in shade."""
    console.print(Text(f"{found.stage}: {found.data}", style="bold"))
    lengths = ", ".join(f"{name} {length}" for name, length in found.lengths.items())
    specials = ", ".join(f"{token} × {number}" for token, number in found.specials.items()) or "none"
    learnt = "belong to responses" if found.stage == "reward" else "are learnt"
    for line in (
        f"rows            {found.rows}, columns {', '.join(found.columns)}",
        f"too long        {found.dropped} dropped, {found.cut} cut",
        f"tokens          {found.tokens}, of which {found.learnt_tokens} {learnt}",
        f"lengths         {lengths}; the context holds {found.context}",
        f"special tokens  {specials}",
    ):
        console.print(Text(line), soft_wrap=True)
    for note in found.notes:
        console.print(Text(f"note            {note}", style="yellow"), soft_wrap=True)
    for shown in found.shown:
        console.print(Text(f"\n{shown.name}, {len(shown.ids)} tokens", style="bold"))
        console.print(coloured(shown, set(found.specials)), soft_wrap=True)


def coloured(shown: Shown, specials: set[str]) -> Text:
    """The tokens of a text, each in another shade than the one before."""
    text = Text()
    previous = False
    for place, (token, learnt) in enumerate(zip(shown.tokens, shown.learnt, strict=True)):
        if learnt != previous:
            text.append("⟦" if learnt else "⟧", style="bold")
        shade = (LEARNT if learnt else SEEN)[place % 2]
        text.append(token.replace("\n", "⏎\n"), style=f"{shade} {SPECIAL}" if token in specials else shade)
        previous = learnt
    return text.append("⟧", style="bold") if previous else text
