"""An exported policy acts as the policy does, from the environment's own observations to its own actions."""

import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_cases import answer, cartpole, finished_runs, in_tmp_path, refused, train

from classic import load
from classic.cli import main
from classic.export import example_inputs, export
from classic.policy import Policy
from classic.settings import NetworkSettings
from classic.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from ppo_rlhf.errors import UserError

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

USER_ENVIRONMENTS = """
import gymnasium
import numpy as np
from gymnasium.envs.classic_control import CartPoleEnv


class Masked(CartPoleEnv):
    def reset(self, **arguments):
        return super().reset(**arguments)[0], {"action_mask": np.ones(2, np.int8)}

    def step(self, action):
        return *super().step(action)[:-1], {"action_mask": np.ones(2, np.int8)}


gymnasium.register("Masked-v0", entry_point=Masked, max_episode_steps=20)
gymnasium.register("Free-v0", entry_point=CartPoleEnv, max_episode_steps=20)
"""


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


@pytest.mark.parametrize("action_space", [Discrete(5, 2), MultiDiscrete((2, 3), (0, 1)), MultiBinary((3,))], ids=str)
@pytest.mark.parametrize("settings", [{}, {"recurrent": "gru", "recurrent_size": 5}], ids=["plain", "recurrent"])
def test_an_exported_policy_keeps_to_the_choices_that_are_allowed(action_space, settings):
    policy = policy_of(VECTOR, action_space, **settings)
    session = session_of(export(policy, "policy.onnx", action_mask=True))
    names = [given.name for given in session.get_inputs()]
    assert names == list(example_inputs(policy, action_mask=True))
    assert names[-1] == "action_mask"
    for rows in (1, 6, 600):
        given = {name: x.numpy() for name, x in example_inputs(policy, rows, action_mask=True).items()}
        given["observations"] = observations_of(VECTOR, rows)
        free = policy.act(given["observations"])
        given["action_mask"] = np.random.default_rng(rows).random(given["action_mask"].shape) < 0.6
        given["action_mask"][:, [0, -1]] = True  # one choice at least in each part of an action
        actions, *_ = session.run(None, given)
        expected = policy.act(given["observations"], action_mask=given["action_mask"])
        assert actions.dtype == expected.dtype
        assert np.array_equal(actions, expected)
    assert not np.array_equal(expected, free)


def test_a_mask_of_actions_that_are_no_choices_is_refused():
    with pytest.raises(UserError, match="action_mask"):
        export(policy_of(VECTOR, ARM), "policy.onnx", action_mask=True)
    assert not os.listdir()


def test_export_asks_for_a_mask_where_the_environment_tells_one(monkeypatch, capfd):
    asked = []
    monkeypatch.setattr("classic.export.export", lambda policy, output, *, action_mask: asked.append(action_mask))
    Path("masked_or_not.py").write_text(USER_ENVIRONMENTS)
    for name in ("Masked", "Free"):
        train(f"masked_or_not:{name}-v0", name)
        answer(capfd, "export", name)
    assert asked == [True, False]
    shutil.copytree("Masked", "elsewhere")
    config = Path("elsewhere/config.yaml")
    config.write_text(config.read_text().replace("masked_or_not:", "nowhere:"))
    capfd.readouterr()
    assert main(["export", "elsewhere"]) == 0
    assert "no action_mask is asked for: " in capfd.readouterr().err
    assert asked == [True, False, False]


def test_export_writes_one_file_into_the_run_s_folder(cartpole, capfd):
    before = {path.name for path in cartpole.iterdir()}
    assert answer(capfd, "export", cartpole) == {"onnx": str(cartpole / "policy.onnx")}
    assert {path.name for path in cartpole.iterdir()} - before == {"policy.onnx"}


def test_export_takes_the_best_policy_and_a_file_name(cartpole, monkeypatch, capfd):
    seen = []
    monkeypatch.setattr("classic.export.export", lambda policy, output, **_: seen.append(policy) or output)
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
