"""Pictures of a policy: their numbers are the policy's own, and taking them changes nothing."""

import json
from dataclasses import replace

import control_cases as cases
import gymnasium
import numpy as np
import pytest
import torch
from command_cases import finished_runs, in_tmp_path, metrics_of, same_policy, train, without_times
from gymnasium import spaces

from classic import load
from classic.config import EnvironmentSettings
from classic.envs import make_environments, solved_at
from classic.envs.cartpole import CartPole
from classic.pictures import painter_of
from classic.ppo import new_policy, run
from classic.systems import SYSTEMS, system_of
from ppo_rlhf.settings import OptimizerSettings

__all__ = ["finished_runs", "in_tmp_path"]

CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def pictures_in(folder):
    return [json.loads(line) for line in (folder / "policy_pictures.jsonl").read_text().splitlines()]


def states_of(plane, variables, points):
    """The plane's grid of states, row by row from the bottom, as the file's own words describe it."""
    across, up = (variables[plane[side]] for side in ("across", "up"))
    states = np.zeros((points, points, len(variables)))
    states[..., plane["across"]] = np.linspace(across["low"], across["high"], points)[None, :]
    states[..., plane["up"]] = np.linspace(up["low"], up["high"], points)[:, None]
    return states.reshape(points**2, -1)


def numbers_of(plane, name):
    (found,) = [each["numbers"] for each in plane["quantities"] if each["name"] == name]
    return np.array(found).reshape(-1)


def pendulum_observations(states):
    angle, speed = states.T
    return np.stack([np.cos(angle), np.sin(angle), speed], axis=1).astype(np.float32)


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_cartpole_s_numbers_are_those_of_the_saved_policy(finished_runs):
    folder = finished_runs["CartPole-v1"]
    policy, picture = load(folder), pictures_in(folder)[-1]
    assert [(plane["across"], plane["up"]) for plane in picture["planes"]] == [(2, 3), (0, 1)]
    for plane in picture["planes"]:
        points = len(plane["quantities"][0]["numbers"])
        observations = torch.tensor(states_of(plane, picture["variables"], points), dtype=torch.float32)
        with torch.no_grad():
            right = policy(observations=observations[:, None], actions=torch.ones(len(observations), 1).long())
            values = policy.value(observations)
        np.testing.assert_allclose(numbers_of(plane, "probability of push right"), right.logprobs.exp()[:, 0], **CLOSE)
        np.testing.assert_allclose(numbers_of(plane, "value"), values, **CLOSE)


def test_pendulum_s_numbers_are_those_of_the_saved_policy(finished_runs):
    folder = finished_runs["Pendulum-v1"]
    policy, picture = load(folder), pictures_in(folder)[-1]
    (plane,) = picture["planes"]
    points = len(plane["quantities"][0]["numbers"])
    observations = pendulum_observations(states_of(plane, picture["variables"], points))
    np.testing.assert_allclose(numbers_of(plane, "torque"), policy.act(observations)[:, 0], **CLOSE)
    with torch.no_grad():
        values = policy.value(torch.tensor(observations))
    np.testing.assert_allclose(numbers_of(plane, "value"), values, **CLOSE)


def test_arrows_are_one_step_of_the_pendulum_under_the_policy_s_torque(finished_runs):
    folder = finished_runs["Pendulum-v1"]
    policy, picture = load(folder), pictures_in(folder)[-1]
    (plane,) = picture["planes"]
    arrows = np.array(plane["arrows"]).reshape(-1, 2)
    states = states_of(plane, picture["variables"], len(plane["arrows"]))
    torque = np.clip(policy.act(pendulum_observations(states))[:, 0], -2, 2)
    speed = np.clip(states[:, 1] + 0.05 * (15 * np.sin(states[:, 0]) + 3 * torque), -8, 8)
    np.testing.assert_allclose(arrows[:, 0], 0.05 * speed, atol=1e-5)  # also where the angle passes π
    np.testing.assert_allclose(arrows[:, 1], speed - states[:, 1], atol=1e-5)


def test_episodes_are_what_the_environment_does_with_the_policy_s_actions(finished_runs):
    folder = finished_runs["CartPole-v1"]
    policy = load(folder)
    for episode in pictures_in(folder)[-1]["episodes"]:
        states, actions = torch.tensor(episode["states"]), torch.tensor(episode["actions"])
        assert len(states) == len(actions) == episode["return"]  # each step pays 1
        assert states[0].abs().max() <= 0.05
        assert torch.equal(policy.act(states), actions)
        envs = CartPole(len(states))
        envs.set_state(states)
        step = envs.step(actions)
        assert torch.allclose(step.observations[:-1], states[1:], atol=1e-5)
        assert step.terminated[-1] or len(states) == 150


@pytest.mark.parametrize("env_id", ["MountainCar-v0", "MountainCarContinuous-v0", "Acrobot-v1"])
def test_gymnasium_s_systems_are_painted_without_arrows(env_id):
    config = cases.config_of(env_id=env_id, environment={"max_episode_steps": 5})
    policy = new_policy(config, make_environments(env_id))
    painter = painter_of(env_id, policy, config)
    picture = painter(policy)
    painter.close()
    assert all("arrows" not in plane for plane in picture["planes"])
    assert [len(episode["states"]) for episode in picture["episodes"]] == [5, 5, 5]
    probabilities = [each for each in picture["planes"][0]["quantities"] if each["name"].startswith("probability")]
    if env_id != "MountainCarContinuous-v0":
        np.testing.assert_allclose(sum(np.array(each["numbers"]) for each in probabilities), 1, atol=1e-6)


def own_observation(name, state):
    """What Gymnasium's environment shows of a state."""
    env = gymnasium.make(f"{name}-v1" if name in ("Pendulum", "Acrobot", "CartPole") else f"{name}-v0").unwrapped
    env.reset(seed=0)
    env.state = state
    return {"Pendulum": lambda: env._get_obs(), "Acrobot": lambda: env._get_ob()}.get(name, lambda: state)()


@pytest.mark.parametrize("name", SYSTEMS)
def test_states_and_observations_of_a_system_are_gymnasium_s(name):
    system = SYSTEMS[name]
    share = np.linspace(0.3, 0.8, len(system.variables))
    state = np.array([each.low + s * (each.high - each.low) for each, s in zip(system.variables, share, strict=True)])
    observations = system.observe(torch.tensor(state))
    np.testing.assert_allclose(observations, own_observation(name, state), atol=1e-6)
    np.testing.assert_allclose(system.state_of(observations), state, atol=1e-6)


# --- when, and at what price ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pictures", "steps"), [(6, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (1, [0, 4])])
def test_pictures_are_spread_evenly_and_the_last_is_of_the_final_policy(pictures, steps):
    folder = train("CartPole-v1", "run", "--num-steps", 4 * 64, "--pictures", pictures)
    assert [picture["step"] for picture in pictures_in(folder)] == steps
    assert [picture["steps"] for picture in pictures_in(folder)] == [64 * step for step in steps]


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_a_run_without_pictures_learns_the_same_to_the_last_bit(env_id, finished_runs):
    plain = train(env_id, "plain", "--pictures", 0)
    assert not (plain / "policy_pictures.jsonl").exists()
    assert without_times(metrics_of(plain)) == without_times(metrics_of(finished_runs[env_id]))
    assert same_policy(plain, finished_runs[env_id])


def test_a_resumed_run_has_the_pictures_of_one_that_was_not_interrupted(tmp_path):
    config = cases.config_of(save_every=128, network={"hidden_sizes": (8,)})
    run(replace(config, output_dir="whole"))

    def stop(step, metrics):
        if step == 5:
            raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        run(replace(config, output_dir="parts"), callbacks=[stop])
    assert [picture["step"] for picture in pictures_in(tmp_path / "parts")] == [0, 1, 2, 3, 4, 5]
    with (tmp_path / "parts" / "policy_pictures.jsonl").open("a") as file:
        file.write('{"step": 6, "pla')  # as a crash leaves it
    run(replace(config, output_dir="parts", resume=True))
    assert pictures_in(tmp_path / "parts") == pictures_in(tmp_path / "whole")


# --- what cannot be drawn ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "changes"),
    [
        ("CartPole-v1", {"network": {"recurrent": "gru"}}),
        ("CartPole-v1", {"environment": {"frame_stack": 2}}),
        ("CartPole-v1", {"environment": {"wrappers": ("control_cases:far_and_dear",)}}),
        (lambda: cases.Guess(shown="image"), {}),
        (lambda: cases.Guess(shown="dict"), {}),
        (cases.Remember, {}),
    ],
    ids=["recurrent", "stacked", "wrapped", "image", "dict", "three numbers"],
)
def test_a_state_that_cannot_be_drawn_leaves_the_run_without_pictures(env, changes, tmp_path):
    config = cases.config_of(num_steps=64, output_dir="run", **changes)
    run(replace(config, env_id=env if isinstance(env, str) else "mine"), env=env)
    assert (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "policy_pictures.jsonl").exists()


class TwoNumbers(gymnasium.Env):
    """One's own, whose whole state is two bounded numbers."""

    observation_space = spaces.Box(np.array([-1, 0], np.float32), np.array([1, 2], np.float32))
    action_space = spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 1.0, False, False, {}


def test_two_bounded_numbers_are_a_plane_whatever_they_are(tmp_path):
    run(cases.config_of(num_steps=64, output_dir="run", env_id="mine"), env=TwoNumbers)
    picture = pictures_in(tmp_path / "run")[-1]
    assert [(each["low"], each["high"]) for each in picture["variables"]] == [(-1, 1), (0, 2)]
    assert [each["name"] for each in picture["planes"][0]["quantities"]] == [
        *(f"probability of action {i}" for i in range(3)),
        "value",
    ]


def test_another_action_space_than_the_system_s_is_not_drawn():
    envs = make_environments("CartPole-v1")
    settings = EnvironmentSettings()
    assert system_of("CartPole-v1", envs.observation_space, envs.action_space, settings) is SYSTEMS["CartPole"]
    assert system_of("CartPole-v1", envs.observation_space, cases.Discrete(3), settings) is None


def test_numbers_that_are_not_finite_are_null(tmp_path):
    config = cases.config_of(num_steps=64, output_dir="run", max_skips=9, optimizer={"lr": 1e38})
    assert config.optimizer == OptimizerSettings(lr=1e38, schedule="constant")
    run(config)
    first, last = pictures_in(tmp_path / "run")
    assert first["planes"][0]["quantities"][1]["numbers"][0][0] is not None
    assert last["planes"][0]["quantities"][1]["numbers"][0][0] is None


# --- what counts as solved --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env_id", "level"), [("CartPole-v1", 475), ("MountainCar-v0", -110), ("Pendulum-v1", None), ("Nothing-v0", None)]
)
def test_what_counts_as_solved_is_gymnasium_s_word(env_id, level):
    assert solved_at(env_id) == level


def test_nothing_counts_as_solved_where_the_environment_is_made_otherwise(finished_runs, tmp_path):
    assert json.loads((finished_runs["CartPole-v1"] / "summary.json").read_text())["return_solved"] == 475
    shorter = train("CartPole-v1", "shorter", "--max-episode-steps", 200)
    assert json.loads((shorter / "summary.json").read_text())["return_solved"] is None
