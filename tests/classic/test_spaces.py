"""Spaces as plain data, and observations and actions between the environment's form and tensors."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from classic.spaces import (
    Box,
    Dict,
    Discrete,
    MultiBinary,
    MultiDiscrete,
    Tuple,
    encode,
    from_plain,
    image_shapes,
    is_batch,
    to_native,
    to_plain,
    vector_size,
)

IMAGE = Box((4, 5, 3), (0.0,), (255.0,), image=True)
STACK = Box((2, 4, 5), (0.0,), (255.0,), image=True, channels_first=True)
COLOUR_STACK = Box((2, 4, 5, 3), (0.0,), (255.0,), image=True)
ALL = [
    Discrete(3, -1),
    MultiDiscrete((2, 3), (0, 1)),
    MultiDiscrete((2, 3), (0, 1), (2, 1)),
    MultiBinary((2, 2)),
    Box((2,), (-math.inf, 0.0), (1.0, math.inf)),
    IMAGE,
    Dict({"a": Discrete(2), "b": Tuple((IMAGE, MultiBinary((1,))))}),
]


@pytest.mark.parametrize("space", ALL, ids=str)
def test_a_space_comes_back_from_json(space):
    assert from_plain(json.loads(json.dumps(to_plain(space)))) == space


def test_discrete_observations_become_one_hot_from_their_start():
    assert encode(Discrete(3, -1), np.array([-1, 1])).tolist() == [[1, 0, 0], [0, 0, 1]]


def test_each_choice_of_several_has_its_own_one_hot():
    space = MultiDiscrete((2, 3), (0, 1))
    assert encode(space, np.array([[1, 1], [0, 3]])).tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]


def test_a_dict_becomes_one_vector_in_its_order_and_leaves_out_what_it_does_not_name():
    space = Dict({"a": Discrete(2), "b": Box((1, 2), (0.0,) * 2, (9.0,) * 2)})
    observations = {"b": np.array([[[7, 8]]]), "a": np.array([1]), "c": np.array([3])}
    assert encode(space, observations).tolist() == [[0, 1, 7, 8]]


def test_vectors_are_float32_whatever_the_environment_shows():
    for kind in (np.float64, np.int64, np.uint8, np.bool_):
        assert encode(MultiBinary((2,)), np.array([[0, 1]], dtype=kind)).dtype == torch.float32


@pytest.mark.parametrize(
    ("space", "shape"), [(IMAGE, (3, 4, 5)), (STACK, (2, 4, 5)), (COLOUR_STACK, (6, 4, 5))], ids=["HWC", "CHW", "FHWC"]
)
def test_images_put_their_channels_first(space, shape):
    batch = np.random.default_rng(0).integers(256, size=(2, *space.shape), dtype=np.uint8)
    image = encode(space, batch)["image"]
    assert image_shapes(space) == {"image": shape}
    assert image.shape == (2, *shape)
    assert image.dtype == torch.uint8


def test_stacked_colour_frames_keep_frame_by_frame_order():
    batch = np.zeros((1, *COLOUR_STACK.shape), dtype=np.uint8)
    batch[0, 1, 2, 3, 0] = 9  # the second frame's first colour
    assert encode(COLOUR_STACK, batch)["image"][0, 3, 2, 3] == 9


def test_images_and_the_vector_are_told_apart():
    space = Dict({"eye": IMAGE, "place": Box((2,), (0.0,) * 2, (1.0,) * 2), "eyes": Tuple((IMAGE,))})
    image = np.zeros((1, 4, 5, 3), dtype=np.uint8)
    observations = encode(space, {"eye": image, "place": np.ones((1, 2)), "eyes": (image,)})
    assert list(observations) == ["vector", "image_eye", "image_eyes_0"]
    assert vector_size(space) == 2
    assert list(image_shapes(space)) == ["image_eye", "image_eyes_0"]


@pytest.mark.parametrize(
    ("space", "size"),
    [(Discrete(4), 4), (MultiDiscrete((2, 3), (0, 0)), 5), (MultiBinary((2, 2)), 4), (IMAGE, 0)],
    ids=str,
)
def test_the_vectors_size_is_known_beforehand(space, size):
    assert vector_size(space) == size


@pytest.mark.parametrize("space", [Box((2,), (0.0,) * 2, (1.0,) * 2), IMAGE], ids=["vector", "image"])
def test_tensors_share_no_memory_with_the_arrays(space):
    array = np.zeros((1, *space.shape), dtype=np.uint8 if space.image else np.float32)
    encoded = encode(space, array)
    array[:] = 1
    assert not (encoded["image"] if space.image else encoded).any()


@pytest.mark.parametrize(
    ("space", "one"),
    [
        (Discrete(2), 1),
        (MultiDiscrete((2, 3), (0, 0)), np.zeros(2)),
        (MultiDiscrete((2, 3), (0, 0), (2, 1)), np.zeros((2, 1))),
        (MultiBinary((2, 2)), np.zeros((2, 2))),
        (IMAGE, np.zeros((4, 5, 3))),
        (Dict({"a": Discrete(2)}), {"a": 0}),
        (Tuple((Discrete(2), IMAGE)), (0, np.zeros((4, 5, 3)))),
    ],
    ids=str,
)
def test_one_observation_is_told_from_several(space, one):
    def several(part):
        if isinstance(part, dict):
            return {name: several(inner) for name, inner in part.items()}
        return tuple(several(inner) for inner in part) if isinstance(part, tuple) else np.stack([part, part])

    assert not is_batch(space, one)
    assert is_batch(space, several(one))


def test_tensors_are_told_apart_too():
    assert is_batch(Discrete(2), torch.tensor([0, 1]))
    assert not is_batch(Discrete(2), torch.tensor(0))


@pytest.mark.parametrize(
    ("space", "actions", "native"),
    [
        (Discrete(3, 5), [2, 0], [7, 5]),
        (MultiDiscrete((3, 4), (0, 1)), [[2, 3]], [[2, 4]]),
        (MultiDiscrete((3, 4), (1, -1), (2, 1)), [[2, 3]], [[[3], [2]]]),
        (MultiBinary((1, 2)), [[1, 0]], [[[1, 0]]]),
        (Box((2, 1), (0.0,) * 2, (1.0,) * 2), [[0.5, 1.0]], [[[0.5], [1.0]]]),
    ],
    ids=str,
)
def test_actions_take_the_environments_shape_and_counting(space, actions, native):
    assert to_native(space, torch.tensor(actions)).tolist() == native
