"""Micro-batches: how many rows go through a model at once, fewer when memory runs out; and gradients that add up."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from ppo_rlhf.errors import UserError

T = TypeVar("T")
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class MicroBatch:
    """The rows that go through a model at once: as many as are asked for, fewer for good once memory runs out.

    Losses are sums divided by the counts of a whole optimizer step, so that nothing but the speed depends on it.
    """

    def __init__(self, size: int | None, accelerator: Accelerator, *, setting: str) -> None:
        """size: None takes all rows that there are. setting: its name, for messages."""
        self.size = size
        self.setting = setting
        self.accelerator = accelerator

    def fitting(self, work: Callable[[int], T], rows: int, *, undo: Callable[[], object] = lambda: None) -> T:
        """work(size), size ≤ rows; begun again with half of it as long as any process runs out of memory in it.

        What `work` left behind is forgotten by `undo`, and it draws the same random numbers again. It may not wait for
        other processes: one that ran out would leave them waiting.

        Raises UserError where one row does not fit, and for sharded models, whose every pass waits for all processes.
        """
        generators = [torch.default_generator, *torch.cuda.default_generators]
        while True:
            size = min(rows, self.size or rows)
            states = [generator.get_state() for generator in generators]
            outcome, fits = _attempt(work, size)
            if self._in_all_processes(fits):
                return outcome  # type: ignore[return-value]
            undo()
            clear_device_cache(garbage_collection=True)
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            self._halve(size)

    def _in_all_processes(self, fits: bool) -> bool:
        if self.accelerator.num_processes == 1 or is_sharded(self.accelerator):
            return fits
        failures = self.accelerator.reduce(torch.tensor(float(not fits), device=self.accelerator.device))
        return float(failures) == 0

    def _halve(self, size: int) -> None:
        if size == 1:
            raise UserError(
                f"out of memory with {self.setting}=1: one row does not fit beside the models; shorten the rows, or "
                "take smaller models."
            )
        if is_sharded(self.accelerator):
            raise UserError(f"out of memory with {size} rows at once: set {self.setting}={size // 2}, and --resume.")
        self.size = size // 2
        if self.accelerator.is_main_process:
            warnings.warn(
                f"out of memory: {self.setting} is {self.size} from now on, which changes nothing but the speed.",
                stacklevel=3,
            )


def _attempt(work: Callable[[int], T], size: int) -> tuple[T | None, bool]:
    """What the work returned, and whether memory sufficed; without the error, which would hold the work's tensors."""
    try:
        return work(size), True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None, False


def is_out_of_memory(error: Exception) -> bool:
    """Whether it says that memory of the processor or of a GPU ran out; Windows words it differently."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error)
    return known or "DefaultCPUAllocator: not enough memory" in str(error)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of the models, which the passes through them gather."""
    return accelerator.distributed_type in SHARDED


def local_gradients(
    module: nn.Module, accelerator: Accelerator, *, last: bool
) -> contextlib.AbstractContextManager[Any]:
    """For a micro-batch's passes, which leave their gradient in the process until `average_gradients`.

    Sharded models, which cannot, reduce theirs over the processes in the last micro-batch.
    """
    return contextlib.nullcontext() if last and is_sharded(accelerator) else accelerator.no_sync(module)


def average_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """The mean of all processes' gradients in the place of each one's own, once all of them have theirs."""
    if accelerator.num_processes == 1 or is_sharded(accelerator):
        return
    gradients: list[Tensor] = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for work in [torch.distributed.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()
    torch._foreach_div_(gradients, accelerator.num_processes)
