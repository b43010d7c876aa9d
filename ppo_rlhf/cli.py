"""The command line. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from ppo_rlhf.arguments import Command, CommandLine, run, settings_in
from ppo_rlhf.config import PipelineConfig, PPOConfig, RewardConfig, SFTConfig


def _add_run(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="the run's folder")


def _add_doctor(parser: ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--watch", action="store_true", help="follow a run in progress until it ends, or Ctrl-C")


TOY_CONFIG = Path(__file__).parent / "toy" / "pipeline.yaml"
COMMANDS = {
    "demo": Command(
        "The whole pipeline on the embedded task, with its outcome on the screen.",
        PipelineConfig,
        default_config=TOY_CONFIG,
    ),
    "sft": Command("Supervised fine-tuning: demonstrations → policy.", SFTConfig),
    "reward": Command("Reward modelling: comparisons → reward model.", RewardConfig),
    "ppo": Command("PPO: prompts and a reward → tuned policy.", PPOConfig),
    "pipeline": Command("The three stages in order.", PipelineConfig),
    "doctor": Command(
        "Look for what is wrong with a run; exit code 1 where something was found.", add_arguments=_add_doctor
    ),
    "report": Command("Write report.html into a run's folder.", add_arguments=_add_run),
}
COMMAND_LINE = CommandLine("ppo-rlhf", "PPO for language models: supervised fine-tuning, reward model, PPO.", COMMANDS)


def entry_point() -> None:
    """What the installed command calls."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Runs a command. → 0; 1 where the doctor found something; 2 after one line on stderr for a user's mistake; 130."""
    return run(COMMAND_LINE, _execute, argv)


def _execute(command: str, given: Namespace) -> int | None:
    settings = COMMANDS[command].settings
    if command == "doctor":
        return _diagnose(given)
    if settings is None:
        from ppo_rlhf.report import write_report

        summary: dict[str, Any] = {"report": str(write_report(Path(given.run)))}
        lines = [f"wrote {summary['report']}"]
    else:
        summary, lines = _train(command, settings_in(given, settings))
    if summary:
        print(json.dumps(summary) if given.json else "\n".join(lines))
    return None


def _diagnose(given: Namespace) -> int:
    """→ 1 where the doctor found something, else 0."""
    from rich.console import Console

    from ppo_rlhf import doctor

    console = Console(stderr=given.json, highlight=False, markup=False)
    findings = doctor.watch(Path(given.run), console) if given.watch else doctor.examine(Path(given.run))
    if given.json:
        print(json.dumps({"healthy": not findings, "findings": [finding.as_dict() for finding in findings]}))
    elif not given.watch or not findings:
        doctor.show(findings, console)
    return 1 if findings else 0


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
