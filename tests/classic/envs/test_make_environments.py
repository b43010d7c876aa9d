"""Which environments a setting gives, and what each mistake is told."""

from __future__ import annotations

from importlib.util import find_spec

import environment_cases as cases
import pytest
import torch

from classic.envs import CartPole, Pendulum, make_environments
from classic.envs.gymnasium import GymnasiumEnvironments
from ppo_rlhf.errors import UserError


@pytest.mark.parametrize(("env", "kind"), [("CartPole-v1", CartPole), ("Pendulum-v1", Pendulum)])
def test_our_own_environments_stand_in_where_they_are_the_same(env, kind):
    assert isinstance(make_environments(env), kind)
    assert isinstance(make_environments(env, vectorization="torch", autoreset="next_step"), kind)


@pytest.mark.parametrize(
    "settings",
    [
        {"env_kwargs": {"render_mode": "rgb_array"}},
        {"wrappers": [cases.Halved]},
        {"frame_stack": 2},
        {"autoreset": "same_step"},
        {"vectorization": "sync"},
    ],
    ids=str,
)
def test_what_they_cannot_do_is_gymnasiums(settings):
    envs = make_environments("CartPole-v1", **settings)
    assert isinstance(envs, GymnasiumEnvironments)
    envs.close()


def test_other_environments_and_callables_are_gymnasiums():
    for env in ("Acrobot-v1", cases.Counting):
        assert isinstance(make_environments(env), GymnasiumEnvironments)


def test_settings_reach_our_own_environments():
    envs = make_environments("Pendulum-v1", num_envs=3, seed=7, env_kwargs={"g": 0.0}, max_episode_steps=2)
    assert torch.equal(envs.reset(), Pendulum(3, seed=7).reset())
    envs.set_state(torch.tensor([[1.0, 0.0]] * 3))
    steps = [envs.step(torch.zeros(3, 1)) for _ in range(2)]
    assert envs.state[:, 1].tolist() == [0, 0, 0]
    assert steps[1].truncated.all()


def test_minus_one_takes_the_time_limit_away():
    envs = make_environments("Pendulum-v1", max_episode_steps=-1)
    assert not any(envs.step(torch.zeros(1, 1)).truncated for _ in range(205))


def not_an_environment():
    return 3


MISTAKES = [
    ({"env": "CartPol-v1"}, r"unknown environment CartPol-v1. Did you mean CartPole-v1\?"),
    ({"env": "Nothing/Alike-v0"}, "unknown environment Nothing/Alike-v0. One of your own is module:EnvId"),
    ({"env": "no_such_module:Env-v0"}, "no_such_module"),
    ({"env": "json:Env-v0"}, "unknown environment json:Env-v0"),
    ({"env": not_an_environment}, r"not_an_environment returned int, not an environment \(gymnasium.Env\)"),
    ({"env": "Acrobot-v1", "env_kwargs": {"depth": 3}}, r"Acrobot-v1 refuses env_kwargs=\{'depth': 3\}: .*depth"),
    ({"env": cases.Counting, "env_kwargs": {"depth": 3}}, r"Counting refuses env_kwargs=\{'depth': 3\}"),
    (
        {"env": "Acrobot-v1", "vectorization": "torch"},
        "vectorization=torch: Acrobot-v1 is not one of CartPole-v1, Pend",
    ),
    (
        {"env": cases.Counting, "vectorization": "torch"},
        "is not one of CartPole-v1, Pendulum-v1; use vectorization=auto",
    ),
    ({"vectorization": "torch", "env_kwargs": {"depth": 3}}, "CartPole-v1 in torch has no argument depth"),
    ({"vectorization": "torch", "wrappers": [cases.Halved]}, "CartPole-v1 in torch takes no wrappers"),
    ({"vectorization": "torch", "autoreset": "disabled"}, "CartPole-v1 in torch has no autoreset=disabled"),
    ({"vectorization": "asynch"}, r"unknown vectorization=asynch; .* Did you mean async\?"),
    ({"autoreset": "nextstep"}, r"unknown autoreset=nextstep; .* Did you mean next_step\?"),
    ({"wrappers": ["no_such_module:Wrapper"]}, "no_such_module:Wrapper: importing no_such_module raised"),
    ({"wrappers": ["environment_cases:Halve"]}, r"environment_cases has no Halve. Did you mean Halved\?"),
    ({"env": "Acrobot-v1", "vectorization": "vector_entry_point"}, "Acrobot-v1 has no vectorization of its own"),
    ({"env": cases.Counting, "vectorization": "vector_entry_point"}, "needs an environment id, not Counting"),
    ({"frame_stack": 2, "vectorization": "vector_entry_point"}, "vector_entry_point takes no wrappers"),
    (
        {"autoreset": "same_step", "vectorization": "vector_entry_point"},
        "CartPole-v1 resets in next_step mode, not autoreset=same_step",
    ),
    ({"env": "Silent-v0", "vectorization": "vector_entry_point"}, "does not say how it resets"),
    ({"num_envs": 0}, "num_envs=0: use 1 or more"),
    ({"frame_stack": 0}, "frame_stack=0: use 1 or more"),
    ({"max_episode_steps": 0}, "max_episode_steps=0: use 1 or more, or -1 for no limit"),
]


@pytest.mark.filterwarnings("ignore:.*missing AutoresetMode metadata")
@pytest.mark.parametrize(("settings", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_told_in_one_line(settings, message):
    with pytest.raises(UserError, match=message) as raised:
        make_environments(**{"env": "CartPole-v1", **settings})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("module", "env", "extra"),
    [("Box2D", "LunarLander-v3", "box2d"), ("mujoco", "Ant-v5", "mujoco"), ("ale_py", "ALE/Pong-v5", "atari")],
)
def test_a_missing_package_is_told_with_the_command_that_installs_it(module, env, extra):
    if find_spec(module) is not None:
        pytest.skip(f"{module} is installed")
    with pytest.raises(
        UserError, match=rf"{env} needs .* No module named '{module}'; pip install \"ppo-rlhf\[{extra}\]\""
    ):
        make_environments(env)


def test_an_error_of_the_environment_itself_travels():
    def broken():
        raise TypeError("of its own")

    with pytest.raises(TypeError, match="of its own"):
        make_environments(broken)


def test_a_module_that_lacks_another_says_which():
    def unfinished():
        import no_such_module  # noqa: F401

    with pytest.raises(UserError, match="unfinished needs a package that is not there: No module named 'no_such_mod"):
        make_environments(unfinished)
