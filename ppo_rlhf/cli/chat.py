"""The command that talks with a policy: lines in, answers out as they are drawn."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from ppo_rlhf.cli.outcome import Outcome
from ppo_rlhf.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from ppo_rlhf.chat import Chat, Judge, Turn

MEASURES = ("score", "kl")
# What moves a terminal's cursor, colours it or turns its text round is shown and not sent; tabs and new lines stay.
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
CONTROLS |= dict.fromkeys([127, *range(128, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)


def add_chat(parser: ArgumentParser) -> None:
    parser.add_argument("policy", help="a run's or a pipeline's folder, a policy's, or a name on the Hub")
    parser.add_argument("--show", type=str, default="", metavar="MEASURES", help="score, kl, or score,kl")
    parser.add_argument("--reward", type=str, help="that scores, instead of the run's own")
    parser.add_argument("--reference", type=str, help="to which KL is measured, instead of where the run started")
    parser.add_argument("--system", type=str, metavar="TEXT", help="stands before all turns, where there is a template")
    parser.add_argument("--single_turn", action="store_true", help="each answer sees its own line alone")
    parser.add_argument("--temperature", type=float, help="by default that of the run, else of the model")
    parser.add_argument("--top_k", type=int, help="likewise")
    parser.add_argument("--top_p", type=float, help="likewise")
    parser.add_argument("--max_new_tokens", type=int, help="likewise")
    parser.add_argument("--seed", type=int, default=0, help="of the answers")


def chat(given: Namespace) -> Outcome:
    """Talks until the end of the input; → all turns for --json, which leaves the screen alone.

    Raises UserError for what is wrong with the command, and where --json is to measure and cannot: then it has printed
    what was said, with the measures of the turns before.
    """
    shown = [name for name in given.show.split(",") if name]
    for name in shown:
        if name not in MEASURES:
            raise UserError(f"--show {name} is neither score nor kl.{did_you_mean(name, MEASURES)}")
    from ppo_rlhf.chat import load_chat

    names = ("temperature", "top_k", "top_p", "max_new_tokens")
    dialogue, judge = load_chat(
        given.policy,
        sampling={name: given[name] for name in names if given[name] is not None},
        system=given.system,
        keep_history=not given.single_turn,
        seed=given.seed,
        reward=given.reward,
        reference=given.reference,
    )
    terminal = Terminal(dialogue, judge, quiet=given.json)
    for name in shown:
        terminal.toggle(name)
    terminal.talk()
    if not given.json:
        return {}, []
    turns = [{"said": turn.said, "answer": turn.answer, "finished": turn.finished} for turn in dialogue.turns]
    try:
        for told, turn in zip(turns, dialogue.turns, strict=True):
            told.update(terminal.measures(turn))
    except UserError:
        print(json.dumps({"turns": turns}))  # what was said is not lost with what it is worth
        raise
    return {"turns": turns}, []


class Terminal:
    """A dialogue on the screen, or between files: one line of input is a turn or a command."""

    def __init__(self, dialogue: Chat, judge: Judge, *, quiet: bool) -> None:
        self.dialogue, self.judge, self.quiet = dialogue, judge, quiet
        self.shown: set[str] = set()  # of the measures

    def talk(self) -> None:
        """Until the input ends, or /quit."""
        with suppress(ImportError):  # where it is missing lines are read without editing
            import readline  # noqa: F401 - gives input() its editing and history
        self.tell("/help tells the commands; Ctrl-C stops an answer, Ctrl-D leaves.")
        if not self.dialogue.has_template:
            begin = "; /reset begins anew" if self.dialogue.keep_history else ""
            self.tell(f"The policy has no chat template: it goes on with your text as it stands{begin}.")
        while (line := self._line()).strip() != "/quit":
            try:
                if line.startswith("/"):
                    self.command(line[1:])
                elif line.strip():
                    self.show(self.dialogue.answer(line))
            except UserError as error:
                self.complain(f"error: {error}")
            except KeyboardInterrupt:
                self.tell(" (stopped)")

    def _line(self) -> str:
        while True:
            try:
                return input("> " if sys.stdin.isatty() and not self.quiet else "")
            except EOFError:
                return "/quit"
            except KeyboardInterrupt:
                self.tell("\n/quit or Ctrl-D leaves.")

    def show(self, pieces: Iterator[str]) -> None:
        """An answer as it comes, and what it is worth."""
        with closing(pieces):  # type: ignore[type-var]
            for piece in pieces:
                self.tell(piece, end="")
        self.tell("")
        forgotten = self.dialogue.num_forgotten
        if forgotten:
            self.tell(f"({forgotten} earlier {'turn' if forgotten == 1 else 'turns'} did not fit and went unread.)")
        self.measure()

    def measure(self) -> None:
        """The measures of the last answer that are wanted."""
        if self.quiet or not self.dialogue.turns or not self.shown:
            return
        last = self.dialogue.turns[-1]
        found, count = self.measures(last), len(last.answer_ids)
        texts = [f"score {found['score']:.3f}"] if "score" in found else []
        texts += [f"KL {found['kl']:.2f} nats, {found['kl'] / count:.3f} a token"] if "kl" in found else []
        self.tell(f"[{', '.join(texts)}]")

    def measures(self, turn: Turn) -> dict[str, float]:
        """What is shown of a turn by name. Raises UserError where it cannot be had."""
        found = {}
        if "score" in self.shown:
            found["score"] = self.judge.score(turn)
        if "kl" in self.shown:
            found["kl"] = self.judge.kl(turn)
        return found

    def tell(self, text: str, end: str = "\n") -> None:
        """Writes text that cannot move the cursor, whoever wrote it."""
        if not self.quiet:
            print(text.translate(CONTROLS), end=end, flush=True)

    def complain(self, text: str) -> None:
        """Tells of a mistake, where nothing else is told on stderr."""
        print(text.translate(CONTROLS), file=sys.stderr if self.quiet else None, flush=True)

    def toggle(self, measure: str) -> None:
        """Shows a measure from now on, or no longer. Raises UserError where it cannot be had."""
        if measure in self.shown:
            self.shown.remove(measure)
            return
        _ = self.judge.reward if measure == "score" else self.judge.reference
        self.shown.add(measure)
        self.measure()

    def command(self, line: str) -> None:
        """What follows a slash. Raises UserError for a command that there is not."""
        name, _, text = line.partition(" ")
        if name not in COMMANDS:
            raise UserError(f"there is no command /{name}.{did_you_mean(name, COMMANDS)} /help tells them.")
        act, _ = COMMANDS[name]
        act(self, text.strip())


# ------------------------------------------------------------------------------------------------------------ commands


def _reset(terminal: Terminal, text: str) -> None:
    terminal.dialogue.turns.clear()


def _system(terminal: Terminal, text: str) -> None:
    terminal.dialogue.system = text or None


def _temperature(terminal: Terminal, text: str) -> None:
    try:
        temperature = float(text)
    except ValueError:
        raise UserError(f"/temperature takes a number, not {text!r}.") from None
    terminal.dialogue.settings = replace(terminal.dialogue.settings, temperature=temperature)


def _save(terminal: Terminal, text: str) -> None:
    if not text:
        raise UserError("/save takes the name of a file.")
    terminal.dialogue.save(Path(text))
    terminal.tell(f"wrote {text}")


def _help(terminal: Terminal, text: str) -> None:
    for name, (_, meaning) in COMMANDS.items():
        terminal.tell(f"/{name:12} {meaning}")
    terminal.tell("/quit         leave, as Ctrl-D does")


COMMANDS: dict[str, tuple[Callable[[Terminal, str], None], str]] = {
    "score": (lambda terminal, _: terminal.toggle("score"), "what the reward gives each answer, or no longer"),
    "kl": (lambda terminal, _: terminal.toggle("kl"), "how far each answer is from the reference, or no longer"),
    "reset": (_reset, "forget all turns"),
    "regenerate": (
        lambda terminal, _: terminal.show(terminal.dialogue.regenerate()),
        "another answer in the place of the last one",
    ),
    "system": (_system, "TEXT stands before all turns; without a text nothing does"),
    "temperature": (_temperature, "X from now on"),
    "save": (_save, "FILE gets the conversation, a row with `messages`"),
    "help": (_help, "this"),
}
