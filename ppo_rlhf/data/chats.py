"""Conversations as a model reads them: rendered by the tokenizer's chat template, and which of it an assistant said."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_rlhf.errors import UserError
from ppo_rlhf.messages import Message, num_shared

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # with which a template says what an assistant writes


def with_chat_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer with the template of a Jinja file where one is given. Raises UserError where it cannot be read."""
    if path is not None:
        try:
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"chat_template={path} cannot be read: {error}") from error
    return tokenizer


def rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str, arguments: dict[str, Any]
) -> str:
    """The conversation as text. arguments: those of apply_chat_template, and the template's own.

    Raises UserError, which begins with `where`, where there is no template or it refuses the conversation.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            f"{where} is a conversation, and the tokenizer has no chat template; give one, a Jinja file, as "
            "chat_template, or start from a model that has one."
        )
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **arguments))
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where}: the chat template refuses the conversation: {first}") from error


def rendered_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str, arguments: dict[str, Any]
) -> str:
    """What a policy responds to: with the head of an assistant's turn, or where the last turn is one, open to go on.

    Raises UserError for a prompt that ends with another role, after which nobody responds.
    """
    role = messages[-1]["role"]
    if role not in ("user", "tool", "assistant"):
        raise UserError(
            f"{where}: a prompt must end with a user's, a tool's or an assistant's message, not a {role}'s."
        )
    going_on = role == "assistant"
    flags = {"continue_final_message": going_on, "add_generation_prompt": not going_on}
    return rendered(tokenizer, messages, where, arguments | flags)


def rendered_response(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    response: Sequence[Message],
    where: str,
    arguments: dict[str, Any],
) -> tuple[str, str]:
    """The texts of a prompt and of a response to it, as a policy would read and write them: without the turn's end."""
    text = rendered(tokenizer, [*prompt, *response], where, arguments)
    place = num_shared(rendered_prompt(tokenizer, prompt, where, arguments), text)
    return text[:place], without_end(text[place:], tokenizer)[0]


def without_end(turn: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What an assistant says in a turn, and the special token with which the template ends it, or nothing."""
    stripped = turn.rstrip()
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and stripped.endswith(token.content):
            return stripped.removesuffix(token.content), token.content
    return turn, ""


def ids_and_places(
    tokenizer: PreTrainedTokenizerBase, text: str, where: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """The tokens of a text and where each begins and ends in it, in characters.

    Raises UserError where the tokenizer, a slow one, does not know.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{where}: the policy's tokenizer is a slow one, which does not tell where its tokens stand.")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], encoded["offset_mapping"]


def tokens_and_mask(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    where: str,
    arguments: dict[str, Any],
    *,
    first: int = 0,
) -> tuple[list[int], list[bool]]:
    """The ids that apply_chat_template gives, and which of them assistants write, from message `first` on.

    Where the template has no `{% generation %}` marks that say so, an assistant's turn is what its message adds to the
    rendered conversation before it, through the special token that ends it.

    Raises UserError where no assistant speaks, or the template renders the beginning of a conversation differently from
    the whole.
    """
    text = rendered(tokenizer, messages, where, arguments)
    ids, places = ids_and_places(tokenizer, text, where)
    begin = num_shared(rendered_prompt(tokenizer, messages[:first], where, arguments), text) if first else 0
    if GENERATION_MARKS.search(tokenizer.get_chat_template()):
        marked: Any = tokenizer.apply_chat_template(
            list(messages), return_dict=True, return_assistant_tokens_mask=True, **arguments
        )
        written = marked["assistant_masks"]
    else:
        spans = assistant_spans(tokenizer, messages, text, where, arguments)
        written = [any(a < end and start < b for start, end in spans) for a, b in places]
    learnt = [bool(mark) and b > begin for mark, (_, b) in zip(written, places, strict=True)]
    if not any(learnt):
        raise UserError(f"{where}: no assistant speaks in the conversation, so there is nothing to learn.")
    return ids, learnt


def assistant_spans(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    text: str,
    where: str,
    arguments: dict[str, Any],
) -> list[tuple[int, int]]:
    """Where the assistants' turns begin and end in the rendered conversation, in characters."""
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        through = text if index + 1 == len(messages) else rendered(tokenizer, messages[: index + 1], where, arguments)
        opened = arguments | {"add_generation_prompt": True}
        start = num_shared(rendered(tokenizer, messages[:index], where, opened), text) if index else 0
        if not text.startswith(through) or start > len(through):
            raise UserError(
                f"{where}: the chat template renders message {index} differently when others follow, so its tokens "
                "cannot be told: give a template with {% generation %} marks as chat_template, or the last turn alone "
                "as `prompt` and `completion`."
            )
        said, end = without_end(through[start:], tokenizer)
        spans.append((start, start + len(said) + len(end)))
    return spans
