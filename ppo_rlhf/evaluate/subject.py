"""A policy that is evaluated: a run's final one, its best one, that of a checkpoint, or any other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_rlhf.adapters import train_adapter
from ppo_rlhf.compute import default_device
from ppo_rlhf.data import with_chat_template
from ppo_rlhf.errors import UserError
from ppo_rlhf.evaluation_settings import EvaluationSettings
from ppo_rlhf.models import load_policy
from ppo_rlhf.run import checkpoints_in, is_whole, number_of
from ppo_rlhf.sampling import SamplingSettings
from ppo_rlhf.saved_runs import policy_source, run_folder, run_settings, sampling_settings
from ppo_rlhf.settings import LoRASettings
from ppo_rlhf.train.averaging import put_average

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class Subject:
    """A policy, and how it samples."""

    name: str
    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: SamplingSettings
    task: dict[str, Any]  # the configuration of the PPO run by whose prompts and reward it is measured

    @property
    def micro_batch_size(self) -> int | None:
        """Rows of one forward, as that run has it; None: all that there are."""
        return self.task.get("ppo", {}).get("micro_batch_size")


def load_subject(name: str, task: str, settings: EvaluationSettings) -> Subject:
    """The policy of a run or a pipeline, of a folder, or of a name on the Hub, on the GPU where there is one.

    task: the PPO run whose way of sampling it takes. Raises UserError where there is no such policy.
    """
    run, source, trusted = run_settings(name), source_of(name, settings), settings.trust_remote_code
    if settings.step is not None:
        policy, tokenizer = policy_of_checkpoint(Path(source), run, trust_remote_code=trusted)
    else:
        policy, tokenizer = load_policy(source, setting=name, trust_remote_code=trusted)
    policy.to(default_device()).eval().requires_grad_(False)  # type: ignore[arg-type]
    asked: dict[str, Any] = {"temperature": settings.temperature, "max_new_tokens": settings.max_new_tokens}
    given = {setting: value for setting, value in asked.items() if value is not None}
    sampling = replace(sampling_settings(run_folder(task)), **given)
    return Subject(name, policy, with_chat_template(tokenizer, run.get("chat_template")), sampling, run_settings(task))


def source_of(name: str, settings: EvaluationSettings) -> str:
    """Where the policy's weights are: a checkpoint, a folder, or a name on the Hub. Raises UserError for none."""
    folder = run_folder(name)
    if settings.step is not None:
        return str(checkpoint_of(folder, settings.step))
    if settings.best:
        if not (folder / "best").is_dir():
            raise UserError(f"{name} holds no best policy apart from its final one; leave --best out.")
        return str(folder / "best")
    source = policy_source(name)
    if run_settings(name) and source == str(folder):
        raise UserError(f"{name} holds no policy: end the run by --resume, or name one of its checkpoints by --step.")
    return source


def checkpoint_of(folder: Path, step: int) -> Path:
    """The run's checkpoint of a step. Raises UserError where there is none, or it is damaged or sharded."""
    found = {number_of(path): path for path in checkpoints_in(folder / "checkpoints")}
    if step not in found:
        known = f"only of {', '.join(map(str, found))}" if found else "nor of any other"
        raise UserError(f"{folder} has no checkpoint of step {step}, {known}.")
    if not is_whole(found[step]) or not (found[step] / "model.safetensors").exists():
        raise UserError(f"checkpoint {found[step]} is damaged, or of sharded weights; take another.")
    return found[step]


def policy_of_checkpoint(checkpoint: Path, run: dict[str, Any], *, trust_remote_code: bool = False) -> Loaded:
    """The policy as a run would evaluate and save it after that step: with its average weights where it keeps some.

    The checkpoint's weights are put into the model that the run began with. Raises UserError where the run does not
    name that model, or names another.
    """
    if not run.get("policy"):
        raise UserError(f"{checkpoint}: the run does not name the policy that it began with; leave --step out.")
    lora = LoRASettings(**{**run["lora"], "target_modules": tuple(run["lora"]["target_modules"])})
    policy, tokenizer = load_policy(
        run["policy"],
        setting=f"the policy that {checkpoint} began with",
        trust_remote_code=trust_remote_code,
        base_bits=lora.base_bits,
    )
    train_adapter(policy, lora)
    put_weights(policy, load_file(checkpoint / "model.safetensors"), of=checkpoint)
    if (checkpoint / "loop.safetensors").exists():
        put_average(policy, load_file(checkpoint / "loop.safetensors"))
    return policy, tokenizer


def put_weights(policy: PreTrainedModel, weights: dict[str, Tensor], *, of: Path) -> None:
    """Puts the weights of the language model in a checkpoint into it. Raises UserError where they are not all of it."""
    names = {name: name.removeprefix("module.") for name in weights}  # as DDP calls them
    prefix = "language_model."
    given = {new.removeprefix(prefix): weights[name] for name, new in names.items() if new.startswith(prefix)}
    own = policy.state_dict()
    filled = {own[name].data_ptr() for name in given if name in own}  # tied weights are saved once
    fits = all(name in own and own[name].shape == each.shape for name, each in given.items())
    if not fits or any(each.data_ptr() not in filled for each in own.values()):
        raise UserError(f"checkpoint {of} is of another model than the run's configuration names.")
    with torch.no_grad():
        policy.load_state_dict(given, strict=False)
