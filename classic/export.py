"""A policy as one ONNX file: from the environment's own observations to actions that `env.step` takes."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from classic.policy import Memory, Policy
from classic.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space, Tuple, encode, to_native, vector_size
from ppo_rlhf.errors import UserError

PACKAGES = ("onnx", "onnxscript")
ACTION_MASK = "action_mask"
EXAMPLES = 2  # rows of the example that is traced; the file takes any number


class ActingPolicy(nn.Module):
    """`policy.act`, deterministic, as one function of tensors: encoding, normalisation, networks, mode of the
    distribution, clipping or squashing, and the environment's own counting.

    Takes the leaves of the observations (N, …), in their order; a recurrent policy also its memory, state (N, S) and
    starts (N,), True where an episode begins, and gives the next state (N, S) after the actions (N, …). `masked`: last
    the allowed choices (N, A).
    """

    def __init__(self, policy: Policy, *, masked: bool = False) -> None:
        super().__init__()
        self.policy = policy
        self.masked = masked

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        policy, leaves, memory = self.policy, list(inputs), None
        action_mask = leaves.pop() if self.masked else None
        if policy.core is not None:
            *leaves, state, starts = leaves
            memory = Memory(state, starts)
        observations, _ = _nested(policy.observation_space, leaves)
        actions = policy.decide(encode(policy.observation_space, observations), None, memory, action_mask)
        native = to_native(policy.action_space, policy.distribution.to_environment(actions))
        return (native,) if memory is None else (native, memory.state)


def export(policy: Policy, output: str | Path, *, action_mask: bool = False) -> Path:
    """Writes the policy to an ONNX file for batches of any size; → its path.

    Inputs: `observations`, or `observations.NAME` for each part of Dict and Tuple observations, in the environment's
    own shapes, int64 for choices, uint8 for images, else float32; of a recurrent policy also `state` and `starts`; with
    `action_mask` an input of that name, bool (N, A), True where a choice is allowed: as `policy.act` takes it, and for
    environments that tell one. Outputs: `actions`, and `next_state`.

    Raises UserError where a package is missing, the actions are none that a mask could forbid, or the file cannot be
    written.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'export needs {" and ".join(missing)}: pip install "ppo-rlhf[onnx]"')
    path = Path(output)
    if not path.parent.is_dir():
        raise UserError(f"output={output}: there is no folder {path.parent}.")
    acting = ActingPolicy(policy.cpu().eval(), masked=action_mask)
    examples = example_inputs(policy, action_mask=action_mask)
    temporary = path.with_name(f".{path.name}.partial")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # of operators that are in no policy
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own, about itself
        torch.onnx.export(
            acting,
            (list(examples.values()),),
            temporary,
            input_names=list(examples),
            output_names=["actions", "next_state"][: 1 if policy.core is None else 2],
            dynamic_shapes=([{0: torch.export.Dim("batch")}] * len(examples),),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    temporary.replace(path)
    return path


def example_inputs(policy: Policy, rows: int = EXAMPLES, *, action_mask: bool = False) -> dict[str, Tensor]:
    """Inputs of an exported policy by name, all 0 or the first choice, and every choice allowed."""
    inputs = {f"observations{name}": _example(space, rows) for name, space in _leaves(policy.observation_space).items()}
    if policy.core is not None:
        inputs["state"] = torch.zeros(rows, policy.core.state_size)
        inputs["starts"] = torch.ones(rows, dtype=torch.bool)
    if action_mask:
        inputs[ACTION_MASK] = torch.ones(rows, _num_choices(policy.action_space), dtype=torch.bool)
    return inputs


def _num_choices(space: Space) -> int:
    """How long a mask of the allowed actions is.

    Raises UserError where actions are not choices.
    """
    if not isinstance(space, Discrete | MultiDiscrete | MultiBinary):
        raise UserError(f"action_mask: {type(space).__name__} actions are not choices, none can be forbidden.")
    return vector_size(space)


def _leaves(space: Space, name: str = "") -> dict[str, Space]:
    """The parts that are arrays, by name: ".NAME" of a Dict's, ".0" of a Tuple's."""
    if not isinstance(space, Dict | Tuple):
        return {name: space}
    parts = space.spaces.items() if isinstance(space, Dict) else enumerate(space.spaces)
    return {key: leaf for label, inner in parts for key, leaf in _leaves(inner, f"{name}.{label}").items()}


def _nested(space: Space, leaves: Sequence[Tensor]) -> tuple[Any, Sequence[Tensor]]:
    """The leaves as the space nests them, and those that are left over."""
    if not isinstance(space, Dict | Tuple):
        return leaves[0], leaves[1:]
    inner = space.spaces.values() if isinstance(space, Dict) else space.spaces
    parts = []
    for each in inner:
        part, leaves = _nested(each, leaves)
        parts.append(part)
    return (dict(zip(space.spaces, parts, strict=True)) if isinstance(space, Dict) else tuple(parts)), leaves


def _example(space: Space, rows: int) -> Tensor:
    if isinstance(space, Discrete):
        return torch.full((rows,), space.start)
    if isinstance(space, MultiDiscrete):
        shape = space.shape or (len(space.nvec),)
        return torch.tensor(space.start).reshape(shape).repeat(rows, *[1] * len(shape))
    assert not isinstance(space, Dict | Tuple)
    image = isinstance(space, Box) and space.image
    return torch.zeros(rows, *space.shape, dtype=torch.uint8 if image else torch.float32)
