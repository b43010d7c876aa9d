"""What CartPole and Pendulum in torch have in common: layout, resets, randomness, saving."""

from __future__ import annotations

import pytest
import torch

from classic.envs import CartPole, Pendulum
from ppo_rlhf.errors import UserError

KINDS = [CartPole, Pendulum]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    """Each of the two."""
    return request.param


def actions_of(envs, generator=None):
    if isinstance(envs, CartPole):
        return torch.randint(2, (envs.num_envs,), generator=generator)
    return 2 * torch.randn(envs.num_envs, 1, generator=generator)


def rollout(envs, num_steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [envs.step(actions_of(envs, generator)) for _ in range(num_steps)]


def same(steps, others):
    names = ("observations", "rewards", "terminated", "truncated", "decided")
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for a, b in zip(steps, others, strict=True) for name in names
    )


def test_what_a_step_answers_has_the_promised_shapes_and_types(kind):
    envs = kind(5)
    size = envs.observation_space.shape[0]
    step = rollout(envs, 1)[0]
    assert envs.reset().shape == step.observations.shape == (5, size)
    assert step.observations.dtype == step.rewards.dtype == torch.float32
    for flag in (step.rewards, step.terminated, step.truncated, step.decided):
        assert flag.shape == (5,)
    assert step.terminated.dtype == step.truncated.dtype == step.decided.dtype == torch.bool
    assert step.final_observations is None
    assert step.action_mask is None


def test_the_step_after_the_time_limit_resets_and_is_not_decided(kind):
    envs = kind(3, max_episode_steps=4)
    steps = rollout(envs, 10)
    assert [bool(step.truncated.all()) for step in steps] == [False, False, False, True, False] * 2
    assert [bool(step.decided.all()) for step in steps] == [True, True, True, True, False] * 2
    assert not any(step.terminated.any() for step in steps)
    assert steps[4].rewards.tolist() == [0, 0, 0]


def test_the_time_limit_counts_each_environment_by_itself(kind):
    envs = kind(3, max_episode_steps=4)
    envs.set_state(torch.zeros_like(envs.state), torch.tensor([0, 1, 2]))
    steps = rollout(envs, 4)
    assert [step.truncated.tolist() for step in steps] == [
        [False, False, False],
        [False, False, True],
        [False, True, False],
        [True, False, False],
    ]
    assert [step.decided.tolist() for step in steps[2:]] == [[True, True, False], [True, False, True]]


def test_without_a_time_limit_nothing_is_truncated():
    envs = Pendulum(2, max_episode_steps=None)
    assert not any(step.truncated.any() for step in rollout(envs, 450))


def test_no_later_step_writes_to_what_an_earlier_one_answered(kind):
    envs = kind(4, max_episode_steps=3)
    first = envs.reset()
    steps = [rollout(envs, 1)[0]]
    names = ("observations", "rewards", "terminated", "truncated", "decided")
    copies = [first.clone(), *(getattr(steps[0], name).clone() for name in names)]
    rollout(envs, 7)
    for kept, copy in zip([first, *(getattr(steps[0], name) for name in names)], copies, strict=True):
        assert torch.equal(kept, copy)


def test_writing_to_an_observation_does_not_move_the_environment(kind):
    envs, other = kind(4), kind(4)
    envs.reset().fill_(7.0)
    other.reset()
    assert same(rollout(envs, 3), rollout(other, 3))


def test_the_same_seed_gives_the_same_episodes_and_another_others(kind):
    one, same_seed, another = kind(3, seed=1), kind(3, seed=1), kind(3, seed=2)
    assert torch.equal(one.reset(), same_seed.reset())
    assert same(rollout(one, 30), rollout(same_seed, 30))
    assert not torch.equal(one.reset(), another.reset())


def test_reset_with_a_seed_begins_again(kind):
    envs = kind(3)
    first, steps = envs.reset(seed=5), rollout(envs, 20)
    assert torch.equal(envs.reset(seed=5), first)
    assert same(rollout(envs, 20), steps)
    assert not torch.equal(envs.reset(), first)


def test_a_saved_state_goes_on_bit_for_bit(kind):
    envs = kind(6, max_episode_steps=11, dtype=torch.float64)
    envs.reset()
    rollout(envs, 17)
    saved = envs.state_dict()
    expected = rollout(envs, 60, seed=1)
    other = kind(6, seed=9, max_episode_steps=11, dtype=torch.float64)
    other.load_state_dict(saved)
    assert same(rollout(other, 60, seed=1), expected)


def test_a_saved_state_stays_as_it_was_saved(kind):
    envs = kind(2)
    saved = envs.state_dict()
    copy = {name: value.clone() for name, value in saved.items() if isinstance(value, torch.Tensor)}
    rollout(envs, 30)
    assert all(torch.equal(saved[name], value) for name, value in copy.items())


def test_a_state_of_another_number_of_environments_is_refused(kind):
    with pytest.raises(UserError, match="of 3 environments, not of num_envs=2"):
        kind(2).load_state_dict(kind(3).state_dict())


def test_a_state_of_another_kind_of_device_is_refused(kind):
    saved = kind(2).state_dict()
    saved["generator"] = saved["generator"][:16]  # a GPU's state is so short
    with pytest.raises(UserError, match="another device's"):
        kind(2).load_state_dict(saved)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_no_environment_starts_twice_from_the_same_draw(kind, limit):
    envs = kind(3, max_episode_steps=limit)
    envs.reset()
    starts = [step.observations for step in rollout(envs, 60) if not step.decided.any()]
    numbers = torch.cat(starts).reshape(-1, envs.observation_space.shape[0])
    assert len(numbers) == 3 * (60 // (limit + 1))
    assert len(numbers.unique(dim=0)) == len(numbers)


def test_starts_fill_their_range_evenly():
    starts = CartPole(20_000).reset()
    assert starts.abs().max() <= 0.05
    assert torch.allclose(starts.mean(0), torch.zeros(4), atol=2e-3)
    assert torch.allclose(starts.std(0), torch.full((4,), 0.1 / 12**0.5), rtol=0.02)
    speeds = Pendulum(20_000).reset()
    assert torch.allclose(speeds[:, :2].mean(0), torch.zeros(2), atol=0.02)
    assert speeds[:, 2].abs().max() <= 1


def test_a_compiled_step_is_the_step(kind):
    envs, other = kind(4, max_episode_steps=9), kind(4, max_episode_steps=9)
    envs.reset(seed=0)
    other.reset(seed=0)
    expected = rollout(other, 30)
    envs.step = torch.compile(envs.step, backend="eager")
    assert same(rollout(envs, 30), expected)


@pytest.mark.parametrize("numbers", [{"num_envs": 0}, {"max_episode_steps": 0}, {"max_episode_steps": 2**24 + 1}])
def test_counts_that_cannot_be_are_refused(kind, numbers):
    with pytest.raises(UserError, match=next(iter(numbers))):
        kind(**{"num_envs": 1, **numbers})
