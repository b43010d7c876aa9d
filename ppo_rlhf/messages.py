"""Conversations: lists of messages, each of which has a `role` and a `content`; free of heavy imports."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from ppo_rlhf.errors import UserError

Message = dict[str, Any]


def messages_of(messages: Sequence[Any], where: str) -> list[Message]:
    """The messages, without the keys that only others of their table have.

    A call of tools may come without content, which is then empty. Raises UserError, which begins with `where`, for a
    message without role or content.
    """
    found = []
    for message in messages:
        given = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
        if "tool_calls" in given:
            given.setdefault("content", "")
        if not all(isinstance(given.get(key), str) for key in ("role", "content")):
            raise UserError(f"{where}: a message must have `role` and `content`, both texts; {message!r} has not.")
        found.append(given)
    return found


def num_shared(*sequences: Sequence[Any]) -> int:
    """How many items the sequences begin with in common: characters, tokens, messages."""
    same = itertools.takewhile(lambda items: all(item == items[0] for item in items), zip(*sequences, strict=False))
    return sum(1 for _ in same)


def split_chats(
    chats: Sequence[list[Message]], given: list[Message] | str | None, where: str
) -> tuple[list[Message] | str, list[list[Message]]]:
    """The prompt, and each chat's own messages behind it: what the chats share, else the prompt that is given.

    Chats that do not repeat a given prompt's messages begin behind it. At least one message is each chat's own. Raises
    UserError where no prompt is given and the chats share no message.
    """
    shared = num_shared(*(chat[:-1] for chat in chats))
    if shared and (not isinstance(given, list) or all(chat[: len(given)] == given for chat in chats)):
        return chats[0][:shared], [chat[shared:] for chat in chats]
    if given is None:
        raise UserError(f"{where} has no `prompt`, and its sides share no message.")
    return given, list(chats)
