"""Checkpoints: written beside, verified by checksums, and moved into place in one step."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ppo_rlhf.errors import UserError


@dataclass(frozen=True)
class LoopState:
    """All that a resume needs besides weights, optimizer and the global generators, which Accelerate saves."""

    step: int = 0  # steps completed
    kl_coef: float = 0.0  # the adapted coefficient of the next step
    before: dict[str, float] = field(default_factory=dict)  # the evaluation before the first step
    after: dict[str, float] = field(default_factory=dict)  # the latest; in supervised stages of the model to keep
    best: float = -math.inf  # its quality, higher is better
    score_moments: tuple[float, float, float] = (0.0, 1.0, 0.0)  # by which scores are normalised: mean, variance, count
    tensors: dict[str, Tensor] = field(default_factory=dict)  # of environments, a rollout sampled ahead, averages


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` when all is on disk; an error changes nothing."""
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        seal(temporary)
        discard = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(discard, ignore_errors=True)  # left by a crash
        if folder.exists():
            folder.rename(discard)
        temporary.rename(folder)
        sync(folder.parent)
        shutil.rmtree(discard, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def told_if_unwritable(path: Path) -> Iterator[None]:
    """Raises UserError, which names the path, where a disk is full, or may not be written."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):  # torch.save's
            raise
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} cannot be written: {reason}. What was saved before is whole: mend it, and go on with --resume."
        ) from error


def seal(folder: Path) -> None:
    """Forces the folder and everything in it onto the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Forces a file, or the names in a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def save_checkpoint(folder: Path, state: LoopState, accelerator: Accelerator, *, keep: int) -> None:
    """Saves weights, optimizer, generators and the loop's state; then removes all but the latest `keep` checkpoints."""
    target = folder / f"step_{state.step:06d}"
    temporary = folder / f".{target.name}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)  # tied weights are saved once, on purpose
    accelerator.save_state(str(temporary), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        numbers = asdict(replace(state, tensors={}))
        (temporary / "loop.json").write_text(json.dumps(numbers), encoding="utf-8")
        if state.tensors:
            save_file({name: x.contiguous() for name, x in state.tensors.items()}, temporary / "loop.safetensors")
        manifest = {str(path.relative_to(temporary)): checksum(path) for path in files_of(temporary)}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        seal(temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        sync(folder)
        # A later one was damaged, or this run would have gone on from it.
        later = [path for path in checkpoints_in(folder) if path.name > target.name]
        earlier = [path for path in checkpoints_in(folder) if path.name <= target.name]
        for old in later + earlier[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(folder: Path, accelerator: Accelerator) -> LoopState | None:
    """Loads the latest checkpoint whose files are whole; None where there is no checkpoint at all.

    Raises UserError where all are damaged, and for a checkpoint of another model.
    """
    found = checkpoints_in(folder)
    for path in reversed(found):
        if is_whole(path):
            try:
                accelerator.load_state(str(path))
            except RuntimeError as error:  # names or shapes that differ
                raise UserError(
                    f"checkpoint {path} is of another model: {' '.join(str(error).split())[:200]}"
                ) from error
            numbers = json.loads((path / "loop.json").read_text(encoding="utf-8"))
            tensors = path / "loop.safetensors"
            numbers = {name: tuple(x) if isinstance(x, list) else x for name, x in numbers.items()}
            return LoopState(**{**numbers, "tensors": load_file(tensors) if tensors.exists() else {}})
        if path == found[0]:
            raise UserError(
                f"every checkpoint in {folder} is damaged; put a whole one there, or remove them to begin anew."
            )
        accelerator.print(f"checkpoint {path} is damaged; the one before it is used.", file=sys.stderr)
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def number_of(checkpoint: Path) -> int:
    """The step after which it was saved."""
    return int(checkpoint.name.removeprefix("step_"))


def is_whole(checkpoint: Path) -> bool:
    """Whether every file that the manifest names is there, byte for byte."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        return all(checksum(checkpoint / name) == expected for name, expected in manifest.items())
    except (OSError, ValueError):
        return False


def files_of(folder: Path) -> list[Path]:
    """All files below a folder, in a fixed order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
