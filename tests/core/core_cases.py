"""What the tests of the core share: drawn rows of decisions, poison for masked slots, and emulated processes."""

from __future__ import annotations

import threading
from collections.abc import Callable

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, settings
from hypothesis.extra.numpy import arrays
from torch import Tensor

POISONS = (float("nan"), float("inf"), float("-inf"))

examples = settings(
    deadline=None,
    max_examples=30,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def floats(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, width=32)


def tensors(*shape: int, low: float = -3.0, high: float = 3.0) -> st.SearchStrategy[Tensor]:
    return arrays("float64", shape, elements=floats(low, high)).map(torch.from_numpy)


def masks(*shape: int) -> st.SearchStrategy[Tensor]:
    return arrays("bool", shape).map(torch.from_numpy)


@st.composite
def rows(draw, num: int, *, low: float = -3.0, high: float = 3.0):
    """`num` tensors (B, T) and a mask of the same shape."""
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    return [*(draw(tensors(*shape, low=low, high=high)) for _ in range(num)), draw(masks(*shape))]


def random_rows(num: int, *, seed: int = 0, shape: tuple[int, int] = (3, 5)) -> tuple[Tensor, ...]:
    """`num` normal tensors (B, T), and a mask with True and False in it: for gradients, where drawing adds nothing."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < 0.6
    mask[0, 0], mask[-1, -1] = True, False
    return *(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(num)), mask


def rows_of(*lists: list[float]) -> Tensor:
    """Numbers written out row by row, (B, T) float64."""
    return torch.tensor(lists, dtype=torch.float64)


def assert_close(actual, expected, *, atol: float = 1e-10, rtol: float = 1e-9) -> None:
    """Asserts equality in float64; `expected` may be nested lists."""
    actual, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (actual, expected))
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def assert_masked_slots_do_not_matter(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], mask: Tensor
) -> None:
    """NaN, inf and −inf in the masked slots of every input change neither the value nor any gradient."""

    def value_and_gradients(tensors: list[Tensor]) -> list[Tensor]:
        leaves = [leaf(tensor) for tensor in tensors]
        value = function(*leaves, mask)
        # Unequal weights, or the gradient of whitened numbers, whose sum is always 0, would show nothing.
        weights = torch.linspace(1, 2, value.numel(), dtype=value.dtype).reshape(value.shape)
        gradients = torch.autograd.grad((value * weights).sum(), leaves, allow_unused=True)
        return [value, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True))]

    clean = value_and_gradients(list(inputs))
    assert all(torch.isfinite(each).all() for each in clean)
    for poison in POISONS:
        poisoned = value_and_gradients([torch.where(mask, x, poison) for x in inputs])
        for with_poison, without in zip(poisoned, clean, strict=True):
            assert_close(with_poison, without)


def as_processes(function: Callable[[int, Callable[[Tensor], Tensor]], Tensor], num: int) -> list[Tensor]:
    """Runs function(rank, sum_across) in `num` threads whose `sum_across` really adds up what all of them brought."""
    barrier = threading.Barrier(num, timeout=20)
    brought: list[Tensor | None] = [None] * num
    results: list[Tensor | None] = [None] * num

    def process(rank: int) -> None:
        def sum_across(x: Tensor) -> Tensor:
            brought[rank] = x
            barrier.wait()
            total = torch.stack(list(brought)).sum(0)  # type: ignore[arg-type]
            barrier.wait()
            return total

        results[rank] = function(rank, sum_across)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results  # type: ignore[return-value]
