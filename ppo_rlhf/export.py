"""A trained model for use elsewhere: plain weights in a chosen type, tokenizer, settings, card; here or on the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from ppo_rlhf.adapters import merged
from ppo_rlhf.errors import UserError
from ppo_rlhf.models import load_policy
from ppo_rlhf.rewards import RewardModel
from ppo_rlhf.run.checkpoints import replaced_folder, told_if_unwritable

Type = Literal["float32", "bfloat16", "float16"]
FOLDERS = ("policy", "reward_model", "ppo/policy", "reward/reward_model", "sft/policy")  # of a run, or of a pipeline
CONFIGS = ("config.json", "adapter_config.json")


def export(run: Path, output: Path, *, dtype: Type = "float32") -> Path:
    """Writes the model of a run, or of a model's folder, into `output`: an adapter merged; → output.

    Raises UserError where there is no model, or `output` holds something already.
    """
    source = model_folder(run)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} holds something already; give a new folder.")
    model, tokenizer = _load(source)
    with told_if_unwritable(output), replaced_folder(output) as folder:
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for name in ("generation_config.json", "README.md"):  # as the run wrote them
            if (source / name).exists():
                (folder / name).write_bytes((source / name).read_bytes())
    return output


def model_folder(run: Path) -> Path:
    """The folder of the run's model, or `run` itself where it is one. Raises UserError where there is none."""
    for folder in (run, *(run / name for name in FOLDERS)):
        if any((folder / name).exists() and _is_model(folder / name) for name in CONFIGS):
            return folder
    raise UserError(f"{run} is neither a run that has saved a model, nor a model's folder.")


def _is_model(config: Path) -> bool:
    return config.name != "config.json" or "model_type" in json.loads(config.read_text(encoding="utf-8"))


def _load(source: Path) -> tuple[Any, Any]:
    """The plain model and its tokenizer."""
    if source.name == "reward_model" or _is_classifier(source):
        reward_model = RewardModel.load(source, setting="run")
        return merged(reward_model.classifier), reward_model.tokenizer
    model, tokenizer = load_policy(str(source), setting="run")
    return merged(model), tokenizer


def _is_classifier(source: Path) -> bool:
    names = [source / name for name in ("config.json", "base_config.json") if (source / name).exists()]
    return any("SequenceClassification" in str(json.loads(path.read_text())["architectures"]) for path in names)


def push(folder: Path, name: str, *, private: bool) -> str:
    """Uploads the folder to the Hub as `name`, made where there is none; → its address. Raises UserError."""
    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload by ppo_rlhf")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--push-to-hub {name}: {reason}. {folder} is complete; log in by `hf auth login`, or set HF_TOKEN."
        ) from error
    return str(address)
