"""An exported policy acts as the policy does, from the environment's own observations to its own actions."""

import math
import os
import shutil

import numpy as np
import pytest
import torch
from command_cases import answer, cartpole, finished_runs, in_tmp_path, refused

from classic import load
from classic.export import example_inputs, export
from classic.policy import Policy
from classic.settings import NetworkSettings
from classic.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

__all__ = ["cartpole", "finished_runs", "in_tmp_path"]

if not os.environ.get("PPO_RLHF_REQUIRE_ALL"):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")

VECTOR = Box((3,), (-math.inf,) * 3, (math.inf,) * 3)
IMAGE = Box((40, 36, 3), (0.0,), (255.0,), image=True)
ARM = Box((2,), (-2.0, -1.0), (1.0, 3.0))
SCENE = Tuple((Dict({"x": VECTOR}), MultiBinary((2,)), Discrete(4, 1)))
CASES = {
    "a vector, choices that start at 2": (VECTOR, Discrete(3, 2), {}),
    "a vector, a squashed Gaussian": (VECTOR, ARM, {"gaussian": "squashed"}),
    "a vector, gSDE": (VECTOR, ARM, {"gaussian": "gsde", "activation": "relu"}),
    "a Dict, a clipped Gaussian": (Dict({"a": VECTOR, "b": MultiDiscrete((2, 3), (0, 0))}), ARM, {}),
    "a Dict in a Tuple, several choices": (SCENE, MultiDiscrete((2, 3), (0, 1)), {}),
    "an image, switches in an array": (IMAGE, MultiBinary((2, 2)), {}),
}
RECURRENT = {
    "lstm": (ARM, {"gaussian": "state_dependent"}),
    "gru": (Discrete(5), {}),
}


def policy_of(observation_space, action_space, **settings):
    """A policy whose actions depend on what it sees, with statistics that are not the initial ones."""
    torch.manual_seed(0)
    made = NetworkSettings(hidden_sizes=(16,), policy_head_gain=3.0, **settings)
    policy = Policy(observation_space, action_space, made, normalize_observations=observation_space is VECTOR)
    if policy.normalizer is not None:
        policy.observe({"observations": 3 + 2 * torch.randn(50, 1, 3)}, torch.ones(50, 1, dtype=torch.bool))
    return policy.eval()


def observations_of(space, rows):
    """Random observations as an environment would give them."""
    draw = np.random.default_rng(rows)
    match space:
        case Dict():
            return {name: observations_of(inner, rows) for name, inner in space.spaces.items()}
        case Tuple():
            return tuple(observations_of(inner, rows) for inner in space.spaces)
        case Discrete():
            return space.start + draw.integers(space.n, size=rows)
        case MultiDiscrete():
            return draw.integers(space.nvec, size=(rows, len(space.nvec)))
        case MultiBinary():
            return draw.integers(2, size=(rows, *space.shape)).astype(np.float32)
        case Box(image=True):
            return draw.integers(256, size=(rows, *space.shape), dtype=np.uint8)
    return (3 + 4 * draw.standard_normal((rows, *space.shape))).astype(np.float32)


def leaves_of(observations):
    if isinstance(observations, dict | tuple):
        inner = observations.values() if isinstance(observations, dict) else observations
        return [leaf for part in inner for leaf in leaves_of(part)]
    return [observations]


def session_of(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("observation_space", "action_space", "settings"), CASES.values(), ids=CASES)
def test_an_exported_policy_acts_as_the_policy_for_batches_of_any_size(observation_space, action_space, settings):
    policy = policy_of(observation_space, action_space, **settings)
    session = session_of(export(policy, "policy.onnx"))
    names = [given.name for given in session.get_inputs()]
    assert names == list(example_inputs(policy))
    for rows in (1, 5, 700):
        observations = observations_of(observation_space, rows)
        (actions,) = session.run(None, dict(zip(names, leaves_of(observations), strict=True)))
        expected = policy.act(observations)
        assert actions.shape == expected.shape
        assert actions.dtype == expected.dtype
        assert actions == pytest.approx(expected, abs=1e-5)
    assert len(np.unique(expected)) > 1


@pytest.mark.parametrize("kind", RECURRENT)
def test_an_exported_recurrent_policy_takes_and_gives_its_memory(kind):
    action_space, settings = RECURRENT[kind]
    policy = policy_of(VECTOR, action_space, recurrent=kind, recurrent_size=5, **settings)
    session = session_of(export(policy, "policy.onnx"))
    assert [given.name for given in session.get_inputs()] == ["observations", "state", "starts"]
    assert [made.name for made in session.get_outputs()] == ["actions", "next_state"]
    memory = policy.memory(3)
    state, starts = memory.state.numpy(), memory.starts.numpy()
    for step in range(5):
        if step == 3:  # an episode of the second environment ends
            memory.forget(torch.tensor([False, True, False]))
            starts = np.array([False, True, False])
        observations = observations_of(VECTOR, 3) + step
        actions, state = session.run(None, {"observations": observations, "state": state, "starts": starts})
        assert actions == pytest.approx(policy.act(observations, memory=memory), abs=1e-5)
        starts = np.zeros(3, dtype=bool)


def test_export_writes_one_file_into_the_run_s_folder(cartpole, capfd):
    before = {path.name for path in cartpole.iterdir()}
    assert answer(capfd, "export", cartpole) == {"onnx": str(cartpole / "policy.onnx")}
    assert {path.name for path in cartpole.iterdir()} - before == {"policy.onnx"}


def test_export_takes_the_best_policy_and_a_file_name(cartpole, monkeypatch, capfd):
    seen = []
    monkeypatch.setattr("classic.export.export", lambda policy, output: seen.append(policy) or output)
    load(cartpole / "policy").save(cartpole / "best")
    shutil.rmtree(cartpole / "policy")
    assert answer(capfd, "export", cartpole, "--best", "--output", "best.onnx") == {"onnx": "best.onnx"}
    assert len(seen) == 1


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(package, cartpole, monkeypatch, capfd):
    from importlib.util import find_spec

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find_spec(name))
    told = refused(capfd, "export", cartpole)
    assert package in told
    assert 'pip install "ppo-rlhf[onnx]"' in told
    assert not (cartpole / "policy.onnx").exists()
