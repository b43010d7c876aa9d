"""Gymnasium's environments as a batch: resets of each mode, spaces, actions, masks, wrappers, seeds."""

from __future__ import annotations

import os
from importlib.util import find_spec

import environment_cases as cases
import numpy as np
import pytest
import torch
from gymnasium import spaces

from classic.envs import make_environments
from classic.envs.gymnasium import GymnasiumEnvironments, observation_space
from classic.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from ppo_rlhf.errors import UserError

GO, STOP = 0, cases.STOP
PROCESSES = pytest.mark.parametrize("vectorization", ["sync", "async"])


@pytest.fixture
def make():
    """Makes environments that are closed at the end."""
    made = []

    def make(env, num_envs=2, **settings):
        made.append(GymnasiumEnvironments(env, num_envs, **settings))
        return made[-1]

    yield make
    for envs in made:
        envs.close()


def needs(*modules):
    """Skips without these modules, unless all of them are said to be there."""
    missing = [name for name in modules if find_spec(name) is None]
    required = os.environ.get("PPO_RLHF_REQUIRE_ALL") == "1"
    return pytest.mark.skipif(bool(missing) and not required, reason=f"without {', '.join(missing)}")


def play(envs, *actions):
    return [envs.step(torch.tensor(action)) for action in actions]


def shown(steps, environment=0, name="observations"):
    return [tuple(getattr(step, name)[environment].tolist()) for step in steps]


# ----------------------------------------------------------------------------------------------- ends and new starts
# Two environments that are cut off after three steps; the second is stopped in its first step and then runs on.

ACTIONS = [[GO, STOP], [GO, GO], [GO, GO], [GO, GO], [GO, GO]]


@PROCESSES
def test_next_step_resets_in_a_step_of_its_own_that_is_not_decided(make, vectorization):
    envs = make(cases.Counting, vectorization=vectorization)
    assert envs.reset().tolist() == [[1, 0], [1, 0]]
    steps = play(envs, *ACTIONS)
    assert shown(steps, 0) == [(1, 1), (1, 2), (1, 3), (2, 0), (2, 1)]
    assert shown(steps, 1) == [(1, 1), (2, 0), (2, 1), (2, 2), (2, 3)]
    assert [step.decided.tolist() for step in steps] == [[1, 1], [1, 0], [1, 1], [0, 1], [1, 1]]
    assert [step.terminated.tolist() for step in steps] == [[0, 1], [0, 0], [0, 0], [0, 0], [0, 0]]
    assert [step.truncated.tolist() for step in steps] == [[0, 0], [0, 0], [1, 0], [0, 0], [0, 1]]
    assert [step.rewards.tolist() for step in steps] == [[1, 1], [2, 0], [3, 1], [0, 2], [1, 3]]
    assert all(step.final_observations is None for step in steps)


@PROCESSES
@pytest.mark.parametrize("autoreset", ["same_step", "disabled"])
def test_the_other_modes_show_the_new_start_and_the_true_last_observation(make, vectorization, autoreset):
    envs = make(cases.Counting, vectorization=vectorization, autoreset=autoreset)
    assert envs.reset().tolist() == [[1, 0], [1, 0]]
    steps = play(envs, *ACTIONS)
    assert shown(steps, 0) == [(1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
    assert shown(steps, 1) == [(2, 0), (2, 1), (2, 2), (3, 0), (3, 1)]
    assert shown(steps, 0, "final_observations") == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]
    assert shown(steps, 1, "final_observations") == [(1, 1), (2, 1), (2, 2), (2, 3), (3, 1)]
    assert all(step.decided.all() for step in steps)
    assert [step.terminated.tolist() for step in steps] == [[0, 1], [0, 0], [0, 0], [0, 0], [0, 0]]
    assert [step.truncated.tolist() for step in steps] == [[0, 0], [0, 0], [1, 0], [0, 1], [0, 0]]
    assert [step.rewards.tolist() for step in steps] == [[1, 1], [2, 1], [3, 2], [1, 3], [2, 1]]


def test_both_flags_stay_as_the_environment_set_them(make):
    envs = make(cases.Counting, env_kwargs={"limit": 1})
    envs.reset()
    step = play(envs, [STOP, GO])[0]
    assert step.terminated.tolist() == [True, False]
    assert step.truncated.tolist() == [True, True]


def test_reset_forgets_which_episodes_had_ended(make):
    envs = make(cases.Counting)
    envs.reset()
    play(envs, [STOP, STOP])
    assert envs.reset().tolist() == [[2, 0], [2, 0]]
    assert play(envs, [GO, GO])[0].decided.all()


def test_an_own_vectorization_says_itself_how_it_resets(make):
    envs = make("Counting-v0", vectorization="vector_entry_point")
    envs.reset()
    step = play(envs, [STOP, GO])[0]
    assert step.observations.tolist() == [[2, 0], [1, 1]]
    assert step.final_observations.tolist() == [[1, 1], [1, 1]]


def test_gymnasiums_own_cartpole_runs_in_next_step_mode(make):
    envs = make("CartPole-v1", 3, vectorization="vector_entry_point", max_episode_steps=2)
    envs.reset()
    steps = play(envs, *[[0, 1, 0]] * 4)
    assert [step.decided.all().item() for step in steps] == [True, True, False, True]
    assert steps[1].truncated.all()


@PROCESSES
@pytest.mark.parametrize("autoreset", ["next_step", "same_step", "disabled"])
def test_no_later_step_writes_to_what_an_earlier_one_answered(make, vectorization, autoreset):
    envs = make(cases.Counting, vectorization=vectorization, autoreset=autoreset)
    first = envs.reset()
    steps = play(envs, *ACTIONS)
    envs.reset()
    assert first.tolist() == [[1, 0], [1, 0]]
    assert shown(steps, 1)[0] == ((1, 1) if autoreset == "next_step" else (2, 0))


def test_dict_observations_have_their_true_last_ones_too(make):
    envs = make(cases.MaskShown, autoreset="same_step")
    envs.reset()
    step = play(envs, [STOP, 0])[0]
    assert step.final_observations.tolist() == [[1, 1], [1, 1]]
    assert step.observations.tolist() == [[2, 0], [1, 1]]


# ------------------------------------------------------------------------------------------------------------ spaces

IMAGE = spaces.Box(0, 255, (5, 4, 3), np.uint8)
OBSERVATIONS = [
    (spaces.Box(-1, 2, (2, 3), np.float64), Box((2, 3), (-1.0,) * 6, (2.0,) * 6), (2, 6)),
    (spaces.Box(0, 9, (4,), np.uint8), Box((4,), (0.0,) * 4, (9.0,) * 4), (2, 4)),
    (spaces.Discrete(3, start=-1), Discrete(3, -1), (2, 3)),
    (spaces.MultiDiscrete([2, 3]), MultiDiscrete((2, 3), (0, 0)), (2, 5)),
    (spaces.MultiDiscrete([[2, 3]], start=[[1, 0]]), MultiDiscrete((2, 3), (1, 0), (1, 2)), (2, 5)),
    (spaces.MultiBinary((2, 2)), MultiBinary((2, 2)), (2, 4)),
    (spaces.Tuple((spaces.Discrete(2), spaces.MultiBinary(3))), Tuple((Discrete(2), MultiBinary((3,)))), (2, 5)),
    (
        spaces.Dict(b=spaces.Discrete(2), a=spaces.MultiBinary(1)),
        Dict({"a": MultiBinary((1,)), "b": Discrete(2)}),
        (2, 3),
    ),
]


@pytest.mark.parametrize(("theirs", "ours", "shape"), OBSERVATIONS, ids=[str(case[0]) for case in OBSERVATIONS])
@PROCESSES
def test_observations_of_each_space_become_one_vector(make, theirs, ours, shape, vectorization):
    envs = make(lambda: cases.Showing(theirs), vectorization=vectorization)
    assert envs.observation_space == ours
    observations = envs.reset()
    assert observations.shape == play(envs, [0, 0])[0].observations.shape == shape
    assert observations.dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "channels_first", "expected"),
    [((5, 4, 3), False, (3, 5, 4)), ((4, 8, 6), True, (4, 8, 6)), ((2, 5, 4, 3), False, (6, 5, 4))],
)
def test_bytes_with_three_or_four_axes_are_images(make, shape, channels_first, expected):
    envs = make(lambda: cases.Showing(spaces.Box(0, 255, shape, np.uint8)))
    assert envs.observation_space == Box(shape, (0.0,), (255.0,), image=True, channels_first=channels_first)
    observations = envs.reset()
    assert list(observations) == ["image"]
    assert observations["image"].shape == (2, *expected)
    assert observations["image"].dtype == torch.uint8


def test_an_image_keeps_its_pixels(make):
    envs = make(lambda: cases.Showing(IMAGE), 1)
    image = envs.reset()["image"]
    pixels = envs._envs.envs[0].unwrapped.shown
    assert torch.equal(image[0], torch.from_numpy(pixels).permute(2, 0, 1))


def test_images_among_other_observations_keep_their_name(make):
    envs = make(lambda: cases.Showing(spaces.Dict(eye=IMAGE, mood=spaces.Discrete(2))))
    observations = envs.reset()
    assert {name: tuple(x.shape) for name, x in observations.items()} == {"vector": (2, 2), "image_eye": (2, 3, 5, 4)}


@PROCESSES
def test_an_unsupported_space_is_named(make, vectorization):
    text, group = spaces.Dict(words=spaces.Text(5)), spaces.Dict(a=spaces.Discrete(2))
    with pytest.raises(UserError, match=r"unsupported observation space Text\("):
        make(lambda: cases.Showing(text), vectorization=vectorization)
    with pytest.raises(UserError, match=r"unsupported action space Dict\("):
        make(lambda: cases.Showing(IMAGE, group), vectorization=vectorization)


# ----------------------------------------------------------------------------------------------------------- actions


@PROCESSES
@pytest.mark.parametrize(
    ("space", "actions", "received"),
    [
        (spaces.Discrete(3), [2, 0], [[2], [0]]),
        (spaces.Discrete(3, start=5), [2, 0], [[7], [5]]),
        (spaces.MultiDiscrete([3, 4]), [[2, 3], [0, 1]], [[2, 3], [0, 1]]),
        (spaces.MultiDiscrete([[3], [4]], start=[[1], [-1]]), [[2, 3], [0, 1]], [[3, 2], [1, 0]]),
        (spaces.MultiBinary((1, 2)), [[1, 0], [0, 1]], [[1, 0], [0, 1]]),
        (spaces.Box(-1, 1, (2, 1), np.float32), [[0.5, -1.0], [0.25, 1.0]], [[0.5, -1.0], [0.25, 1.0]]),
        (spaces.Box(-1, 1, (1,), np.float64), [[0.5], [0.25]], [[0.5], [0.25]]),
    ],
    ids=str,
)
def test_actions_arrive_in_the_shape_type_and_counting_of_the_environment(
    make, space, actions, received, vectorization
):
    envs = make(lambda: cases.Echo(space), vectorization=vectorization)
    envs.reset()
    assert play(envs, actions)[0].observations.tolist() == received


# ------------------------------------------------------------------------------------------------------------- masks


def forbidden(mask):
    """The choice that each row forbids, or None."""
    return [next((i for i, allowed in enumerate(row) if not allowed), None) for row in mask.tolist()]


@PROCESSES
@pytest.mark.parametrize("env", [cases.Masked, cases.MaskShown])
def test_masks_belong_to_the_observations_they_come_with(make, env, vectorization):
    envs = make(env, vectorization=vectorization)
    envs.reset()
    assert forbidden(envs.action_mask) == [0, 0]
    steps = play(envs, [GO, STOP], [GO, GO])
    assert [forbidden(step.action_mask) for step in steps] == [[1, 1], [2, 0]]
    assert forbidden(envs.action_mask) == [2, 0]
    assert steps[0].action_mask.dtype == torch.bool


@pytest.mark.parametrize("env", [cases.Masked, cases.MaskShown])
@pytest.mark.parametrize("autoreset", ["same_step", "disabled"])
def test_after_a_reset_in_the_step_the_mask_is_the_new_starts(make, env, autoreset):
    envs = make(env, autoreset=autoreset)
    envs.reset()
    steps = play(envs, [GO, STOP], [GO, GO])
    assert [forbidden(step.action_mask) for step in steps] == [[1, 0], [2, 1]]


@pytest.mark.parametrize("autoreset", ["next_step", "same_step", "disabled"])
def test_an_environment_that_says_nothing_in_a_step_allows_everything(make, autoreset):
    envs = make(lambda: cases.Masked(limit=9, rarely=True), autoreset=autoreset)
    envs.reset()
    steps = play(envs, [GO, GO], [GO, GO])
    assert [forbidden(step.action_mask) for step in steps] == [[None, None], [2, 2]]


def test_a_mask_may_be_a_tuple_of_arrays(make):
    envs = make(cases.MaskedPairs)
    envs.reset()
    assert envs.action_mask.int().tolist() == [[1, 0, 1, 0, 1]] * 2


def test_of_stacked_frames_the_latest_mask_counts(make):
    envs = make(cases.MaskShown, frame_stack=2)
    assert envs.reset().shape == (2, 4)
    assert forbidden(play(envs, [GO, GO])[0].action_mask) == [1, 1]


def test_without_masks_there_is_none(make):
    envs = make(cases.Counting)
    envs.reset()
    assert envs.action_mask is None
    assert play(envs, [GO, GO])[0].action_mask is None


def test_a_mask_of_the_wrong_length_is_an_error(make):
    with pytest.raises(UserError, match="action_mask of 3 numbers, for 4 choices"):
        make(cases.WrongMask).reset()


# -------------------------------------------------------------------------------------- wrappers, limits, arguments


def test_wrappers_are_applied_in_their_order_as_callables_or_by_name(make):
    envs = make(cases.Counting, wrappers=[cases.Halved, "environment_cases:Halved"])
    envs.reset()
    assert play(envs, [GO, GO])[0].observations.tolist() == [[0.25, 0.25]] * 2


def test_stacked_frames_are_one_vector_oldest_first(make):
    envs = make(cases.Counting, frame_stack=2, wrappers=[cases.Halved])
    assert envs.reset().tolist() == [[0.5, 0, 0.5, 0]] * 2
    assert play(envs, [GO, GO])[0].observations.tolist() == [[0.5, 0, 0.5, 0.5]] * 2


@pytest.mark.parametrize("env", [cases.Counting, "Counting-v0", "environment_cases:Counting-v0"])
def test_the_time_limit_can_be_set(make, env):
    envs = make(env, max_episode_steps=2)
    envs.reset()
    assert [step.truncated.any().item() for step in play(envs, [GO, GO], [GO, GO])] == [False, True]


def test_the_registered_time_limit_holds_unless_it_is_taken_away(make):
    for limit, expected in [(None, True), (-1, False)]:
        envs = make("CartPole-v1", 1, max_episode_steps=limit)
        assert envs._envs.envs[0].has_wrapper_attr("_max_episode_steps") is expected


def test_arguments_reach_the_environment(make):
    for env in (cases.Counting, "Counting-v0"):
        envs = make(env, env_kwargs={"limit": 1})
        envs.reset()
        assert play(envs, [GO, GO])[0].truncated.all()


# ------------------------------------------------------------------------------------------------ seeds and saving


@PROCESSES
def test_the_same_seed_gives_the_same_starts_and_each_environment_its_own(make, vectorization):
    first = make("Acrobot-v1", 3, seed=4, vectorization=vectorization).reset()
    assert torch.equal(make("Acrobot-v1", 3, seed=4).reset(), first)
    assert torch.equal(make("Acrobot-v1", 3).reset(seed=4), first)
    assert len(first.unique(dim=0)) == 3


def test_neighbouring_seeds_share_no_environment(make):
    starts = torch.cat([make("Acrobot-v1", 4, seed=seed).reset() for seed in (0, 1, 2)])
    assert len(starts.unique(dim=0)) == 12


def test_a_second_reset_draws_anew(make):
    envs = make("Acrobot-v1", 2, seed=0)
    assert not torch.equal(envs.reset(), envs.reset())


def test_there_is_no_state_to_save(make):
    envs = make(cases.Counting)
    assert envs.state_dict() == {}
    envs.load_state_dict({})


# ------------------------------------------------------------------------------------------------------------ extras


@needs("ale_py", "cv2")
@pytest.mark.parametrize(("frame_stack", "channels"), [(1, 1), (4, 4)])
def test_atari_frames_are_preprocessed_and_stacked(make, frame_stack, channels):
    envs = make("ALE/Pong-v5", 1, atari=True, frame_stack=frame_stack)
    image = envs.reset()["image"]
    assert image.shape == (1, channels, 84, 84)
    assert play(envs, [0])[0].observations["image"].dtype == torch.uint8


@needs("mujoco")
def test_a_mujoco_environment_steps(make):
    envs = make("InvertedPendulum-v5", 2)
    envs.reset()
    assert play(envs, [[0.0], [1.0]])[0].observations.shape == (2, 4)


@needs("Box2D")
def test_a_box2d_environment_steps(make):
    envs = make("LunarLander-v3", 2)
    envs.reset()
    assert play(envs, [0, 2])[0].observations.shape == (2, 8)


# ------------------------------------------------------------------------------------- all of Gymnasium's small ones


@pytest.mark.parametrize("env", ["Acrobot-v1", "MountainCarContinuous-v0", "FrozenLake-v1", "Blackjack-v1"])
def test_gymnasiums_own_environments_step(make, env):
    envs = make_environments(env, num_envs=2)
    envs.reset()
    continuous = isinstance(envs.action_space, Box)
    steps = play(envs, *[[[0.5], [0.5]] if continuous else [0, 1]] * 5)
    assert all(torch.isfinite(step.observations).all() for step in steps)
    envs.close()


def test_the_spaces_of_a_space_within_a_space_are_found():
    nested = spaces.Tuple((spaces.Dict(a=spaces.Discrete(2)), IMAGE))
    assert observation_space(nested).spaces[0] == Dict({"a": Discrete(2)})
