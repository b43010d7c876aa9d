"""Randomness as a function of what it is for, so that nothing random needs saving.

A generator keyed by (seed, purpose, step, row) gives the same numbers whatever was drawn before it, however rows are
split over batches and processes, and whether or not the run was interrupted.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def keyed_seed(*key: int | str) -> int:
    """A seed in [0, 2**63) that depends on the key alone."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def keyed_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose state depends on the key alone; the numbers of a GPU are others than a CPU's."""
    return torch.Generator(device).manual_seed(keyed_seed(*key))


def permutation(length: int, *key: int | str) -> Tensor:
    """A random order of `length` things, (length,) int64, that depends on the key alone."""
    return torch.randperm(length, generator=keyed_generator(*key))


def uniform_rows(rows: list[int], length: int, *key: int | str) -> Tensor:
    """Uniform numbers in [0, 1), (len(rows), length) float32: line i depends on the key and rows[i] alone."""
    return torch.stack([torch.rand(length, generator=keyed_generator(*key, row)) for row in rows])
