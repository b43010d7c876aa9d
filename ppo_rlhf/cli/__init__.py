"""The command line. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from ppo_rlhf.arguments import Command, CommandLine, run, settings_in
from ppo_rlhf.cli.chat import add_chat, chat
from ppo_rlhf.cli.evaluate import add_evaluate, evaluate
from ppo_rlhf.cli.inspect_data import add_inspect_data, inspect_data
from ppo_rlhf.cli.outcome import Outcome
from ppo_rlhf.cli.people import add_compare, add_label, add_preferences, compare, label, preferences
from ppo_rlhf.cli.studies import add_study, study
from ppo_rlhf.config import PipelineConfig, PPOConfig, RewardConfig, SFTConfig
from ppo_rlhf.evaluation_settings import EvaluationSettings

if TYPE_CHECKING:
    from ppo_rlhf.train.memory_estimate import MemoryEstimate


def _add_stage(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--estimate_memory", action="store_true", help="tell what each part will take, load no weights, write nothing"
    )


def _add_ppo(parser: ArgumentParser) -> None:
    _add_stage(parser)
    parser.add_argument("--dry_run", action="store_true", help="show ten samples with their scores, and write nothing")


def _add_run(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="the run's folder")


def _add_doctor(parser: ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--watch", action="store_true", help="follow a run in progress until it ends, or Ctrl-C")


def _add_report(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs or pipelines")
    parser.add_argument("--output", type=str, metavar="FILE", help="without it report.html in the first folder")


def _add_export(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="a run's folder, or a model's")
    parser.add_argument("--output", type=str, required=True, metavar="DIR", help="a new folder for the plain model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of its weights")
    parser.add_argument("--push_to_hub", type=str, metavar="NAME", help="upload it as well, as USER/NAME")
    parser.add_argument("--private", action="store_true", help="where that makes a new repository")


TOY_CONFIG = Path(__file__).parents[1] / "toy" / "pipeline.yaml"
COMMANDS = {
    "demo": Command(
        "The whole pipeline on the embedded task, with its outcome on the screen.",
        PipelineConfig,
        default_config=TOY_CONFIG,
    ),
    "sft": Command("Supervised fine-tuning: demonstrations → policy.", SFTConfig, add_arguments=_add_stage),
    "reward": Command("Reward modelling: comparisons → reward model.", RewardConfig, add_arguments=_add_stage),
    "ppo": Command("PPO: prompts and a reward → tuned policy.", PPOConfig, add_arguments=_add_ppo),
    "pipeline": Command("The three stages in order.", PipelineConfig),
    "evaluate": Command(
        "How good policies are: score, KL, diversity, win rate, best of n.", EvaluationSettings, add_evaluate
    ),
    "inspect-data": Command(
        "What a model will see of its data: tokens, masks, lengths.", add_arguments=add_inspect_data
    ),
    "chat": Command("Talk with a policy, and see what its answers are worth.", add_arguments=add_chat),
    "doctor": Command(
        "Look for what is wrong with a run; exit code 1 where something was found.", add_arguments=_add_doctor
    ),
    "report": Command("One self-contained page about one or more runs.", add_arguments=_add_report),
    "label": Command("The labelling app: people compare responses in a browser.", add_arguments=add_label),
    "preferences": Command(
        "Comparisons out of the database, into it, and what they say.", add_arguments=add_preferences
    ),
    "export": Command("A model to use elsewhere: adapters merged, also to the Hub.", add_arguments=_add_export),
    "compare": Command("Two runs against each other, judged blind by people.", add_arguments=add_compare),
    "study": Command(
        "Experiments: estimators of KL, overoptimisation, what each detail is worth.", add_arguments=add_study
    ),
}
COMMAND_LINE = CommandLine("ppo-rlhf", "PPO for language models: supervised fine-tuning, reward model, PPO.", COMMANDS)


def entry_point() -> None:
    """What the installed command calls."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Runs a command. → 0; 1 where the doctor found something; else as `ppo_rlhf.arguments.run` says."""
    return run(COMMAND_LINE, _execute, argv)


def _execute(command: str, given: Namespace) -> int | None:
    settings = COMMANDS[command].settings
    if command == "doctor":
        return _diagnose(given)
    if given.get("dry_run"):
        _show_samples(settings_in(given, PPOConfig), given)
        return None
    if command == "evaluate":
        evaluate(given)
        return None
    if command == "inspect-data":
        inspect_data(given, COMMAND_LINE)
        return None
    if settings is not None:
        work = _estimate_memory if given.get("estimate_memory") else _train
        summary, lines = work(command, settings_in(given, settings))
    else:
        if "db" in given:
            from ppo_rlhf.data import check_preferences

            check_preferences(given.db, setting="--db")
        summary, lines = OTHERS[command](given)
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


def _show_samples(config: PPOConfig, given: Namespace) -> None:
    """A table of samples, their scores and the parts of these."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ppo_rlhf.train.dry_run import dry_run

    rows = dry_run(config)
    if given.json:
        print(json.dumps({"samples": rows}))
        return
    parts = list(rows[0]["parts"])
    table = Table("prompt", "response", *parts, *(name for name in ("score", "gold_score") if name in rows[0]))
    for row in rows:
        numbers = [*row["parts"].values(), row["score"], *([row["gold_score"]] if "gold_score" in row else [])]
        table.add_row(Text(row["prompt"]), Text(row["response"]), *(f"{number:.3f}" for number in numbers))
    Console(highlight=False, markup=False).print(table)


def _estimate_memory(command: str, config: Any) -> Outcome:
    """What the parts of a stage will take."""
    from ppo_rlhf.train.memory_estimate import estimate_ppo, estimate_reward, estimate_sft

    estimates: dict[str, Callable[[Any], MemoryEstimate]] = {
        "sft": estimate_sft,
        "reward": estimate_reward,
        "ppo": estimate_ppo,
    }
    estimate = estimates[command](config)
    return estimate.as_dict(), estimate.lines()


def _train(command: str, config: Any) -> Outcome:
    """Runs a training command; → its summary, and what to tell of it; nothing but in the main process."""
    from ppo_rlhf.report import outcome_lines
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
        _write_report([metrics.parent])
    return summary, [*outcome_lines(folder), f"report: {_write_report([folder])}"]


def _report(given: Namespace) -> Outcome:
    path = str(_write_report([Path(run) for run in given.runs], given.output))
    return {"report": path}, [f"wrote {path}"]


def _write_report(folders: list[Path], output: str | None = None) -> Path:
    """Writes the report of runs, with what the doctor finds in them; → its path."""
    from ppo_rlhf import doctor
    from ppo_rlhf.report import write_report

    findings = [finding.as_dict() for folder in folders for finding in doctor.examine(folder)]
    return write_report(folders, Path(output) if output else None, findings=findings)


def _export(given: Namespace) -> Outcome:
    from ppo_rlhf.export import export, push

    folder = export(Path(given.run), Path(given.output), dtype=given.dtype)
    summary, lines = {"output": str(folder)}, [f"wrote {folder}"]
    if given.push_to_hub is not None:
        summary["address"] = push(folder, given.push_to_hub, private=given.private)
        lines.append(f"uploaded to {summary['address']}")
    return summary, lines


OTHERS = {
    "chat": chat,
    "report": _report,
    "export": _export,
    "label": label,
    "preferences": preferences,
    "compare": compare,
    "study": study,
}
