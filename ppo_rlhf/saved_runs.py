"""What a run on disk was about: its policy, its prompts, its reward, and how it sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ppo_rlhf.data import Row, held_out, load_rows
from ppo_rlhf.errors import UserError
from ppo_rlhf.reward_settings import RewardPart, RewardSource
from ppo_rlhf.run import read_config
from ppo_rlhf.settings import SamplingSettings


def run_folder(run: str) -> Path:
    """The folder of the run itself: of a pipeline, that of its last stage."""
    return Path(run) / "ppo" if (Path(run) / "ppo" / "policy").is_dir() else Path(run)


def run_settings(run: str) -> dict[str, Any]:
    """The run's configuration; nothing of a policy without a run."""
    return read_config(run_folder(run)) or {}


def is_ppo_run(name: str) -> bool:
    """Whether it is the folder of a PPO run, or of a pipeline that ended with one."""
    return "kl_coef" in run_settings(name)


def policy_folder(run: str) -> Path:
    """Where the run's policy is, or `run` itself, where it is one. Raises UserError for a folder that is not there."""
    folder = run_folder(run)
    if not folder.is_dir():
        raise UserError(f"there is no run in {run}: no such folder.")
    return folder / "policy" if (folder / "policy").is_dir() else folder


def policy_source(name: str) -> str:
    """Where the weights of a policy are: that of a run, one in a folder, or the name that it has on the Hub."""
    return str(policy_folder(name)) if run_folder(name).is_dir() else name


def prompt_rows(run: str, prompts: str | None) -> list[Row]:
    """The rows of the given prompts, else of those in the run's configuration. Raises UserError where it has none."""
    setting, columns = "--prompts", {}
    if prompts is None:
        config = run_settings(run)
        prompts, setting = config.get("eval_prompts") or config.get("prompts"), f"the prompts of {run}"
        columns = config.get("columns", {})
    if prompts is None:
        raise UserError(f"{run} names no prompts; give some with --prompts.")
    return load_rows(prompts, required=("prompt",), setting=setting, columns=columns)


def held_out_rows(run: str, prompts: str | None) -> list[Row]:
    """The rows of the given prompts, else of those that the run held out. Raises UserError where it has none."""
    rows, config = prompt_rows(run, prompts), run_settings(run)
    if prompts is None and config.get("eval_prompts") is None:
        _, rows = held_out(rows, config["eval_fraction"], config["seed"], setting="eval_fraction")
    return rows


def sampling_settings(folder: Path) -> SamplingSettings:
    """How the run sampled; a policy without a run, or a stage that does not sample, as the defaults say."""
    settings = dict((read_config(folder) or {}).get("sampling") or {})
    lists = {name: tuple(settings.get(name, ())) for name in ("stop_token_ids", "stop_strings")}
    return SamplingSettings(**settings | lists)


def reward_source(run: str) -> RewardSource | None:
    """The reward that the run's configuration names, None where it names none."""
    source = run_settings(run).get("reward")
    if source is None or isinstance(source, str):
        return source
    several = [{**part, "reward": _one_or_several(part["reward"])} for part in source]
    return tuple(RewardPart(**part) for part in several)


def _one_or_several(reward: str | list[str]) -> str | tuple[str, ...]:
    return reward if isinstance(reward, str) else tuple(reward)
