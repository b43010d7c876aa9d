"""The processes of a run, through Accelerate."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ppo_rlhf.errors import UserError, did_you_mean

T = TypeVar("T")


MALLOPT_LIMITS = {-3: 2**25, -1: 2**27}  # glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, bytes


def make_accelerator(folder: Path | None, *, precision: str, log_with: Sequence[str], cpu: bool = False) -> Accelerator:
    """An Accelerator on the GPU where there is one and `cpu` does not forbid it, else explicitly on the CPU.

    folder: where trackers write; None: nowhere.

    Raises UserError when a launcher started several processes that Accelerate does not see, since each would silently
    train alone; and for a tracker that is unknown or not installed.
    """
    installed = {"all", *(tracker.value for tracker in get_available_trackers())}
    for name in log_with:
        if name not in LoggerType.list():
            raise UserError(f"log_with: there is no tracker {name!r}.{did_you_mean(name, LoggerType.list())}")
        if name not in installed:  # Accelerate would track nothing
            raise UserError(f"log_with: {name} needs its package, which is not installed: pip install {name}.")
    if precision == "fp16" and not torch.accelerator.is_available():
        raise UserError("precision=fp16 needs a GPU; use bf16, or no.")
    keep_freed_memory()
    AcceleratorState._reset_state()  # the stages of one pipeline may differ in precision
    accelerator = Accelerator(
        cpu=cpu or not torch.accelerator.is_available(),
        mixed_precision=precision,
        log_with=list(log_with) or None,
        project_dir=None if folder is None else str(folder),
    )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise UserError(
            f"the launcher started {launched} processes, but Accelerate sees {accelerator.num_processes}: "
            "on CPUs set ACCELERATE_USE_CPU=true, or start with torchrun."
        )
    return accelerator


def keep_freed_memory() -> None:
    """Lets the C library keep freed tensors of up to 32 MiB for the next ones, on Linux; elsewhere nothing.

    By default glibc gives each block of 128 KiB and more back to the system when it is freed and gets the next one page
    by page: a small network's update spent a third of its time so.
    """
    library: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "mallopt"):  # not every C library has it
        for parameter, limit in MALLOPT_LIMITS.items():
            library.mallopt(parameter, limit)


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Gathers the weights of a sharded module (FSDP2) on every process for a while; of any other does nothing.

    For what calls a part of it, or not equally often on all processes, or saves it on one: sampling, evaluation and
    saving. All processes enter and leave together.
    """
    sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
    if not sharded:
        yield
        return
    sharded[0]._get_fsdp_state()._lazy_init()  # or the first block that is called would take itself for the root
    # FSDP2's hooks shard the weights again before a state_dict, so that nothing could be saved whole.
    hooks = {part: part._state_dict_pre_hooks.copy() for part in module.modules() if part._state_dict_pre_hooks}
    for part in hooks:
        part._state_dict_pre_hooks.clear()
    for part in sharded:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in sharded:
        part.set_reshard_after_forward(True, recurse=False)
        part.reshard()
    for part, its_hooks in hooks.items():
        part._state_dict_pre_hooks.update(its_hooks)


def end_processes() -> None:
    """Waits for all processes and ends their group: the last thing that a command does."""
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return PartialState().is_main_process


def in_main_process(work: Callable[[], None]) -> None:
    """Does something once, in one process, while the others wait."""
    if is_main_process():
        work()
    PartialState().wait_for_everyone()


def share_of(total: int, accelerator: Accelerator) -> slice:
    """This process's consecutive share of `total` rows that all processes divide between them."""
    size = -(-total // accelerator.num_processes)
    return slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)


def gathered(rows: list[T]) -> list[T]:
    """The rows of all processes, in the order of the processes, on every process."""
    collected: list[Any] = gather_object(rows)
    return collected
