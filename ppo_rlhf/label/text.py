"""Model text made readable: Markdown as HTML in which nothing can act, chats as turns, languages as tags.

What is shown is what was written: HTML stays text, and so do links and pictures, so that nothing in a response can be
followed, loaded or hidden.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from ppo_rlhf.preferences import Prompt

LONGEST_MARKDOWN = 20_000  # characters; longer texts are shown as they are
INERT = ("link", "image", "autolink", "reference")
FIRST_HEADING = 3  # of a text, below the page's own
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant|System): ?")
ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}
SCRIPTS = {
    "ja": r"[\u3040-\u30ff]",
    "ko": r"[\u1100-\u11ff\u3130-\u318f\uac00-\ud7af]",
    "zh": r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]",
    "ar": r"[\u0600-\u06ff\u0750-\u077f\u08a0-\u08ff]",
    "he": r"[\u0590-\u05ff]",
    "hi": r"[\u0900-\u097f]",
    "th": r"[\u0e00-\u0e7f]",
}
SCRIPT_SHARE = 0.3  # of a text's letters; kana beside Chinese characters are fewer


@dataclass(frozen=True)
class Turn:
    """One message of a chat."""

    role: str
    text: str
    html: Markup
    language: str | None


def turns_of(prompt: Prompt, language: str | None) -> list[Turn]:
    """A prompt's turns: its messages, or the "Human:" and "Assistant:" turns of a text, else one without a role.

    A last turn of the assistant's that is empty, where the response goes on, is left out.
    """
    messages = _messages_in(prompt) if isinstance(prompt, str) else prompt
    contents = [(message["role"], message["content"]) for message in messages]
    return [Turn(role, text, html_of(text), language or language_of(text)) for role, text in contents]


def _messages_in(prompt: str) -> list[dict[str, str]]:
    parts = TURN.split(prompt)
    before, rest = parts[0], parts[1:]
    if len(rest) < 2 or before.strip():
        return [{"role": "", "content": prompt}]
    turns = [{"role": ROLES[role], "content": content} for role, content in zip(rest[::2], rest[1::2], strict=True)]
    return turns[:-1] if not turns[-1]["content"].strip() else turns


@lru_cache(maxsize=4096)
def html_of(text: str) -> Markup:
    """Markdown as HTML without links, pictures or HTML of its own; each outer block finds its direction by itself."""
    if len(text) > LONGEST_MARKDOWN:
        return Markup('<pre class="plain" dir="auto">{}</pre>').format(text)
    tokens = _MARKDOWN.parse(text.strip("\n"))
    for token in tokens:
        if token.nesting == 1 and token.level == 0:  # a list's items go with the list
            token.attrSet("dir", "auto")
        if token.type.startswith("heading_"):
            token.tag = f"h{min(6, FIRST_HEADING - 1 + int(token.tag[1:]))}"
    return Markup(_MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {}))  # the renderer escapes


def _code(_: object, tokens: Sequence[Token], index: int, *__: object) -> str:
    return str(Markup('<pre dir="ltr"><code>{}</code></pre>\n').format(tokens[index].content.rstrip("\n")))


def language_of(text: str) -> str | None:
    """The tag of a language that is told by its script; None for one in Latin or another script."""
    letters = sum(character.isalpha() for character in text)
    shares = {tag: len(re.findall(script, text)) / letters for tag, script in SCRIPTS.items()} if letters else {}
    if shares.get("ja") and shares["ja"] + shares["zh"] > SCRIPT_SHARE:
        return "ja"
    best = max(shares, key=shares.__getitem__, default=None)
    return best if best is not None and shares[best] > SCRIPT_SHARE else None


_MARKDOWN = MarkdownIt("js-default", {"breaks": True}).disable(list(INERT))
_MARKDOWN.add_render_rule("fence", _code)
_MARKDOWN.add_render_rule("code_block", _code)
