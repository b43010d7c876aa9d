"""The formats of rows, found by their columns, and what a model reads of each: small functions, one a format.

`text`; `prompt` and `completion`; `prompt`; `prompt`, `chosen` and `rejected`, or these two with a prompt that they
share; `prompt`, `responses` and `ranks`; each also as conversations, and whole ones as `messages`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ppo_rlhf.data.chats import ids_and_places, rendered_prompt, rendered_response, tokens_and_mask
from ppo_rlhf.data.rows import Row, Rows, text_column
from ppo_rlhf.data.tokens import Example, Examples, key_of, stored
from ppo_rlhf.errors import UserError, did_you_mean
from ppo_rlhf.messages import Message, messages_of, num_shared, split_chats
from ppo_rlhf.settings import TooLong

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

WAY_OUT = "columns are given other names, or left out, by --columns '{theirs: prompt, another: null}'"


# ------------------------------------------------------------------------------------------------ demonstrations


def demonstrations(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, *, longest: int, too_long: TooLong, setting: str
) -> Examples:
    """Rows of `messages`, of `prompt` and `completion`, or of `text`, as the tokens to learn; cached on disk.

    Raises UserError for rows of none or several of these formats, or that cannot be read.
    """
    table = stored(lambda: _demonstrations(rows, tokenizer, setting), key_of(rows, tokenizer))
    return Examples(rows, table, longest=longest, too_long=too_long, setting=setting)


def _demonstrations(rows: Rows, tokenizer: PreTrainedTokenizerBase, setting: str) -> Iterator[Example]:
    found = {name for name in ("messages", "completion", "text") if name in rows[0]}
    if found == {"messages"}:
        return _of_conversations(rows, tokenizer, setting)
    if found == {"text"}:
        return _of_texts(rows, tokenizer, setting)
    if found == {"completion"}:
        chats = any(isinstance(rows[0].get(name), list) for name in ("prompt", "completion"))
        return (_of_answers if chats else _of_completions)(rows, tokenizer, setting)
    raise UserError(
        f"{setting}: demonstrations need `prompt` and `completion`, or `text`, or `messages`, one of the three; found "
        f"{', '.join(sorted(rows[0]))}; {WAY_OUT}.{did_you_mean('completion', rows[0])}"
    )


def _of_texts(rows: Rows, tokenizer: PreTrainedTokenizerBase, setting: str) -> Iterator[Example]:
    """Everything after the first token is learnt, and eos."""
    for index, text in enumerate(text_column(rows, "text", setting=setting)):
        ids = first_ids(tokenizer, text)
        yield _ended(ids[:1], ids[1:], tokenizer, f"{setting}: row {index}")


def _of_completions(rows: Rows, tokenizer: PreTrainedTokenizerBase, setting: str) -> Iterator[Example]:
    """The completion and eos are learnt. Both sides are encoded apart, as they are when the policy responds."""
    prompts, completions = (text_column(rows, name, setting=setting) for name in ("prompt", "completion"))
    special = set(tokenizer.all_special_ids)
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        before, where = first_ids(tokenizer, prompt), f"{setting}: row {index}"
        if special.issuperset(before):
            raise UserError(
                f"{where}: the tokenizer finds no token in the prompt {prompt!r}, or special ones alone; give it some "
                "text, or remove the row."
            )
        yield _ended(before, tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer, where)


def _ended(prompt: list[int], completion: list[int], tokenizer: PreTrainedTokenizerBase, where: str) -> Example:
    if not prompt:  # nothing would predict the first token to learn
        raise UserError(f"{where}: the tokenizer finds no token in the text or prompt.")
    if completion[-1:] != [tokenizer.eos_token_id]:
        completion = [*completion, int(tokenizer.eos_token_id)]
    return Example([*prompt, *completion], [False] * len(prompt) + [True] * len(completion))


def _of_conversations(rows: Rows, tokenizer: PreTrainedTokenizerBase, setting: str) -> Iterator[Example]:
    """What assistants say is learnt, through the token that ends their turn."""
    for index, row in enumerate(rows):
        where = f"{setting}: row {index}"
        messages = conversation(row.get("messages"), "user", f"{where}, column 'messages'")
        yield Example(*tokens_and_mask(tokenizer, messages, where, template_arguments(row, where)))


def _of_answers(rows: Rows, tokenizer: PreTrainedTokenizerBase, setting: str) -> Iterator[Example]:
    """What assistants say in the completion is learnt."""
    for index, row in enumerate(rows):
        where = f"{setting}: row {index}"
        prompt, completion = _sides(row, where)
        arguments, first = template_arguments(row, where), len(prompt)
        yield Example(*tokens_and_mask(tokenizer, [*prompt, *completion], where, arguments, first=first))


def _sides(row: Row, where: str) -> tuple[list[Message], list[Message]]:
    prompt = conversation(row.get("prompt"), "user", f"{where}, column 'prompt'")
    return prompt, conversation(row.get("completion"), "assistant", f"{where}, column 'completion'")


def prompts_and_completions(rows: Rows, tokenizer: PreTrainedTokenizerBase, setting: str) -> list[Row]:
    """Rows of `prompt` and `completion` of demonstrations, the completion as text; none of plain texts."""
    found = []
    for index, row in enumerate(rows):
        where = f"{setting}: row {index}"
        if "messages" in row:
            messages = conversation(row["messages"], "user", where)
            last = max(place for place, message in enumerate(messages) if message["role"] == "assistant")
            row = row | {"prompt": messages[:last], "completion": messages[last : last + 1]}
        if not row.get("prompt") or "completion" not in row:
            continue
        if any(isinstance(row[name], list) for name in ("prompt", "completion")):
            prompt, completion = _sides(row, where)
            _, text = rendered_response(tokenizer, prompt, completion, where, template_arguments(row, where))
            row = row | {"prompt": prompt, "completion": text}
        found.append(row)
    return found


# --------------------------------------------------------------------------------------------------- comparisons


def comparisons(rows: Rows, tokenizer: PreTrainedTokenizerBase, *, setting: str) -> list[Row]:
    """Comparisons whose `prompt`, and `chosen` and `rejected` or `responses`, are texts, as the policy writes them.

    Raises UserError for rows of both kinds, for conversations that cannot be read, and where no prompt is given and the
    two sides share none.
    """
    if {"chosen", "rejected"} & set(rows[0]) and "responses" in rows[0]:
        raise UserError(
            f"{setting}: comparisons are either `chosen` and `rejected`, or `responses` and `ranks`; found "
            f"{', '.join(sorted(rows[0]))}; {WAY_OUT}."
        )
    return [_comparison(row, tokenizer, f"{setting}: row {index}") for index, row in enumerate(rows)]


def _comparison(row: Row, tokenizer: PreTrainedTokenizerBase, where: str) -> Row:
    if isinstance(row.get("responses"), list):
        if isinstance(row.get("messages"), list) and tokenizer.chat_template is not None:  # people's choices on a chat
            row = row | {"prompt": row["messages"]}
        return _ranked_answers(row, tokenizer, where) if isinstance(row.get("prompt"), list) else row
    if not {"chosen", "rejected"} <= set(row):
        return row
    if any(isinstance(row.get(name), list) for name in ("prompt", "chosen", "rejected")):
        return _compared_answers(row, tokenizer, where)
    if "prompt" not in row and isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
        return _with_shared_prompt(row, tokenizer, where)
    return row


def _with_shared_prompt(row: Row, tokenizer: PreTrainedTokenizerBase, where: str) -> Row:
    """The prompt is what the two texts begin with in common, up to the end of a token of both."""
    sides = row["chosen"], row["rejected"]
    (ids, places), (others, _) = (ids_and_places(tokenizer, side, where) for side in sides)
    ends = [0, *(end for _, end in places[: num_shared(ids, others)])]
    same = num_shared(*sides)  # tokens may share a character's first bytes alone
    place = max(end for end in ends if end <= same)
    if not sides[0][:place].strip():
        hint = did_you_mean("prompt", row)
        raise UserError(f"{where} has no `prompt`, and its sides share no beginning; {WAY_OUT}.{hint}")
    return row | {"prompt": sides[0][:place], "chosen": sides[0][place:], "rejected": sides[1][place:]}


def _compared_answers(row: Row, tokenizer: PreTrainedTokenizerBase, where: str) -> Row:
    given = row.get("prompt")
    if isinstance(given, list):
        given = conversation(given, "user", f"{where}, column 'prompt'")
    chats = [conversation(row[name], "assistant", f"{where}, column {name!r}") for name in ("chosen", "rejected")]
    prompt, answers = split_chats(chats, given, where)
    text, (chosen, rejected) = _answers(prompt, answers, row, tokenizer, where)
    return row | {"prompt": text, "chosen": chosen, "rejected": rejected}


def _ranked_answers(row: Row, tokenizer: PreTrainedTokenizerBase, where: str) -> Row:
    prompt = conversation(row["prompt"], "user", f"{where}, column 'prompt'")
    answers = [conversation(each, "assistant", f"{where}, column 'responses'") for each in row["responses"]]
    text, responses = _answers(prompt, answers, row, tokenizer, where)
    return row | {"prompt": text, "responses": responses}


def _answers(
    prompt: Sequence[Message] | str,
    answers: Sequence[Sequence[Message]],
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
) -> tuple[str, list[str]]:
    """A rendered prompt, and each answer to it as a policy would write it."""
    asked = conversation(prompt, "user", where)
    arguments = template_arguments(row, where)
    both = [rendered_response(tokenizer, asked, answer, where, arguments) for answer in answers]
    place = num_shared(*(text for text, _ in both))
    return both[0][0][:place], [(text + said)[place:] for text, said in both]


def responses_in_tokens(
    prompts: Sequence[str], responses: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Each response to each prompt as an example, in a row: the prompt, then the response and eos, which count as
    learnt; cached on disk.
    """
    rows = [{"prompt": prompt, "responses": said} for prompt, said in zip(prompts, responses, strict=True)]

    def examples() -> Iterator[Example]:
        for prompt, said in zip(prompts, responses, strict=True):
            for before, after in prompt_and_response_ids(tokenizer, [prompt] * len(said), said):
                yield Example([*before, *after], [False] * len(before) + [True] * len(after))

    return stored(examples, key_of(rows, tokenizer))


# ------------------------------------------------------------------------------------------------------- prompts


def prompt_texts_and_ids(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, *, setting: str
) -> tuple[list[str], list[list[int]]]:
    """What the policy responds to, as text and as tokens: a text, or a conversation with the head of its answer."""
    if not any(isinstance(row.get("prompt"), list) for row in rows):
        texts = text_column(rows, "prompt", setting=setting)
        return texts, [first_ids(tokenizer, text) for text in texts]
    texts = []
    for index, row in enumerate(rows):
        where = f"{setting}: row {index}"
        messages = conversation(row["prompt"], "user", f"{where}, column 'prompt'")
        texts.append(rendered_prompt(tokenizer, messages, where, template_arguments(row, where)))
    return texts, [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


# -------------------------------------------------------------------------------------------------------- shared


def first_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that begins a sequence: with one bos, also where a chat template has written it already."""
    ids: list[int] = tokenizer(text)["input_ids"]
    twice = [tokenizer.bos_token_id] * 2
    return ids[1:] if ids[:2] == twice and tokenizer(text, add_special_tokens=False)["input_ids"][:2] != twice else ids


def prompt_and_response_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], responses: Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """The tokens of each prompt, and of its response with eos: their border is always a token border."""
    response_ids = tokenizer(list(responses), add_special_tokens=False)["input_ids"]
    pairs = zip(prompts, response_ids, strict=True)
    return [(first_ids(tokenizer, prompt), [*response, int(tokenizer.eos_token_id)]) for prompt, response in pairs]


def conversation(value: Any, role: str, where: str) -> list[Message]:
    """Messages; a text is one message of the role. Raises UserError for what is neither, or empty."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} must be a text or a list of messages, and not empty; it is {value!r}.")
    return messages_of(value, f"{where}, a list")


def template_arguments(row: Row, where: str) -> dict[str, Any]:
    """What a row gives its chat template besides messages: `tools`, also as JSON, and `chat_template_kwargs`.

    Raises UserError, which begins with `where`, for others than a list and a mapping.
    """
    tools, more = row.get("tools") or None, row.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UserError(f"{where}: `tools` is no JSON: {error}") from error
    if not isinstance(tools, list | None) or not isinstance(more, dict):
        raise UserError(f"{where}: `tools` must be a list, and `chat_template_kwargs` a mapping.")
    return {"tools": tools} | more
