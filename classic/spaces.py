"""What an environment shows and takes, as plain data that a checkpoint can hold; and observations as tensors.

The kinds and their names are Gymnasium's. `classic.envs.gymnasium` turns Gymnasium's own spaces into these. Arrays of
several axes count as flattened, but for images, and choices from 0, whatever their `start`; `to_native` puts both back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Observations = Tensor | dict[str, Tensor]  # (N, D) float32, or by name: "vector" (N, D) and images (N, C, H, W) uint8


@dataclass(frozen=True)
class Discrete:
    """One of `n` choices, start, start + 1, …"""

    n: int
    start: int = 0


@dataclass(frozen=True)
class MultiDiscrete:
    """Several choices at once, the i-th one of nvec[i]."""

    nvec: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...] | None = None  # of the array, where it has more than one axis


@dataclass(frozen=True)
class MultiBinary:
    """Several switches, as an array of 0 and 1."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """An array of numbers between bounds; as an observation of uint8 with three or four axes, an image."""

    shape: tuple[int, ...]
    low: tuple[float, ...]  # flattened, as many as numbers; of an image (0,)
    high: tuple[float, ...]  # likewise; of an image (255,)
    image: bool = False  # bytes: (H, W, C); (C, H, W) with `channels_first`; (frames, H, W, C) where four axes
    channels_first: bool = False


@dataclass(frozen=True)
class Dict:
    """Spaces by name."""

    spaces: dict[str, Space]


@dataclass(frozen=True)
class Tuple:
    """Spaces in order."""

    spaces: tuple[Space, ...]


Flat = Discrete | MultiDiscrete | MultiBinary | Box
Space = Flat | Dict | Tuple


def to_plain(space: Space) -> dict[str, Any]:
    """The space as JSON's own types; `from_plain` reads it back."""
    kind = type(space).__name__
    if isinstance(space, Dict):
        return {"kind": kind, "spaces": {name: to_plain(inner) for name, inner in space.spaces.items()}}
    if isinstance(space, Tuple):
        return {"kind": kind, "spaces": [to_plain(inner) for inner in space.spaces]}
    return {"kind": kind, **asdict(space)}


def from_plain(plain: Mapping[str, Any]) -> Space:
    """The space that `to_plain` wrote."""
    if plain["kind"] == "Dict":
        return Dict({name: from_plain(inner) for name, inner in plain["spaces"].items()})
    if plain["kind"] == "Tuple":
        return Tuple(tuple(from_plain(inner) for inner in plain["spaces"]))
    fields: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in plain.items()}
    kinds = {kind.__name__: kind for kind in (Discrete, MultiDiscrete, MultiBinary, Box)}
    return kinds[fields.pop("kind")](**fields)


def outline(space: Space) -> str:
    """What must be the same for a policy to fit: kinds, shapes and numbers of choices, but no bounds."""
    match space:
        case Discrete():
            return f"{space.n} choices"
        case MultiDiscrete():
            return f"{space.nvec} choices"
        case Dict() | Tuple():
            return f"{type(space).__name__}({', '.join(f'{name}: {outline(inner)}' for name, inner in _parts(space))})"
    return f"{'image' if isinstance(space, Box) and space.image else type(space).__name__} {space.shape}"


def vector_size(space: Space) -> int:
    """How many numbers the space's observations give the vector that the networks read; images give none."""
    if isinstance(space, Discrete):
        return space.n
    if isinstance(space, MultiDiscrete):
        return sum(space.nvec)
    if isinstance(space, MultiBinary):
        return math.prod(space.shape)
    if isinstance(space, Box):
        return 0 if space.image else math.prod(space.shape)
    return sum(vector_size(inner) for _, inner in _parts(space))


def image_shapes(space: Space, name: str = "image") -> dict[str, tuple[int, int, int]]:
    """The images of the space's observations by name, each (C, H, W); stacked frames count as channels."""
    if isinstance(space, Box) and space.image:
        *frames, a, b, c = space.shape
        return {name: (a, b, c) if space.channels_first else (math.prod(frames) * c, a, b)}
    shapes = {}
    if isinstance(space, (Dict, Tuple)):
        for key, inner in _parts(space):
            shapes.update(image_shapes(inner, f"{name}_{key}"))
    return shapes


def encode(space: Space, observations: Any, device: torch.device | str = "cpu") -> Observations:
    """A batch of the environment's own observations (arrays, or nested dicts and tuples of them) as tensors.

    Discrete choices become one-hot, everything that is not an image one vector, in the space's order; images (N, C, H,
    W) bytes. A space without images gives the vector alone, (N, D) float32. Entries of a dict that the space does not
    name are left out. The tensors share no memory with the arrays.
    """
    vectors: list[Tensor] = []
    images: dict[str, Tensor] = {}
    _collect(space, observations, "image", vectors, images)
    if not images:
        return torch.cat(vectors, dim=-1).to(device)
    parts = {**({"vector": torch.cat(vectors, dim=-1)} if vectors else {}), **images}
    return {name: part.to(device) for name, part in parts.items()}


def is_batch(space: Space, observations: Any) -> bool:
    """Whether these are several of the environment's own observations, with a first axis for them, and not one."""
    if isinstance(space, (Dict, Tuple)):
        name, inner = _parts(space)[0]
        return is_batch(inner, observations[name] if isinstance(space, Dict) else observations[0])
    return len(np.shape(observations)) > len(_shape(space))


def to_native(space: Space, actions: Tensor) -> Tensor:
    """Actions (N, …), flattened and counted from 0, in the environment's own shape and counting."""
    assert not isinstance(space, (Dict, Tuple))
    shaped = actions.reshape(actions.shape[0], *_shape(space))
    if isinstance(space, MultiDiscrete):
        return shaped + torch.tensor(space.start, device=actions.device).reshape(_shape(space))
    return shaped + space.start if isinstance(space, Discrete) else shaped


def _shape(space: Flat) -> tuple[int, ...]:
    """That of one array."""
    if isinstance(space, Discrete):
        return ()
    return space.shape if space.shape is not None else (len(space.nvec),)


def _collect(space: Space, batch: Any, name: str, vectors: list[Tensor], images: dict[str, Tensor]) -> None:
    if isinstance(space, (Dict, Tuple)):
        for index, (key, inner) in enumerate(_parts(space)):
            part = batch[key] if isinstance(space, Dict) else batch[index]
            _collect(inner, part, f"{name}_{key}", vectors, images)
        return
    tensor = torch.as_tensor(batch)
    if isinstance(space, Discrete):
        vectors.append(F.one_hot(tensor.long().reshape(-1) - space.start, space.n).float())
    elif isinstance(space, MultiDiscrete):
        choices = tensor.long().reshape(tensor.shape[0], -1) - torch.tensor(space.start)
        vectors.extend(F.one_hot(choices[:, i], n).float() for i, n in enumerate(space.nvec))
    elif isinstance(space, Box) and space.image:
        images[name] = _channels_first(space, tensor).clone()
    else:
        vectors.append(tensor.reshape(tensor.shape[0], -1).float())


def _channels_first(space: Box, images: Tensor) -> Tensor:
    """(N, C, H, W) of (N, H, W, C), (N, C, H, W) or (N, frames, H, W, C)."""
    return images if space.channels_first else images.movedim(-1, -3).flatten(1, -3)


def _parts(space: Dict | Tuple) -> list[tuple[str, Space]]:
    if isinstance(space, Dict):
        return list(space.spaces.items())
    return [(str(index), inner) for index, inner in enumerate(space.spaces)]
