"""The command line of the control side. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace

from classic.config import Algorithm, CompareConfig, ExperimentConfig, ManyRuns, TrainConfig
from classic.presets import MUJOCO, PRESETS, preset_for
from classic.variants import DETAILS, SURROGATES
from ppo_rlhf.arguments import Command, CommandLine, read, run, settings_in
from ppo_rlhf.errors import UserError, did_you_mean
from ppo_rlhf.settings import flat, require

if TYPE_CHECKING:
    from classic.policy import Policy

Many = TypeVar("Many", bound=ManyRuns)
Outcome = tuple[dict[str, Any], list[str]]  # for --json, and for the eye
FORMATS = ("human", "video")


# ------------------------------------------------------------------------------------------------------- arguments


def _add_train(parser: ArgumentParser) -> None:
    parser.add_argument("environment_id", nargs="?", metavar="ENV_ID", help="a Gymnasium id, or module:EnvId")
    parser.add_argument("--max_episode_steps", type=int, help="short for --environment.max_episode_steps")
    parser.add_argument("--preset", help="settings to start from; by default those of the environment, if it has any")


def _add_run(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument("--best", action="store_true", help="the best policy of the run's evaluations, not the final")


def _add_episodes(parser: ArgumentParser, default: int) -> None:
    _add_run(parser)
    parser.add_argument("--episodes", type=int, default=default, help="how many are played")
    parser.add_argument("--stochastic", action="store_true", help="actions are sampled, not the likeliest")
    parser.add_argument("--seed", type=int, default=0, help="of the episodes")


def _add_evaluate(parser: ArgumentParser) -> None:
    _add_episodes(parser, default=100)
    parser.add_argument("--render", choices=FORMATS, help="in a window, or as videos in RUN/videos")


def _add_video(parser: ArgumentParser) -> None:
    _add_episodes(parser, default=1)
    parser.add_argument("--output_dir", help="where the videos go; by default RUN/videos")


def _add_export(parser: ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--output", metavar="FILE.onnx", help="by default RUN/policy.onnx")


def _add_plot(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the runs' folders")
    parser.add_argument("--output", metavar="FILE.png", help="the SVG and the CSV lie beside it")
    parser.add_argument("--metric", default="episode/return", help="a name in metrics.jsonl")
    parser.add_argument("--x", default="steps", help="likewise")
    parser.add_argument("--smooth", type=int, default=1, help="mean of the latest so many points")


def _add_compare(parser: ArgumentParser) -> None:
    default = CompareConfig()
    parser.add_argument("env_ids", nargs="*", metavar="ENV_ID", default=list(default.env_ids), help="Gymnasium ids")
    parser.add_argument("--algorithms", nargs="+", type=Algorithm, default=list(default.algorithms))
    _add_many_runs(parser, default.seeds)
    parser.add_argument("--eval_episodes", type=int, default=default.eval_episodes, help="of the final evaluation")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default=default.device)


def _add_many_runs(parser: ArgumentParser, seeds: Sequence[int]) -> None:
    parser.add_argument("--seeds", nargs="+", type=int, default=list(seeds), help="a run each")
    parser.add_argument("--num_steps", type=int | None, help="of a run; by default as the preset has them")
    parser.add_argument("--workers", type=int | None, help="runs at a time; by default as many as there are cores")
    parser.add_argument("--output_dir", help="by default a fresh numbered folder under runs/")
    parser.add_argument("--resume", action="store_true", help="go on with what is in --output-dir")


def _add_experiment(
    parser: ArgumentParser, *, env_ids: Sequence[str], seeds: Sequence[int], variants: Sequence[str]
) -> None:
    parser.add_argument(
        "--envs", dest="env_ids", nargs="+", metavar="ENV_ID", default=list(env_ids), help="Gymnasium ids"
    )
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", choices=variants, default=list(variants), help="what is compared"
    )
    _add_many_runs(parser, seeds)


def _preset(given: Namespace) -> dict[str, Any]:
    """What a run starts from: the preset that is named, or without a --config file the environment's own."""
    if given.preset is not None and given.preset not in PRESETS:
        hint = did_you_mean(given.preset, PRESETS)
        raise UserError(f"there is no preset {given.preset}.{hint} There are: {', '.join(PRESETS)}.")
    name = given.preset or (given.environment_id if given.config is None else None)
    return flat(asdict(preset_for(name, given.algorithm))) if name in PRESETS else {"env_id": ""}


def _earlier(given: Namespace, kind: type[ManyRuns]) -> dict[str, Any]:
    """The settings of the comparison that is resumed."""
    path = Path(given.output_dir or ".") / "config.yaml"
    if not given.resume or given.output_dir is None or not path.exists():
        return {}
    try:
        settings = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not of a comparison: {error}") from error
    unknown = settings.keys() - {field.name for field in fields(kind)}
    require(not unknown, f"{path} is not of a comparison: it has {', '.join(sorted(unknown))}.")
    return {name: value for name, value in settings.items() if name not in ("output_dir", "resume")}


# -------------------------------------------------------------------------------------------------------- commands


def _train(given: Namespace) -> Outcome:
    config = settings_in(given, TrainConfig)
    if given.environment_id is not None:
        config = replace(config, env_id=given.environment_id)
    if given.max_episode_steps is not None:
        config = replace(config, environment=replace(config.environment, max_episode_steps=given.max_episode_steps))
    require(config.env_id != "", "train needs an environment: train CartPole-v1, --preset, or --config with an env_id.")

    from classic import ppo
    from ppo_rlhf.run import new_folder

    folder = Path(config.output_dir or new_folder(None, "classic", resume=config.resume))  # as `run` will name it
    try:
        summary = ppo.run(config)[1]
    except KeyboardInterrupt:
        kept = any((folder / "checkpoints").glob("step_*"))
        print(f"{folder} holds {'a checkpoint' if kept else 'no checkpoint yet'}.", file=sys.stderr)
        raise
    if "finished" in summary:
        return summary, [f"{summary['finished']} is finished already; a larger --num-steps goes on with it."]
    lines = [
        f"{summary['env_id']}, {summary['algorithm']}, {summary['steps']:,} steps in {summary['seconds']:.1f} s",
        f"mean return {summary['return_before']:.1f} → {summary['return_after']:.1f} ± "
        f"{summary['return_std_after']:.1f}, at best {summary['return_best']:.1f}",
        f"run folder: {summary['output_dir']}",
    ]
    return summary, lines


def _evaluate(given: Namespace) -> Outcome:
    from classic.evaluate import evaluate

    config, policy = _run_of(given)
    how = _how(given)
    videos: list[Path] = []
    if given.render is None:
        outcome = evaluate(policy, config, **how)
    elif given.render == "human":
        from classic.video import watch

        outcome = watch(policy, config, **how)
    else:
        from classic.video import record

        outcome, videos = record(policy, config, Path(given.run) / "videos", **how)
    result = {
        "mean_return": outcome.metrics["eval/return"],
        "std_return": outcome.metrics["eval/return_std"],
        "mean_length": outcome.metrics["eval/length"],
        "episodes": given.episodes,
        "env_id": config.env_id,
        "policy": "best" if given.best else "final",
        "deterministic": not given.stochastic,
    }
    line = f"mean return {result['mean_return']:.2f} ± {result['std_return']:.2f} over {given.episodes} episodes"
    return result, [line, *map(str, videos)]


def _video(given: Namespace) -> Outcome:
    from classic.video import record

    config, policy = _run_of(given)
    folder = given.output_dir or Path(given.run) / "videos"
    outcome, videos = record(policy, config, folder, **_how(given))
    paths = [str(path) for path in videos]
    return {"videos": paths, "returns": outcome.returns.tolist()}, [f"wrote {path}" for path in paths]


def _plot(given: Namespace) -> Outcome:
    from classic.plot import plot

    default = Path(given.runs[0]) / "learning_curve.png" if len(given.runs) == 1 else Path("learning_curves.png")
    paths = plot(given.runs, given.output or default, metric=given.metric, x=given.x, smooth=given.smooth)
    return paths, [f"wrote {path}" for path in paths.values()]


def _export(given: Namespace) -> Outcome:
    from classic.evaluate import tells_masks
    from classic.export import export

    config, policy = _run_of(given)
    try:
        masks = tells_masks(config.env_id, config.environment)
    except UserError as error:
        masks = False
        print(f"no action_mask is asked for: {error}", file=sys.stderr)
    path = str(export(policy, given.output or Path(given.run) / "policy.onnx", action_mask=masks))
    return {"onnx": path}, [f"wrote {path}"]


def _compare(given: Namespace) -> Outcome:
    from classic.compare import compare

    config = _many_runs(given, CompareConfig, "env_ids", "algorithms", "seeds")
    summary = compare(config)
    return summary, _written(summary, "comparison.md")


def _table1(given: Namespace) -> Outcome:
    from classic.table1 import table1

    summary = table1(_many_runs(given, ExperimentConfig, "env_ids", "variants", "seeds"))
    return summary, _written(summary, "table1.md")


def _ablations(given: Namespace) -> Outcome:
    from classic.ablations import ablations

    summary = ablations(_many_runs(given, ExperimentConfig, "env_ids", "variants", "seeds"))
    return summary, _written(summary, "ablations.md")


def _many_runs(given: Namespace, kind: type[Many], *lists: str) -> Many:
    """The settings of a command that makes many runs."""
    values = {field.name: given[field.name] for field in fields(kind)}
    return kind(**values | {name: tuple(given[name]) for name in lists})


def _written(summary: Mapping[str, Any], name: str) -> list[str]:
    """The table that a command wrote into its folder."""
    return [(Path(summary["output_dir"]) / name).read_text(encoding="utf-8")]


def _how(given: Namespace) -> dict[str, Any]:
    """How episodes are played."""
    require(given.episodes >= 1, f"episodes={given.episodes} must be at least 1.")
    require(0 <= given.seed < 2**32, f"seed={given.seed} must lie between 0 and 2**32 - 1.")
    return {"episodes": given.episodes, "seed": given.seed, "deterministic": not given.stochastic}


def _run_of(given: Namespace) -> tuple[TrainConfig, Policy]:
    """The settings of a run, from its folder, and its final policy, or its best one."""
    path = Path(given.run) / "config.yaml"
    require(path.exists(), f"{given.run} holds no run: there is no config.yaml in it.")
    saved = read(COMMAND_LINE, ["train", "--config", str(path)])
    assert saved is not None
    folder = Path(given.run) / ("best" if given.best else "policy")
    kind, way_out = ("best", "leave --best out") if given.best else ("final", "end it by train --resume")
    require(folder.exists(), f"{given.run} holds no {kind} policy yet; {way_out}.")

    from classic.policy import load

    return settings_in(saved.train, TrainConfig), load(folder)


COMMANDS = {
    "train": Command("Train a policy on an environment.", TrainConfig, _add_train, base=_preset),
    "evaluate": Command("Play fresh episodes with a run's policy.", add_arguments=_add_evaluate),
    "plot": Command("Draw the learning curves of one or several runs.", add_arguments=_add_plot),
    "compare": Command(
        "Run algorithms over seeds, and compare how they end.",
        add_arguments=_add_compare,
        base=partial(_earlier, kind=CompareConfig),
    ),
    "table1": Command(
        "Compare surrogate objectives as table 1 of the PPO paper does.",
        add_arguments=partial(_add_experiment, env_ids=MUJOCO, seeds=(0, 1, 2), variants=tuple(SURROGATES)),
        base=partial(_earlier, kind=ExperimentConfig),
    ),
    "ablations": Command(
        "Measure what each implementation detail is worth.",
        add_arguments=partial(_add_experiment, env_ids=ManyRuns.env_ids, seeds=ManyRuns.seeds, variants=tuple(DETAILS)),
        base=partial(_earlier, kind=ExperimentConfig),
    ),
    "video": Command("Record episodes of a run's policy.", add_arguments=_add_video),
    "export": Command("Write a run's policy as an ONNX file.", add_arguments=_add_export),
}
COMMAND_LINE = CommandLine("python -m classic", "PPO, PPO-Penalty and TRPO on control tasks.", COMMANDS)
EXECUTE: dict[str, Callable[[Namespace], Outcome]] = {
    "train": _train,
    "evaluate": _evaluate,
    "plot": _plot,
    "compare": _compare,
    "table1": _table1,
    "ablations": _ablations,
    "video": _video,
    "export": _export,
}


def entry_point() -> None:
    """What `python -m classic` calls."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Runs a command. → its exit code, as `ppo_rlhf.arguments.run` says."""
    return run(COMMAND_LINE, _execute, argv)


def _execute(command: str, given: Namespace) -> None:
    result, lines = EXECUTE[command](given)
    if given.json:
        from ppo_rlhf.run import strict_json

        print(strict_json(result))
    else:
        print("\n".join(lines))
