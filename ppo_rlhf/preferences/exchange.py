"""Comparisons in and out: the formats that reward models are trained on, and that are published."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ppo_rlhf.errors import UserError
from ppo_rlhf.messages import Message, messages_of, split_chats
from ppo_rlhf.preferences.store import Choice, Pair, Prompt
from ppo_rlhf.settings import Ties

Row = dict[str, Any]

LONGEST_TEXT = 200_000  # characters that a person is asked to read
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # how published comparisons write a chat as text


# ------------------------------------------------------------------------------------------------------------------ out


def ranked_rows(choices: Sequence[Choice]) -> list[Row]:
    """A row for each choice but the skipped: prompt as text, responses, ranks (1 the best), margin, annotator.

    messages: the prompt where it is a chat, for models with a chat template.
    """
    return [
        {
            "prompt": text_of(choice.pair.prompt),
            "messages": None if isinstance(choice.pair.prompt, str) else choice.pair.prompt,
            "responses": choice.pair.responses,
            "ranks": choice.ranks,
            "margin": choice.margin,
            "annotator": choice.annotator,
        }
        for choice in choices
        if choice.ranks is not None
    ]


def pair_rows(choices: Sequence[Choice], *, ties: Ties) -> list[Row]:
    """A row for each pair of responses: prompt, chosen, rejected, annotator, margin, weight.

    weight: 1 over the number of pairs in a ranking, so that every choice weighs the same. ties: left out (drop), or a
    row in each order, of full weight (both) or of half (half).
    """
    rows = []
    for choice in choices:
        if choice.ranks is None:
            continue
        weight = 1 / math.comb(len(choice.ranks), 2)
        for a, b in itertools.permutations(range(len(choice.ranks)), 2):
            tie = choice.ranks[a] == choice.ranks[b]
            if choice.ranks[a] > choice.ranks[b] or (tie and ties == "drop"):
                continue
            rows.append(
                {
                    "prompt": choice.pair.prompt,
                    "chosen": choice.pair.responses[a],
                    "rejected": choice.pair.responses[b],
                    "annotator": choice.annotator,
                    "margin": choice.margin,
                    "weight": weight / 2 if tie and ties == "half" else weight,
                }
            )
    return rows


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Writes rows as JSONL or Parquet, whole or not at all. Raises UserError for another ending, or no such folder."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{path} must end in .jsonl or .parquet.")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent}.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.suffix == ".jsonl":
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        else:
            from datasets import Dataset, disable_progress_bars

            disable_progress_bars()
            Dataset.from_list(list(rows)).to_parquet(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def text_of(prompt: Prompt) -> str:
    """A prompt as a model without a chat template reads it: a chat as "Human:" and "Assistant:" turns."""
    if isinstance(prompt, str):
        return prompt
    return "".join(map(_turn, prompt)) + ASSISTANT


def _turn(message: Message) -> str:
    heads = {"user": HUMAN, "assistant": ASSISTANT}
    return f"{heads.get(message['role'], chr(10) * 2 + message['role'].capitalize() + ':')} {message['content']}"


# ------------------------------------------------------------------------------------------------------------------- in


def pairs_from(rows: Iterable[Row], *, name: str) -> list[Pair]:
    """Pairs to be judged: rows of `prompt`, a text or a chat's messages, and `responses`, two or more texts.

    Optional columns: `sources`, who wrote each; `language`. Rows of `prompt`, `chosen` and `rejected` are taken too, to
    be judged anew. Raises UserError for a row that is neither.
    """
    pairs = []
    for index, row in enumerate(map(_without_blanks, rows)):
        where = f"{name}: row {index}"
        if "responses" not in row and {"chosen", "rejected"} <= set(row):
            prompt, responses = _split(row, where)
        else:
            prompt, responses = _prompt(row.get("prompt"), where), _responses(row.get("responses"), where)
        longest = max(map(len, (text_of(prompt), *responses)))
        if longest > LONGEST_TEXT:
            raise UserError(f"{where} has a text of {longest} characters; {LONGEST_TEXT} are the most.")
        pairs.append(Pair(prompt, responses, _sources(row.get("sources"), responses, where), _language(row, where)))
    return pairs


def all_pairs(several: Iterable[Pair]) -> list[Pair]:
    """Each two of the responses to a prompt as a pair of its own."""
    return [
        replace(
            each, responses=[each.responses[i] for i in both], sources=[each.sources[i] for i in both if each.sources]
        )
        for each in several
        for both in itertools.combinations(range(len(each.responses)), 2)
    ]


def choices_from(rows: Iterable[Row], *, name: str) -> list[Choice]:
    """Choices made elsewhere, from the usual formats:

        prompt, chosen, rejected          texts, or messages
        chosen, rejected                  whole chats, as texts ("Human:", "Assistant:") or messages: what they share is
                                          the prompt
        prompt, responses, ranks          a ranking, 1 the best

    Optional columns: `annotator`, `margin`. Raises UserError for a row that is none of them.
    """
    choices = []
    for index, row in enumerate(map(_without_blanks, rows)):
        where = f"{name}: row {index}"
        if "ranks" in row:
            prompt, responses = _prompt(row.get("prompt"), where), _responses(row.get("responses"), where)
            ranks = row["ranks"]
            if not isinstance(ranks, list) or len(ranks) != len(responses) or not all(map(_is_number, ranks)):
                raise UserError(f"{where}: `ranks` must be a list of {len(responses)} numbers, one a response.")
            distinct = sorted(set(ranks))
            ranks = [distinct.index(rank) + 1 for rank in ranks]
        elif "chosen" in row and "rejected" in row:
            (prompt, responses), ranks = _split(row, where), [1, 2]
        else:
            raise UserError(
                f"{where} has {', '.join(sorted(row))}; it needs `chosen` and `rejected` [, `prompt`], or `prompt`, "
                "`responses` and `ranks`."
            )
        margin = row.get("margin")
        if margin is not None and not _is_number(margin):
            raise UserError(f"{where}: `margin` is {margin!r}, not a number.")
        annotator = str(row.get("annotator") or "imported")
        sources = _sources(row.get("sources"), responses, where)
        choices.append(Choice(Pair(prompt, responses, sources), annotator, "ranking", ranks, margin=margin))
    return choices


def _without_blanks(row: Row) -> Row:
    """The row without the columns that only other rows of its table have."""
    return {name: value for name, value in row.items() if value is not None}


def _split(row: Row, where: str) -> tuple[Prompt, list[str]]:
    """The prompt, given or shared by both chats, and the chosen and the rejected response."""
    sides = [row["chosen"], row["rejected"]]
    given: Any = row.get("prompt")
    if all(isinstance(side, str) and side for side in sides):
        if given is not None:
            return _prompt(given, where), sides
        same = itertools.takewhile(lambda both: both[0] == both[1], zip(*sides, strict=False))
        place = sides[0].rfind(ASSISTANT, 0, sum(1 for _ in same)) + len(ASSISTANT)
        if place < len(ASSISTANT):
            raise UserError(f"{where} has no `prompt`, and its sides share no turn of a chat up to 'Assistant:'.")
        return sides[0][:place], [side[place:] for side in sides]
    if not all(isinstance(side, list) and side for side in sides):
        raise UserError(f"{where}: `chosen` and `rejected` must both be texts, or both messages, and not empty.")
    chats = [messages_of(side, where) for side in sides]
    prompt, responses = split_chats(chats, None if given is None else _prompt(given, where), where)
    return prompt, [_response_of(response) for response in responses]


def _response_of(messages: list[Message]) -> str:
    """One message's content; of several, all turns as text."""
    return messages[0]["content"] if len(messages) == 1 else "".join(map(_turn, messages)).strip()


def _prompt(prompt: Any, where: str) -> Prompt:
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt:
        return messages_of(prompt, where)
    raise UserError(f"{where}: `prompt` must be a text or a list of messages, and not empty.")


def _responses(responses: Any, where: str) -> list[str]:
    if not isinstance(responses, list) or len(responses) < 2 or not all(isinstance(text, str) for text in responses):
        raise UserError(f"{where}: `responses` must be a list of two or more texts.")
    return responses


def _sources(sources: Any, responses: list[str], where: str) -> list[str | None]:
    if sources is None:
        return []
    if not isinstance(sources, list) or len(sources) != len(responses):
        raise UserError(f"{where}: `sources` must be a list of {len(responses)} names, one a response.")
    return [None if source is None else str(source) for source in sources]


def _language(row: Row, where: str) -> str | None:
    language = row.get("language")
    if language is not None and not isinstance(language, str):
        raise UserError(f"{where}: `language` must be a tag such as 'ar' or 'zh-Hant', not {language!r}.")
    return language


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
