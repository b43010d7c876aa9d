"""Videos of a run's policy, and what is said where they cannot be made."""

import os
from pathlib import Path

import pytest
from command_cases import answer, cartpole, finished_runs, in_tmp_path, refused, train

__all__ = ["cartpole", "finished_runs", "in_tmp_path"]

if not os.environ.get("PPO_RLHF_REQUIRE_ALL"):
    pytest.importorskip("moviepy")
    pytest.importorskip("pygame")

BLIND = """
import gymnasium
import numpy as np

class Blind(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,))
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 1.0, False, False, {}

gymnasium.register("Blind-v0", entry_point=Blind, max_episode_steps=5)
"""


@pytest.fixture(autouse=True)
def no_window(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")


@pytest.fixture
def short(monkeypatch):
    """A run whose episodes end after four steps."""
    return train("CartPole-v1", "short", "--environment.max_episode_steps", "4")


def is_mp4(path):
    return Path(path).read_bytes()[4:8] == b"ftyp"


def test_each_episode_becomes_a_video(short, capfd):
    result = answer(capfd, "video", short, "--episodes", 2)
    assert result["videos"] == [f"short/videos/CartPole-v1-episode-{index}.mp4" for index in (0, 1)]
    assert all(map(is_mp4, result["videos"]))
    assert result["returns"] == [4, 4]


def test_videos_go_where_they_are_asked_for_and_take_the_place_of_earlier_ones(short, capfd):
    for _ in range(2):
        answer(capfd, "video", short, "--output-dir", "elsewhere")
        assert [path.name for path in Path("elsewhere").iterdir()] == ["CartPole-v1-episode-0.mp4"]


def test_evaluate_renders_videos_of_the_episodes_it_measures(short, capfd):
    assert answer(capfd, "evaluate", short, "--episodes", 1, "--render", "video")["mean_return"] == 4
    assert is_mp4("short/videos/CartPole-v1-episode-0.mp4")


def test_evaluate_renders_for_a_human(short, capfd):
    assert answer(capfd, "evaluate", short, "--episodes", 1, "--render", "human")["mean_return"] == 4


def test_a_missing_moviepy_is_named_with_the_command_that_installs_it(cartpole, monkeypatch, capfd):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "ppo-rlhf[video]"' in refused(capfd, "video", cartpole)
    assert not (cartpole / "videos").exists()


@pytest.mark.parametrize("words", [["video"], ["evaluate", "--render", "human"], ["evaluate", "--render", "video"]])
def test_a_missing_renderer_is_named_with_the_command_that_installs_it(words, cartpole, monkeypatch, capfd):
    monkeypatch.setitem(__import__("sys").modules, "pygame", None)
    command, *options = words
    assert 'pip install "ppo-rlhf[video]"' in refused(capfd, command, cartpole, *options)
    assert not (cartpole / "videos").exists()


def test_an_environment_that_shows_nothing_is_named(capfd):
    Path("blind.py").write_text(BLIND)
    folder = train("blind:Blind-v0", "out")
    assert "blind:Blind-v0" in refused(capfd, "video", folder)
    assert not (folder / "videos").exists()
