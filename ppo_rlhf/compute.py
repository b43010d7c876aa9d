"""The machine's matrix products: which way of taking them to use, how quick they are, and what a run makes of that."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

EXACT = 1e-6  # relative error up to which a product counts as float32's own
WORTH_IT = 1.4  # how much quicker another way must be: a close call would make two runs of one seed differ
SIDE = 512  # of the matrices that are multiplied to find out
TRIES = 15


@dataclass(frozen=True)
class Compute:
    """How matrix products are taken in this process, and the most that was measured of them."""

    precision: str  # torch.set_float32_matmul_precision
    peak_flops: float  # a second, in the type that the forward passes multiply in
    message: str  # the choice and its reason in a line


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def set_up_products(precision: str, device: torch.device, dtype: torch.dtype) -> Compute:
    """Chooses how float32 matrices are multiplied, for the whole process, and measures products of `dtype`.

    On a CPU `medium` goes through oneDNN, which is the quicker library on many machines, and on those without bf16
    matrix units as exact as the other. `auto` measures both against float64 and takes the quicker of those that are
    exact, all processes that of the first; on a GPU, where everything but `highest` drops digits, it stays with that.
    """
    reason = "as told"
    if precision == "auto":
        choice = [_quickest_exact() if device.type == "cpu" else ("highest", "exact on a GPU")]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(choice)
        precision, reason = choice[0]
    torch.set_float32_matmul_precision(precision)
    flops = _flops(device, dtype)
    name = str(dtype).removeprefix("torch.")
    message = f"matrix products: {precision} ({reason}), {flops / 1e9:,.0f} GFLOP/s in {name}"
    return Compute(precision, flops, message)


def _quickest_exact() -> tuple[str, str]:
    """`highest` or `medium`, and why."""
    before = torch.get_float32_matmul_precision()
    left, right = _matrices(torch.device("cpu"), torch.float32)
    exact = left.double() @ right.double()
    errors = {}
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        errors[precision] = float((left @ right - exact).norm() / exact.norm())
    seconds: dict[str, list[float]] = {"highest": [], "medium": []}
    for _ in range(TRIES):  # in turn, and the best: what else runs on the machine slows now one, now the other
        for precision, taken in seconds.items():
            torch.set_float32_matmul_precision(precision)
            taken.append(_seconds(left, right))
    torch.set_float32_matmul_precision(before)
    gain = min(seconds["highest"]) / min(seconds["medium"])
    if errors["medium"] > max(EXACT, errors["highest"]):
        return "highest", f"medium rounds, relative error {errors['medium']:.0e}"
    if gain < WORTH_IT:
        return "highest", f"medium is {gain:.2f} × as quick"
    return "medium", f"as exact, {gain:.2f} × as quick as highest"


def _flops(device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions a second in a product of two square matrices, the best of a few."""
    left, right = _matrices(device, dtype)
    _seconds(left, right)
    return 2 * len(left) ** 3 / min(_seconds(left, right) for _ in range(TRIES))


def _matrices(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Two square matrices, the same at every call; large ones for a GPU."""
    side = SIDE if device.type == "cpu" else 8 * SIDE
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2)]


def _seconds(left: Tensor, right: Tensor) -> float:
    """Of one product; on a CPU by the processor's clock, a thread's share: other programs slow it less."""
    if left.is_cuda:  # pragma: no cover - needs a GPU
        start = time.perf_counter()
        _ = left @ right
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    _ = left @ right
    return max((time.process_time() - start) / torch.get_num_threads(), 1e-9)


def num_multiplied(trunk: nn.Module) -> int:
    """Weights of a transformer that multiply each token: all matrices but embeddings, which are looked up."""
    looked_up = {id(m.weight) for m in trunk.modules() if isinstance(m, nn.Embedding)}
    return sum(p.numel() for p in trunk.parameters() if p.ndim >= 2 and id(p) not in looked_up)


def reset_peak_memory(device: torch.device) -> None:
    """`peak_memory_gib` counts from here on, on Linux and on a GPU; elsewhere it goes on since the process began."""
    if device.type == "cuda":  # pragma: no cover - needs a GPU
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): the peak becomes what there is now


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that the process has had since `reset_peak_memory`, in GiB: of the GPU where it works on one."""
    if device.type == "cuda":  # pragma: no cover - needs a GPU
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
