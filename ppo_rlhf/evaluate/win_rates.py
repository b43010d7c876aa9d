"""Which of two responses to a prompt is the better one: by their scores, or by a judge. A tie is half a win."""

from __future__ import annotations

from collections.abc import Sequence

from ppo_rlhf.errors import UserError
from ppo_rlhf.references import call, is_reference, load_object

WINS = {"a": 1.0, "tie": 0.5, "b": 0.0}  # of the first response


def wins_by_score(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """1 where mine is higher, 0 where theirs is, 0.5 where they are equal."""
    return [0.5 * (1 + (a > b) - (a < b)) for a, b in zip(mine, theirs, strict=True)]


def wins_by_judge(judge: str, prompts: Sequence[str], mine: Sequence[str], theirs: Sequence[str]) -> list[float]:
    """The mean of two judgements of each pair, in either order: 0.5 where the judge goes by the position.

    judge: `module:function`, called as function(prompts, a, b). Raises UserError for what it raises, and for anything
    but "a", "b" or "tie" for each pair.
    """
    forwards = _judged(judge, prompts, mine, theirs)
    backwards = _judged(judge, prompts, theirs, mine)
    return [(first + 1 - second) / 2 for first, second in zip(forwards, backwards, strict=True)]


def _judged(judge: str, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> list[float]:
    answers = call(judge, list(prompts), list(a), list(b))
    if not isinstance(answers, Sequence) or isinstance(answers, str) or len(answers) != len(prompts):
        raise UserError(f'--judge: {judge} must return "a", "b" or "tie" for each of {len(prompts)} prompts.')
    for prompt, answer in zip(prompts, answers, strict=True):
        if not isinstance(answer, str) or answer not in WINS:
            raise UserError(f'--judge: {judge} answered {answer!r} to prompt {prompt!r}, not "a", "b" or "tie".')
    return [WINS[answer] for answer in answers]


def check_judge(judge: str) -> None:
    """Raises UserError for a judge that is no function, before anything is sampled."""
    if not is_reference(judge):
        raise UserError(f"--judge {judge} must be module:function, or file.py:function.")
    if not callable(load_object(judge)):
        raise UserError(f"--judge: {judge} is not a function.")
