"""The command that shows what a model will see of its data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from ppo_rlhf.arguments import CommandLine, read, settings_in
from ppo_rlhf.errors import UserError

INSPECTED = {"sft": "data", "reward": "data", "ppo": "prompts"}  # the stages, and their setting for what they read


def add_inspect_data(parser: ArgumentParser) -> None:
    parser.add_argument("--config", type=str, metavar="FILE", help="a stage's or a pipeline's; the options override it")
    parser.add_argument("--stage", choices=list(INSPECTED), help="that reads the data; without it told by the columns")
    parser.add_argument("--data", type=str, help="rows: a file, a folder, a Hub name, module:function")
    parser.add_argument("--policy", type=str, help="the model whose tokenizer and chat template read them")
    parser.add_argument("--columns", type=str, help="other names for columns: '{question: prompt, answer: completion}'")
    parser.add_argument("--chat_template", type=str, metavar="FILE", help="a Jinja file, instead of the tokenizer's")
    parser.add_argument("--max_length", type=str, help="tokens")
    parser.add_argument("--too_long", type=str, help="what becomes of longer texts: refuse, drop, left or right")
    parser.add_argument("--examples", type=int, default=3, help="how many are shown token by token")


def inspect_data(given: Namespace, line: CommandLine) -> None:
    """Prints what the models of one stage, or of a pipeline's three, will see of their data."""
    from rich.console import Console

    from ppo_rlhf import inspection

    if given.examples < 0:
        raise UserError(f"--examples {given.examples} must be 0 or more.")
    inspect: dict[str, Any] = {
        "sft": inspection.inspect_sft,
        "reward": inspection.inspect_reward,
        "ppo": inspection.inspect_ppo,
    }
    found = [inspect[stage](config, count=given.examples) for stage, config in _inspected(given, line).items()]
    if given.json:
        print(json.dumps({"stages": [each.as_dict() for each in found]}))
        return
    for each in found:
        inspection.show(each, Console(highlight=False))


def _inspected(given: Namespace, line: CommandLine) -> dict[str, Any]:
    """The configurations of the stages to inspect, by their names."""
    settings = {} if given.config is None else yaml.safe_load(Path(given.config).read_text(encoding="utf-8"))
    if given.data is None and set(settings) & set(INSPECTED):
        pipeline = _configured(line, "pipeline", given.config, {})
        stages = {name: getattr(pipeline, name) for name in INSPECTED if given.stage in (None, name)}
        stages = {name: stage for name, stage in stages.items() if getattr(stage, INSPECTED[name]) is not None}
        return {name: replace(stage, policy=stage.policy or pipeline.sft.policy) for name, stage in stages.items()}
    stage = given.stage or _stage_reading(given, settings)
    lengths = "max_prompt_length" if stage == "ppo" else "max_length"
    names = {"data": INSPECTED[stage], "max_length": lengths}
    options = {
        names.get(name, name): given[name]
        for name in ("data", "policy", "columns", "chat_template", "max_length", "too_long")
        if given[name] is not None
    }
    return {stage: _configured(line, stage, given.config, options)}


def _configured(line: CommandLine, command: str, config: str | None, options: dict[str, str]) -> Any:
    """A training command's settings as its own command line gives them."""
    words = [command, *(["--config", config] if config is not None else [])]
    words += [word for name, value in options.items() for word in (f"--{name}", value)]
    arguments, settings = read(line, words), line.commands[command].settings
    assert arguments is not None
    assert settings is not None
    return settings_in(arguments[command], settings)


def _stage_reading(given: Namespace, settings: dict[str, Any]) -> str:
    """The stage that reads rows of such columns."""
    from ppo_rlhf.data import load_rows

    source = given.data or settings.get("data") or settings.get("prompts")
    if source is None:
        raise UserError("give --data, or a --config that names some: what is to be inspected.")
    columns = yaml.safe_load(given.columns) if given.columns else settings.get("columns", {})
    if not isinstance(columns, dict):
        raise UserError(f"--columns {columns!r} must be a mapping such as '{{question: prompt}}'.")
    found = load_rows(source, required=(), setting="--data", columns=columns)[0]
    if {"chosen", "rejected", "responses"} & set(found):
        return "reward"
    return "sft" if {"messages", "completion", "text"} & set(found) else "ppo"
