"""The policy: acting on what environments show in all its forms, saving, loading, and one's own encoder."""

from __future__ import annotations

import copy
import functools
import json
import math

import control_cases as cases
import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

import classic
from classic import load, train
from classic.envs.gymnasium import action_space, observation_space
from classic.policy import Policy
from classic.settings import NetworkSettings
from classic.spaces import Box, Dict, Discrete, Tuple, encode
from ppo_rlhf.errors import UserError

BOX = spaces.Box(np.array([[-1, -3]], np.float32), np.array([[1, 1]], np.float32))  # of two axes
PICTURE = spaces.Box(0, 255, (36, 36, 3), np.uint8)
SEEN: dict[str, spaces.Space] = {
    "vector": spaces.Box(-1, 1, (2, 2), np.float32),
    "discrete": spaces.Discrete(3, start=1),
    "several": spaces.MultiDiscrete([2, 3]),
    "switches": spaces.MultiBinary(3),
    "dict": spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Box(0, 1, (2,), np.float64)}),
    "tuple": spaces.Tuple((spaces.Discrete(2), spaces.MultiBinary(2))),
    "image": PICTURE,
    "image and vector": spaces.Dict({"eye": PICTURE, "place": spaces.Box(0, 1, (2,), np.float32)}),
}
DONE: dict[str, spaces.Space] = {
    "discrete": spaces.Discrete(3, start=2),
    "several": spaces.MultiDiscrete([2, 3], start=[1, 0]),
    "switches": spaces.MultiBinary((2, 2)),
    "box": BOX,
}
KINDS = {  # what else a policy may have: its settings, and whether observations and rewards are normalised
    "plain": ({}, False),
    "normalized": ({}, True),
    "lstm": ({"recurrent": "lstm", "recurrent_size": 5}, True),
    "gru": ({"recurrent": "gru", "recurrent_size": 5}, False),
    "state_dependent": ({"gaussian": "state_dependent"}, False),
    "squashed": ({"gaussian": "squashed", "activation": "relu"}, False),
    "gsde": ({"gaussian": "gsde", "hidden_sizes": (6,)}, True),
    "linear": ({"hidden_sizes": (), "orthogonal": False}, False),
}


def policy_of(seen="vector", done="discrete", kind="plain", **settings):
    """With heads that prefer some actions to others."""
    network, normalized = KINDS[kind]
    torch.manual_seed(3)
    return Policy(
        observation_space(SEEN[seen]) if isinstance(seen, str) else seen,
        action_space(DONE[done]),
        NetworkSettings(**{"hidden_sizes": (8, 8), "policy_head_gain": 2.0, **network, **settings}),
        normalize_observations=normalized,
        reward_gamma=0.9 if normalized else None,
    )


def samples(name, num):
    """Observations of the environment's own, one by one."""
    space = copy.deepcopy(SEEN[name])
    space.seed(1)
    return [space.sample() for _ in range(num)]


def batch_of(observations):
    first = observations[0]
    if isinstance(first, dict):
        return {name: batch_of([each[name] for each in observations]) for name in first}
    if isinstance(first, tuple):
        return tuple(batch_of(list(parts)) for parts in zip(*observations, strict=True))
    return np.stack(observations)


def to_torch(observations):
    if isinstance(observations, dict):
        return {name: to_torch(inner) for name, inner in observations.items()}
    if isinstance(observations, tuple):
        return tuple(map(to_torch, observations))
    return torch.as_tensor(observations)


# --- acting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", DONE)
@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("deterministic", [True, False])
def test_actions_are_the_environment_s_own_one_or_many(seen, done, deterministic):
    policy = policy_of(seen, done)
    observations = samples(seen, 3)

    def act(shown):
        return policy.act(shown, deterministic, generator=cases.generator(5))

    several = act(batch_of(observations))
    assert isinstance(several, np.ndarray)
    assert len(several) == 3
    assert all(DONE[done].contains(action) for action in several)
    one = act(observations[0])
    assert isinstance(one, np.ndarray)
    assert DONE[done].contains(one)
    tensors = act(to_torch(batch_of(observations)))
    assert isinstance(tensors, torch.Tensor)
    np.testing.assert_array_equal(tensors, several)
    if deterministic:
        for observation, action in zip(observations, several, strict=True):
            np.testing.assert_allclose(act(observation), action, rtol=1e-5, atol=1e-6)


def test_the_deterministic_action_is_the_likeliest_and_is_the_default():
    policy = policy_of()
    observations = batch_of(samples("vector", 20))
    encoded = encode(policy.observation_space, observations)
    logprobs = policy(observations=encoded[:, None], actions=torch.zeros(20, 1, dtype=torch.long)).distribution[0]
    best = logprobs[:, 0].argmax(-1).numpy() + 2
    assert len(set(best)) > 1
    np.testing.assert_array_equal(policy.act(observations), best)


def test_stochastic_actions_are_as_frequent_as_their_probabilities():
    policy, num = policy_of(), 20_000
    (observation,) = samples("vector", 1)
    encoded = encode(policy.observation_space, observation[None])
    logprobs = policy(observations=encoded[:, None], actions=torch.zeros(1, 1, dtype=torch.long)).distribution[0]
    actions = policy.act(np.tile(observation, (num, 1, 1)), deterministic=False, generator=cases.generator())
    found = np.bincount(actions - 2, minlength=3) / num
    np.testing.assert_allclose(found, logprobs[0, 0].exp().detach(), atol=0.02)


def test_without_a_generator_torch_s_own_seed_decides():
    policy, observations = policy_of(done="box"), batch_of(samples("vector", 4))
    torch.manual_seed(5)
    first = policy.act(observations, deterministic=False)
    torch.manual_seed(5)
    np.testing.assert_array_equal(policy.act(observations, deterministic=False), first)
    assert not np.array_equal(policy.act(observations, deterministic=False), first)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_forbidden_action_is_not_taken(deterministic):
    policy, observations = policy_of(), batch_of(samples("vector", 200))
    mask = np.zeros((200, 3), np.int8)
    mask[np.arange(200), np.arange(200) % 3] = 1
    actions = policy.act(observations, deterministic, action_mask=mask)
    np.testing.assert_array_equal(actions, np.arange(200) % 3 + 2)
    assert policy.act(observations[0], deterministic, action_mask=np.array([False, True, False])) == 3
    pairs = policy_of(done="several").act(observations[:2], deterministic, action_mask=np.array([[1, 0, 0, 0, 1]] * 2))
    np.testing.assert_array_equal(pairs, [[1, 2]] * 2)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_recurrent_policy_acts_by_the_memory_it_is_given(kind):
    policy, observations = policy_of(done="box", kind=kind), samples("vector", 3)
    memory = policy.memory(1)
    with_memory = [policy.act(shown, memory=memory) for shown in observations]
    without = [policy.act(shown) for shown in observations]
    np.testing.assert_array_equal(with_memory[0], without[0])
    assert not np.allclose(with_memory[1], without[1])
    memory.forget([True])
    np.testing.assert_array_equal(policy.act(observations[2], memory=memory), without[2])


def test_a_value_is_read_without_moving_the_memory():
    policy = policy_of(kind="lstm")
    memory = policy.memory(2)
    observations = encode(policy.observation_space, batch_of(samples("vector", 2)))
    policy.decide(observations, None, memory, None)
    state = memory.state.clone()
    first = policy.value(observations, memory)
    assert torch.equal(policy.value(observations, memory), first)
    assert torch.equal(memory.state, state)


def test_actions_leave_no_gradient_behind():
    policy = policy_of(done="box")
    actions = policy.act(torch.zeros(2, 2, 2), deterministic=False)
    assert not actions.requires_grad


@pytest.mark.parametrize(
    "space", [Dict({"a": Discrete(2)}), Tuple((Discrete(2),)), Box((4, 4, 3), (0.0,), (255.0,), image=True)], ids=str
)
def test_a_space_that_cannot_be_acted_in_is_refused(space):
    with pytest.raises(UserError, match="action spaces are not supported"):
        Policy(Discrete(2), space)


# --- saving and loading ----------------------------------------------------------------------------------------------


def trained_a_little(policy, seen):
    """With parameters and statistics unlike those at the start."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=cases.generator(parameter.numel())))
    encoded = encode(policy.observation_space, batch_of(samples(seen, 6)))
    inputs = encoded if isinstance(encoded, dict) else {"observations": encoded}
    inputs = {name: x[:, None] for name, x in inputs.items()}
    policy.observe(inputs, torch.ones(6, 1, dtype=torch.bool))
    return policy


def assert_comes_back(policy, seen, folder):
    policy.save(folder)
    again = load(folder)
    assert cases.same(cases.copied(policy), cases.copied(again))
    assert again.settings == policy.settings
    assert (again.observation_space, again.action_space) == (policy.observation_space, policy.action_space)
    observations = batch_of(samples(seen, 4))
    for deterministic in (True, False):
        actions = [p.act(observations, deterministic, generator=cases.generator(2)) for p in (policy, again)]
        np.testing.assert_array_equal(*actions)
    return again


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("done", DONE)
def test_every_kind_of_policy_comes_back_from_its_folder_bit_for_bit(kind, done, tmp_path):
    again = assert_comes_back(trained_a_little(policy_of(done=done, kind=kind), "vector"), "vector", tmp_path)
    assert not again.training
    assert (again.normalizer is None) == (again.reward_normalizer is None) == (not KINDS[kind][1])


@pytest.mark.parametrize("seen", SEEN)
def test_policies_of_every_observation_space_come_back(seen, tmp_path):
    assert_comes_back(trained_a_little(policy_of(seen, kind="normalized"), seen), seen, tmp_path)


def test_unbounded_boxes_come_back(tmp_path):
    unbounded = Box((2, 2), (-math.inf,) * 4, (math.inf,) * 4)
    assert_comes_back(policy_of(unbounded), "vector", tmp_path)


def test_a_policy_is_loaded_from_the_run_around_it(tmp_path):
    policy = policy_of()
    policy.save(tmp_path / "policy")
    generator = torch.get_rng_state()
    assert cases.same(cases.copied(load(tmp_path)), cases.copied(policy))
    assert torch.equal(torch.get_rng_state(), generator)  # loading costs the caller no random numbers
    assert classic.load is load


def refused(folder):
    with pytest.raises(UserError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_a_folder_without_a_policy_is_refused(tmp_path):
    assert "policy.json" in refused(tmp_path)
    assert "policy.json" in refused(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["policy.json", "policy.safetensors"])
def test_a_damaged_file_is_told_in_one_line(name, tmp_path):
    policy_of().save(tmp_path)
    whole = (tmp_path / name).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\x00" * len(whole)):
        (tmp_path / name).write_bytes(damaged)
        assert "damaged" in refused(tmp_path)


def test_missing_weights_are_told_in_one_line(tmp_path):
    policy_of().save(tmp_path)
    (tmp_path / "policy.safetensors").unlink()
    assert "damaged" in refused(tmp_path)


def test_weights_of_another_policy_are_told_in_one_line(tmp_path):
    policy_of().save(tmp_path / "one")
    policy_of(hidden_sizes=(3,)).save(tmp_path / "other")
    (tmp_path / "other" / "policy.safetensors").replace(tmp_path / "one" / "policy.safetensors")
    assert "damaged" in refused(tmp_path / "one")


@pytest.mark.parametrize(
    "change", [{"network": {"hidden": 3}}, {"observation_space": {"kind": "Sphere"}}, {"action_space": None}]
)
def test_a_description_that_makes_no_sense_is_told_in_one_line(change, tmp_path):
    policy_of().save(tmp_path)
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert "damaged" in refused(tmp_path)


# --- one's own encoder -----------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    """An encoder of vectors."""

    num_features = 6

    def __init__(self, space=None, size=4):
        super().__init__()
        self.layer = nn.Linear(size, 6)

    def forward(self, x):
        return torch.relu(self.layer(2 * x))


class ByName(nn.Module):
    """An encoder of images and a vector."""

    num_features = 5

    def forward(self, observations):
        return torch.cat([observations["vector"], observations["image_eye"].float().mean((-1, -2)) / 255], dim=-1)


def test_an_encoder_named_in_the_settings_is_made_and_saved(tmp_path):
    policy = policy_of(encoder="test_policy:Doubled")
    assert isinstance(policy.encoder, Doubled)
    assert_comes_back(trained_a_little(policy, "vector"), "vector", tmp_path)


def test_an_encoder_given_as_a_module_is_asked_for_when_loading(tmp_path):
    policy = Policy(observation_space(SEEN["vector"]), Discrete(3), encoder=Doubled())
    policy.save(tmp_path)
    again = load(tmp_path, encoder=Doubled())
    assert cases.same(cases.copied(again), cases.copied(policy))
    assert "Doubled" in refused(tmp_path)


def test_an_encoder_of_several_inputs_gets_them_by_name():
    policy = Policy(observation_space(SEEN["image and vector"]), Discrete(3), encoder=ByName())
    assert policy.act(batch_of(samples("image and vector", 3))).shape == (3,)


def test_an_encoder_that_does_not_say_its_size_is_refused():
    with pytest.raises(UserError, match="num_features"):
        Policy(Discrete(2), Discrete(2), encoder=nn.Linear(2, 2))


def test_one_s_own_encoder_is_trained():
    space = observation_space(cases.Guess().observation_space)
    policy = Policy(space, Discrete(4), NetworkSettings(hidden_sizes=(8,)), encoder=Doubled())
    before = policy.encoder.layer.weight.clone()
    config = cases.config_of(
        num_envs=16, horizon=32, gamma=0.0, gae_lambda=0.0, optimizer={"lr": 1e-2}, ppo={"num_epochs": 4}
    )
    trained = train(cases.Guess, num_steps=4096, config=config, policy=policy)
    assert trained is policy
    assert not torch.equal(policy.encoder.layer.weight, before)
    assert cases.mean_reward(policy, cases.Guess) > 0.95


# --- one policy on another environment -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    ["Pendulum-v1", functools.partial(cases.Guess, spaces.Discrete(2)), functools.partial(cases.Guess, None, "image")],
    ids=str,
)
def test_a_policy_of_another_environment_is_refused_in_one_line(other):
    policy = train("CartPole-v1", num_steps=64, config=cases.config_of())
    with pytest.raises(UserError, match="another environment"):
        train(other, num_steps=64, config=cases.config_of(), policy=policy)


def test_an_environment_takes_the_actions_as_they_come():
    policy = train("CartPole-v1", num_steps=64, config=cases.config_of())
    env = gymnasium.make("CartPole-v1")
    observation, _ = env.reset(seed=0)
    following, reward, *_ = env.step(policy.act(observation))
    assert env.observation_space.contains(following)
    assert reward == 1
    env.close()


@pytest.mark.cuda
@cases.NO_GPU
@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_on_the_gpu_acts_and_is_loaded_on_the_cpu(kind, tmp_path):
    policy = trained_a_little(policy_of(done="box", kind=kind), "vector").cuda()
    observations = batch_of(samples("vector", 4))
    actions = policy.act(observations)
    assert isinstance(actions, np.ndarray)
    assert policy.act(torch.as_tensor(observations, device="cuda")).is_cuda
    policy.save(tmp_path)
    np.testing.assert_allclose(load(tmp_path).act(observations), actions, rtol=1e-3, atol=1e-4)
