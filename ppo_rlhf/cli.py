"""The command line. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from ppo_rlhf.config import PipelineConfig, PPOConfig, RewardConfig, SFTConfig
from ppo_rlhf.errors import UserError, did_you_mean

COMMANDS: dict[str, tuple[Any, str]] = {
    "demo": (PipelineConfig, "The whole pipeline on the embedded task, with its outcome on the screen."),
    "sft": (SFTConfig, "Supervised fine-tuning: demonstrations → policy."),
    "reward": (RewardConfig, "Reward modelling: comparisons → reward model."),
    "ppo": (PPOConfig, "PPO: prompts and a reward → tuned policy."),
    "pipeline": (PipelineConfig, "The three stages in order."),
    "report": (None, "Write report.html into a run's folder."),
}
TOY_CONFIG = Path(__file__).parent / "toy" / "pipeline.yaml"


def entry_point() -> None:
    """What the installed command calls."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Runs a command. → 0, or 2 after one line on stderr for a user's mistake, or 130 when interrupted."""
    try:
        return _run(_normalized(argv))
    except UserError as error:
        print("error: " + " ".join(line.strip() for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; --resume with the same --output-dir goes on from the last checkpoint.", file=sys.stderr)
        return 130
    except SystemExit as stop:  # --help
        return int(stop.code or 0)


def _run(argv: list[str]) -> int:
    command = next((word for word in argv if not word.startswith("-")), None)
    parser, known = _parser_for(command)
    arguments = _parsed(parser, known, _with_default_config(argv, command))
    if arguments.command is None:
        parser.print_help()
        return 0
    given = parser.instantiate(arguments)[arguments.command]
    if command == "report":
        from ppo_rlhf.report import write_report

        summary: dict[str, Any] = {"report": str(write_report(Path(given.run)))}
        lines = [f"wrote {summary['report']}"]
    else:
        config_class = COMMANDS[arguments.command][0]
        config = config_class(**{field.name: given[field.name] for field in fields(config_class)})
        summary, lines = _train(arguments.command, config)
    if summary:
        print(json.dumps(summary) if given.json else "\n".join(lines))
    return 0


def _train(command: str, config: Any) -> tuple[dict[str, Any], list[str]]:
    """Runs a training command; → its summary, and what to tell of it; nothing but in the main process."""
    from ppo_rlhf.report import outcome_lines, write_report
    from ppo_rlhf.run import end_processes, is_main_process

    if command == "sft":
        from ppo_rlhf.train import sft

        summary = sft.train(config)
    elif command == "reward":
        from ppo_rlhf.train import reward_model

        summary = reward_model.train(config)
    elif command == "ppo":
        from ppo_rlhf.train import ppo

        summary = ppo.train(config)
    else:
        from ppo_rlhf import pipeline

        summary = pipeline.run(config)
    end_processes()
    if not is_main_process():
        return {}, []
    if "finished" in summary:
        return summary, [f"{summary['finished']} is finished already; there is nothing to resume."]
    folder = Path(summary["output_dir"])
    for metrics in folder.glob("*/metrics.jsonl"):  # a pipeline's stages
        write_report(metrics.parent)
    return summary, [*outcome_lines(folder), f"report: {write_report(folder)}"]


def _parser_for(command: str | None) -> tuple[ArgumentParser, list[str]]:
    """The parser, and the settings that the command knows. Only that command gets its arguments: help must be quick."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="ppo-rlhf",
        description="PPO for language models: supervised fine-tuning, reward model, PPO.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    subcommands = parser.add_subcommands(dest="command", required=False)
    known: list[str] = []
    for name, (config_class, help_text) in COMMANDS.items():
        subparser = ArgumentParser(description=help_text, exit_on_error=False, allow_abbrev=False)
        if name == command:
            subparser.add_argument("--json", action="store_true", help="print the outcome as one object on one line")
            if config_class is None:
                subparser.add_argument("run", help="the run's folder")
            else:
                subparser.add_argument("--config", action="config", help="YAML file with any of these settings")
                subparser.add_class_arguments(config_class, None)
            known = [action.dest for action in subparser._actions]
        subcommands.add_subcommand(name, subparser, help=help_text)
    return parser, known


def _parsed(parser: ArgumentParser, known: list[str], argv: list[str]) -> Namespace:
    """The arguments. Raises UserError, one line, for what the parser refuses, with the nearest valid name."""
    for path in _values_of("--config", argv):
        _check_config(path)
    try:
        arguments = parser.parse_args(argv)
    except argparse.ArgumentError as error:
        cause = error.__cause__ or error.__context__
        while cause is not None:  # a setting's own check says it best
            if isinstance(cause, UserError):
                raise cause from error
            cause = cause.__cause__ or cause.__context__
        message = " ".join(str(error).split())
        names = re.findall(r"(?:option|arguments?:|[Kk]ey) ['\"]?-*([\w.]+)", message)
        unknown = next((name for name in names if name not in known), None)
        hint = did_you_mean(unknown, known) if unknown is not None else ""
        raise UserError(message.rstrip(".") + "." + hint) from error
    for group in {name.rpartition(".")[0] for name in known if "." in name}:
        value = arguments[f"{arguments.command}.{group}"]
        if not isinstance(value, Namespace):
            raise UserError(f"{group} holds settings, such as {group}.…; {value!r} is not.")
    return arguments


def _check_config(path: str) -> None:
    """Raises UserError, which names the file, for a configuration that is not a mapping in YAML."""
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--config {path} holds no settings: it must be a mapping, `name: value` on each line.")


def _normalized(argv: Sequence[str]) -> list[str]:
    """Options with underscores, however they were typed; --resume and --json alone mean true."""
    words = []
    for index, word in enumerate(argv):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            word = "--" + name[2:].replace("-", "_") + equals + value
        words.append(word)
        following = argv[index + 1] if index + 1 < len(argv) else ""
        if word == "--resume" and following not in ("true", "false"):
            words.append("true")
    return words


def _with_default_config(argv: list[str], command: str | None) -> list[str]:
    """The demo's configuration, and that of a run being resumed, unless --config gives one; before all overrides."""
    if command is None:
        return argv
    configs = _values_of("--config", argv)
    if not configs:
        folders = _values_of("--output_dir", argv)
        saved = Path(folders[-1]) / "config.yaml" if folders and _values_of("--resume", argv)[-1:] == ["true"] else None
        if saved is not None and saved.exists():
            configs = [str(saved)]
        elif command == "demo":
            configs = [str(TOY_CONFIG)]
    place = argv.index(command)
    rest, words = [], iter(argv[place + 1 :])
    for word in words:
        if word == "--config":
            next(words, None)
        elif not word.startswith("--config="):
            rest.append(word)
    given = [option for path in configs for option in ("--config", path)]
    return [*argv[:place], command, *given, *rest]


def _values_of(option: str, argv: list[str]) -> list[str]:
    """The values given to an option, as `--option VALUE` or `--option=VALUE`."""
    values = [word.partition("=")[2] for word in argv if word.startswith(f"{option}=")]
    return values + [value for word, value in itertools.pairwise(argv) if word == option]
