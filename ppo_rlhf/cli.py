"""The command line. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml
from jsonargparse import ArgumentParser, Namespace

from ppo_rlhf.arguments import Command, CommandLine, read, run, settings_in
from ppo_rlhf.config import PipelineConfig, PPOConfig, RewardConfig, SFTConfig
from ppo_rlhf.errors import UserError
from ppo_rlhf.settings import Ties

if TYPE_CHECKING:
    from ppo_rlhf.preferences import Choice, Pair, Store
    from ppo_rlhf.train.memory_estimate import MemoryEstimate

Outcome = tuple[dict[str, Any], list[str]]  # a summary for programs, and what to tell of it
DATABASE = "sqlite:///preferences.db"


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


def _add_db(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--db", default=DATABASE, help="the database's URL: sqlite:///FILE or postgresql://USER@HOST/NAME"
    )


def _add_labelling(parser: ArgumentParser) -> None:
    """What the two commands share that open the labelling app."""
    _add_db(parser)
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at; beyond this machine --token")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--token", type=str, help="what annotators must know to get in")
    parser.add_argument("--annotator", type=str, help="whose choices these are; without it each gives a name")
    parser.add_argument(
        "--overlap", type=float, default=1.0, help="people per pair; 1.25: every fourth pair is seen twice"
    )
    parser.add_argument("--strength", action="store_true", help="ask how much better")
    parser.add_argument("--prompts", type=str, help="rows with `prompt` to sample for, instead of the run's own")
    parser.add_argument("--num_pairs", type=int, default=100, help="prompts to sample for")
    parser.add_argument("--seed", type=int, default=0, help="of the samples and of the order of pairs")


def _add_label(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--pairs", nargs="+", metavar="FILE", help="rows of `prompt` and `responses`; or two runs' folders"
    )
    parser.add_argument("--sample", type=str, metavar="RUN", help="draw responses from this run's policy")
    parser.add_argument("--responses", type=int, default=2, help="to sample for each prompt")
    parser.add_argument("--rank", action="store_true", help="rank all responses at once, not two by two")
    parser.add_argument("--order", choices=["random", "uncertain"], default="random", help="which pairs come first")
    parser.add_argument("--reward_model", type=str, help="whose smallest margins are the uncertain ones")
    _add_labelling(parser)


def _add_compare(parser: ArgumentParser) -> None:
    parser.add_argument("run_a", help="a run's folder")
    parser.add_argument("run_b", help="another's")
    parser.add_argument("--label", action="store_true", help="sample pairs and judge them blind in the labelling app")
    _add_labelling(parser)


def _add_export(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="a run's folder, or a model's")
    parser.add_argument("--output", type=str, required=True, metavar="DIR", help="a new folder for the plain model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of its weights")
    parser.add_argument("--push_to_hub", type=str, metavar="NAME", help="upload it as well, as USER/NAME")
    parser.add_argument("--private", action="store_true", help="where that makes a new repository")


def _add_preferences(parser: ArgumentParser) -> None:
    parser.add_argument("action", choices=["export", "import", "stats"])
    parser.add_argument("file", nargs="?", help="JSONL or Parquet to write; or any file of comparisons to read")
    _add_db(parser)
    parser.add_argument("--collection", type=str, help="of what is labelled together, by its name; without it all")
    parser.add_argument("--ties", choices=get_args(Ties), default="drop", help="left out, or exported in both orders")


def _add_study(parser: ArgumentParser) -> None:
    parser.add_argument("name", choices=["kl-estimators"], help="which one")
    parser.add_argument("--output_dir", type=str, help="folder for its tables and pictures")
    parser.add_argument("--seed", type=int, default=0)


def _add_inspect_data(parser: ArgumentParser) -> None:
    parser.add_argument("--config", type=str, metavar="FILE", help="a stage's or a pipeline's; the options override it")
    parser.add_argument("--stage", choices=list(INSPECTED), help="that reads the data; without it told by the columns")
    parser.add_argument("--data", type=str, help="rows: a file, a folder, a Hub name, module:function")
    parser.add_argument("--policy", type=str, help="the model whose tokenizer and chat template read them")
    parser.add_argument("--columns", type=str, help="other names for columns: '{question: prompt, answer: completion}'")
    parser.add_argument("--chat_template", type=str, metavar="FILE", help="a Jinja file, instead of the tokenizer's")
    parser.add_argument("--max_length", type=str, help="tokens")
    parser.add_argument("--too_long", type=str, help="what becomes of longer texts: refuse, drop, left or right")
    parser.add_argument("--examples", type=int, default=3, help="how many are shown token by token")


INSPECTED = {"sft": "data", "reward": "data", "ppo": "prompts"}  # the stages, and their setting for what they read
TOY_CONFIG = Path(__file__).parent / "toy" / "pipeline.yaml"
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
    "inspect-data": Command(
        "What a model will see of its data: tokens, masks, lengths.", add_arguments=_add_inspect_data
    ),
    "doctor": Command(
        "Look for what is wrong with a run; exit code 1 where something was found.", add_arguments=_add_doctor
    ),
    "report": Command("One self-contained page about one or more runs.", add_arguments=_add_report),
    "label": Command("The labelling app: people compare responses in a browser.", add_arguments=_add_label),
    "preferences": Command(
        "Comparisons out of the database, into it, and what they say.", add_arguments=_add_preferences
    ),
    "export": Command("A model to use elsewhere: adapters merged, also to the Hub.", add_arguments=_add_export),
    "compare": Command("Two runs against each other, judged blind by people.", add_arguments=_add_compare),
    "study": Command("An experiment: what the estimators of KL are worth.", add_arguments=_add_study),
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
    if given.get("dry_run"):
        _show_samples(settings_in(given, PPOConfig), given)
        return None
    if command == "inspect-data":
        _inspect_data(given)
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


def _inspect_data(given: Namespace) -> None:
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
    found = [inspect[stage](config, count=given.examples) for stage, config in _inspected(given).items()]
    if given.json:
        print(json.dumps({"stages": [each.as_dict() for each in found]}))
        return
    for each in found:
        inspection.show(each, Console(highlight=False))


def _inspected(given: Namespace) -> dict[str, Any]:
    """The configurations of the stages to inspect, by their names."""
    settings = {} if given.config is None else yaml.safe_load(Path(given.config).read_text(encoding="utf-8"))
    if given.data is None and set(settings) & set(INSPECTED):
        pipeline = _configured("pipeline", given.config, {}, PipelineConfig)
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
    return {stage: _configured(stage, given.config, options, COMMANDS[stage].settings)}


def _configured(command: str, config: str | None, options: dict[str, str], settings: Any) -> Any:
    """A training command's settings as its own command line gives them."""
    words = [command, *(["--config", config] if config is not None else [])]
    words += [word for name, value in options.items() for word in (f"--{name}", value)]
    arguments = read(COMMAND_LINE, words)
    assert arguments is not None
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


def _label(given: Namespace) -> Outcome:
    """Serves the labelling app until it is interrupted; → what was chosen."""
    if (given.pairs is None) == (given.sample is None):
        raise UserError("give --pairs FILE, --pairs RUN_A RUN_B, or --sample RUN: what is to be judged.")
    if given.order == "uncertain" and given.reward_model is None:
        raise UserError("--order uncertain needs --reward-model: the folder of the one that is to learn.")
    name = f"samples of {given.sample}" if given.pairs is None else " and ".join(given.pairs)
    _check_labelling(given)
    pairs = _pairs_to_label(given)
    if given.rank and max(len(pair.responses) for pair in pairs) > 9:
        raise UserError("--rank asks for at most 9 responses to a prompt; without it they are compared two by two.")
    order_by = given.reward_model if given.order == "uncertain" else None
    choices = _labelled(name, pairs, given, rank=given.rank, order_by=order_by)
    line = f"{len(choices)} choices in {given.db}; ppo-rlhf reward --data {given.db} trains on them."
    return {"choices": len(choices), "collection": name}, [line]


def _pairs_to_label(given: Namespace) -> list[Pair]:
    """The pairs that `label` is about: of a file, of two runs, or sampled of one."""
    from ppo_rlhf.preferences import all_pairs

    drawn = {"prompts": given.prompts, "count": given.num_pairs, "seed": given.seed}
    if given.pairs is not None and len(given.pairs) == 1:
        from ppo_rlhf.data import load_rows
        from ppo_rlhf.preferences import pairs_from

        (path,) = given.pairs
        pairs = pairs_from(load_rows(path, required=(), setting="--pairs"), name=f"--pairs: {path}")
    else:
        from ppo_rlhf.candidates import samples_of_one, samples_of_two

        if given.pairs is None:
            pairs = samples_of_one(given.sample, responses=given.responses, **drawn)
        elif len(given.pairs) == 2:
            pairs = samples_of_two(*given.pairs, **drawn)
        else:
            raise UserError(f"--pairs takes a file or two runs, not {len(given.pairs)} names.")
    if not pairs:
        raise UserError("there is nothing to judge: all sampled responses are the same.")
    return pairs if given.rank else all_pairs(pairs)


def _check_labelling(given: Namespace) -> None:
    """Raises UserError for what can be seen to be wrong before anything is sampled or written."""
    from ppo_rlhf.label import check_host, is_name

    check_host(given.host, given.token)
    for name, least in (("overlap", 1), ("num_pairs", 1), ("responses", 2)):
        value = given.get(name, least)
        if not least <= value < 1_000_000:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least {least}.")
    if given.annotator is not None and not is_name(given.annotator):
        raise UserError(
            f"--annotator {given.annotator!r} is no name: it has 1 to 60 characters, none of them invisible."
        )


def _store(given: Namespace, *, create: bool) -> Store:
    from ppo_rlhf.data import preferences_store

    return preferences_store(given.db, setting="--db", create=create)


def _stored_choices(given: Namespace, collection: str | None) -> list[Choice]:
    store = _store(given, create=False)
    choices = store.choices(collection)
    store.close()
    return choices


def _labelled(
    name: str,
    pairs: list[Pair],
    given: Namespace,
    *,
    rank: bool = False,
    order_by: str | None = None,
    blind: bool = False,
) -> list[Choice]:
    """Puts pairs into the store and serves the labelling app over them; → the choices."""
    from ppo_rlhf.label import LabelSettings, serve

    store = _store(given, create=True)
    store.add(name, pairs, overlap=given.overlap, seed=given.seed)
    if order_by is not None:
        from ppo_rlhf.candidates import uncertainty_order

        store.arrange(uncertainty_order(store.pairs(name), order_by))
    settings = LabelSettings(
        name, annotator=given.annotator, token=given.token, strength=given.strength, rank=rank, blind=blind
    )

    def announce(address: str) -> None:
        print(f"label at {address}\nCtrl-C ends.", flush=True)

    serve(store, settings, host=given.host, port=given.port, announce=announce, finishable=blind)
    choices = store.choices(name)
    store.close()
    return choices


def _compare(given: Namespace) -> Outcome:
    """The win rate of one run over another: by new choices, or by those that the database has."""
    from ppo_rlhf.preferences import win_rate

    name = f"{given.run_a} and {given.run_b}"
    if given.label:
        from ppo_rlhf.candidates import samples_of_two

        _check_labelling(given)
        pairs = samples_of_two(given.run_a, given.run_b, prompts=given.prompts, count=given.num_pairs, seed=given.seed)
        choices = _labelled(name, pairs, given, blind=True)
    else:
        choices = _stored_choices(given, name)
    rate = win_rate(choices, given.run_a, given.run_b)
    if rate is None:
        raise UserError(f"{given.db} has no choice between {given.run_a} and {given.run_b}; --label asks for some.")
    line = (
        f"{given.run_a} wins {rate.share:.1%} against {given.run_b}: {rate.low:.1%} to {rate.high:.1%} with 95 % "
        f"confidence, {rate.count} pairs, a tie is half a win."
    )
    return {"win_rate": rate.share, "low": rate.low, "high": rate.high, "pairs": rate.count}, [line]


def _preferences(given: Namespace) -> Outcome:
    """Exports, imports or summarises the choices of a database."""
    from ppo_rlhf.preferences import choices_from, pair_rows, statistics_lines, statistics_of, write_rows

    if given.action == "import":
        from ppo_rlhf.data import load_rows

        path = _file_of(given)
        imported = choices_from(load_rows(path, required=(), setting="file"), name=path)
        store = _store(given, create=True)
        count = store.import_choices(given.collection or path, imported)
        store.close()
        return {"choices": count}, [f"imported {count} new choices of {len(imported)} into {given.db}"]
    choices = _stored_choices(given, given.collection)
    if not choices:
        of_collection = "" if given.collection is None else f" in collection {given.collection!r}"
        raise UserError(f"{given.db} holds no choices{of_collection}.")
    if given.action == "export":
        path = _file_of(given)
        rows = pair_rows(choices, ties=given.ties)
        write_rows(rows, Path(path))
        return {"rows": len(rows), "file": path}, [f"wrote {len(rows)} comparisons to {path}"]
    found = statistics_of(choices)
    return asdict(found), statistics_lines(found)


def _file_of(given: Namespace) -> str:
    if given.file is None:
        raise UserError(f"preferences {given.action} needs a file: ppo-rlhf preferences {given.action} FILE --db URL")
    return str(given.file)


def _study(given: Namespace) -> Outcome:
    """Runs a study; → its claims, and where its tables and pictures are."""
    from ppo_rlhf.run import new_folder
    from ppo_rlhf.study import kl_estimators

    folder = new_folder(given.output_dir, f"study-{given.name}", resume=False)
    results = kl_estimators.run(given.seed)
    folder.mkdir(parents=True, exist_ok=True)
    files = [str(path) for path in kl_estimators.write(results, folder)]
    lines = [*kl_estimators.lines_of(results), f"wrote {', '.join(files)}"]
    return {"claims": [asdict(claim) for claim in results.claims], "files": files}, lines


OTHERS = {
    "report": _report,
    "export": _export,
    "label": _label,
    "preferences": _preferences,
    "compare": _compare,
    "study": _study,
}
