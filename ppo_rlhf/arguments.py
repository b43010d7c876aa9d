"""Command lines made of sub-commands and their settings: what `ppo_rlhf.cli` and `classic.cli` share; free of torch.

Options are written with dashes or underscores and never abbreviated; `--config FILE` gives any of the settings, and the
options override it wherever they stand.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from ppo_rlhf.errors import Interrupted, UserError, did_you_mean

Settings = TypeVar("Settings")

CHOICES = (  # how the parser says that a value is none of those that there are
    r"Literal\[(?P<known>.*?)\]\. Got value: (?P<value>\S+?)\.?$",
    r"invalid choice: '(?P<value>.*?)' \(choose from (?P<known>.*?)\)",
)


@dataclass(frozen=True)
class Command:
    """A sub-command; every one has `--json`. Each of its `settings`, a dataclass where it has some, is an option."""

    help: str
    settings: type | None = None
    add_arguments: Callable[[ArgumentParser], object] | None = None  # those that are not settings
    default_config: Path | None = None  # where neither --config nor a run to be resumed gives one
    base: Callable[[Namespace], Mapping[str, Any]] | None = None  # settings to start from, by a first reading

    @property
    def resumable(self) -> bool:
        """Whether it trains, so that --resume goes on with it."""
        settings = () if self.settings is None else fields(self.settings)
        return self.base is not None or "resume" in {field.name for field in settings}


@dataclass(frozen=True)
class CommandLine:
    """A program and its sub-commands."""

    program: str
    description: str
    commands: Mapping[str, Command]


def run(line: CommandLine, execute: Callable[[str, Namespace], int | None], argv: Sequence[str]) -> int:
    """Executes a command by its name and arguments; without one shows the help.

    → what `execute` returns, by default 0; 2 after one line on stderr for a user's mistake; 128 + the number of the
    signal after which a run was saved (129 SIGHUP, 130 Ctrl-C, 143 SIGTERM); 130 when interrupted at once.
    """
    command = line.commands.get(_command_in(argv) or "", Command(""))
    _hear_interrupts()
    try:
        given = read(line, argv)
        if given is not None:
            return execute(given.command, given[given.command]) or 0
    except UserError as error:
        print("error: " + " ".join(part.strip() for part in str(error).splitlines()), file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        way_on = "; --resume with the same --output-dir goes on from the last checkpoint" if command.resumable else ""
        print(f"interrupted{way_on}.", file=sys.stderr)
        return 130
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    return 0


def _hear_interrupts() -> None:
    """SIGINT interrupts a shell's background job too, which is started deaf to it, from its first second on."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def read(line: CommandLine, argv: Sequence[str]) -> Namespace | None:
    """The arguments: `command`, and under that name its own. Without a command, None, and the help is shown.

    Raises UserError, one line, for what cannot be read, with the nearest valid name.
    """
    name = _command_in(argv)
    command = line.commands.get(name or "", Command(""))
    words = _with_default_config(_normalized(argv, command), name, command)
    parser, own = _parsers_for(line, name)
    known = [action.dest for action in own._actions]
    arguments = _parsed(parser, known, words)
    if arguments.command is None:
        parser.print_help()
        return None
    if command.base is not None:
        own.set_defaults(dict(command.base(arguments[arguments.command])))
        arguments = _parsed(parser, known, words)
    if command.settings is not None:
        _refuse_nulls(arguments[arguments.command], command.settings)
    return parser.instantiate(arguments)


def settings_in(given: Namespace, settings: type[Settings]) -> Settings:
    """The command's settings as their dataclass."""
    return settings(**{field.name: given[field.name] for field in fields(settings)})  # type: ignore[arg-type]


def _command_in(argv: Sequence[str]) -> str | None:
    return next((word for word in argv if not word.startswith("-")), None)


def _parsers_for(line: CommandLine, name: str | None) -> tuple[ArgumentParser, ArgumentParser]:
    """The program's parser, and the command's own. Only that command gets its arguments: help must be quick."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=line.program, description=line.description, exit_on_error=False, allow_abbrev=False)
    subcommands = parser.add_subcommands(dest="command", required=False)
    own = parser
    for each, command in line.commands.items():
        subparser = ArgumentParser(description=command.help, exit_on_error=False, allow_abbrev=False)
        if each == name:
            own = subparser
            own.add_argument("--json", action="store_true", help="print the outcome as one object on one line")
            if command.add_arguments is not None:
                command.add_arguments(own)
            if command.settings is not None:
                own.add_argument("--config", action="config", help="YAML file with any of these settings")
                own.add_class_arguments(command.settings, None)
        subcommands.add_subcommand(each, subparser, help=command.help)
    return parser, own


def _parsed(parser: ArgumentParser, known: list[str], words: list[str]) -> Namespace:
    """The arguments. Raises UserError, one line, for what the parser refuses, with the nearest valid name."""
    for path in _values_of("--config", words):
        _check_config(path)
    try:
        arguments = parser.parse_args(words)
    except argparse.ArgumentError as error:
        cause = error.__cause__ or error.__context__
        while cause is not None:  # a setting's own check says it best
            if isinstance(cause, UserError):
                raise cause from error
            cause = cause.__cause__ or cause.__context__
        message = " ".join(str(error).split())
        raise UserError(message.rstrip(".") + "." + _hint(message, known)) from error
    # `name.help` tells of the kinds that the one setting `name` can have
    groups = {name.rpartition(".")[0] for name in known if "." in name and not name.endswith(".help")}
    for group in sorted(groups):  # the outer ones first
        value = arguments[f"{arguments.command}.{group}"]
        if not isinstance(value, Namespace):
            raise UserError(f"{group} holds settings, such as {group}.…; {value!r} is not.")
    return arguments


def _refuse_nulls(given: Namespace, settings: type) -> None:
    """Raises UserError for a setting that is null and may not be; the parser lets all of them be."""
    for name, kind in _types_of(settings).items():
        if given[name] is None and type(None) not in get_args(kind):
            raise UserError(f"{name} must not be null; leave it out for its default.")


def _hint(message: str, known: list[str]) -> str:
    """The nearest valid name to the one that a message of the parser's is about."""
    for pattern in CHOICES:
        if found := re.search(pattern, message):
            return did_you_mean(found["value"], re.findall(r"'(.*?)'", found["known"]))
    names = re.findall(r"(?:option|arguments?:|[Kk]ey) ['\"]?-*([\w.]+)", message)
    unknown = next((name for name in names if name not in known), None)
    return did_you_mean(unknown, known) if unknown is not None else ""


def _check_config(path: str) -> None:
    """Raises UserError, which names the file, for a configuration that is not a mapping in YAML."""
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        json.dumps(settings, default=str, skipkeys=True)  # raises for what refers to itself
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--config {path} holds no settings: it must be a mapping, `name: value` on each line.")


def _normalized(argv: Sequence[str], command: Command) -> list[str]:
    """Options with underscores, however they were typed; a yes-or-no setting alone means true."""
    types = {} if command.settings is None else _types_of(command.settings)
    flags = {f"--{name}" for name, kind in types.items() if kind is bool}
    words = []
    for index, word in enumerate(argv):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            word = "--" + name[2:].replace("-", "_") + equals + value
        words.append(word)
        following = argv[index + 1] if index + 1 < len(argv) else "--"
        # What follows --resume is never meant for it, unless it says so.
        alone = following not in ("true", "false") if word == "--resume" else following.startswith("--")
        if word in flags and alone:
            words.append("true")
    return words


def _types_of(settings: type, prefix: str = "") -> dict[str, Any]:
    """The types of a dataclass's settings by their dotted names, also of those of the groups in it."""
    types: dict[str, Any] = {}
    for name, kind in get_type_hints(settings).items():
        group = isinstance(kind, type) and is_dataclass(kind)
        types |= _types_of(kind, f"{prefix}{name}.") if group else {prefix + name: kind}
    return types


def _with_default_config(words: list[str], name: str | None, command: Command) -> list[str]:
    """--config before all overrides; where none is given that of the run being resumed, or the command's own."""
    if name is None:
        return words
    configs = _values_of("--config", words)
    if not configs:
        folders = _values_of("--output_dir", words)
        resumed = folders and _values_of("--resume", words)[-1:] == ["true"]
        saved = Path(folders[-1]) / "config.yaml" if resumed else None
        if saved is not None and saved.exists():
            configs = [str(saved)]
        elif command.default_config is not None:
            configs = [str(command.default_config)]
    place = words.index(name)
    rest, following = [], iter(words[place + 1 :])
    for word in following:
        if word == "--config":
            next(following, None)
        elif not word.startswith("--config="):
            rest.append(word)
    given = [option for path in configs for option in ("--config", path)]
    return [*words[:place], name, *given, *rest]


def _values_of(option: str, words: list[str]) -> list[str]:
    """The values given to an option, as `--option VALUE` or `--option=VALUE`."""
    values = [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]
    return values + [value for word, value in itertools.pairwise(words) if word == option]
