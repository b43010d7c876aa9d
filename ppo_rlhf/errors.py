"""A user's mistake: one line that names the thing, the value and the way out; the commands exit with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Raised where user input enters: configuration, data, models, reward functions."""


class Interrupted(KeyboardInterrupt):
    """A run that ended between two steps because it was asked to, by Ctrl-C or a signal, with all of its work saved."""

    def __init__(self, message: str, code: int) -> None:
        """message: what was saved, and how to go on. code: of the command's exit."""
        super().__init__(message)
        self.code = code


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The sentence that offers the nearest known name, with a leading space, or nothing where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""
