"""`python -m classic train` and `evaluate`: what they start from, what they leave, what they print, how they go on."""

import json
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from command_cases import (
    TINY_WORDS,
    answer,
    cartpole,
    finished_runs,
    in_tmp_path,
    metrics_of,
    refused,
    same_policy,
    train,
    without_times,
)

from classic import cli, load, ppo
from classic.cli import main
from classic.config import TrainConfig
from classic.presets import PRESETS, preset_for

__all__ = ["cartpole", "finished_runs", "in_tmp_path"]

USER_ENVIRONMENT = """
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv

gymnasium.register("Mine-v0", entry_point=CartPoleEnv, max_episode_steps=20)
"""


def settings_of(folder):
    return yaml.safe_load((Path(folder) / "config.yaml").read_text())


@pytest.fixture
def asked(monkeypatch):
    """The configurations that `train` would have run."""
    seen = []

    def run(config):
        seen.append(config)
        return None, {"finished": config.output_dir}

    monkeypatch.setattr(ppo, "run", run)
    return seen


# ----------------------------------------------------------------------------------------- what a run starts from


def test_train_starts_from_the_environment_s_preset_and_every_field_can_be_overridden(asked):
    words = "train --gamma 0.5 Pendulum-v1 --ppo.num-epochs 3 --ppo.entropy_coef=0.1 --network.hidden-sizes [7,8]"
    assert main(words.split()) == 0
    expected = asdict(PRESETS["Pendulum-v1"])
    expected["gamma"] = 0.5
    expected["ppo"] |= {"num_epochs": 3, "entropy_coef": 0.1}
    expected["network"]["hidden_sizes"] = (7, 8)
    assert asdict(asked[0]) == expected


@pytest.mark.parametrize("words", ["Pendulum-v1 --algorithm trpo", "Pendulum-v1 --algorithm penalty", "Nothing-v0"])
def test_python_starts_from_what_the_command_starts_from(asked, monkeypatch, words):
    assert main(["train", *words.split()]) == 0
    env_id, *options = words.split()
    monkeypatch.setattr(ppo, "run", lambda config, **_: (asked.append(config), {}))
    ppo.train(env_id, algorithm=options[-1] if options else None, output_dir="out")
    assert asked[1] == replace(asked[0], output_dir="out")


def test_python_s_algorithm_takes_the_place_of_the_configuration_s(asked, monkeypatch):
    monkeypatch.setattr(ppo, "run", lambda config, **_: (asked.append(config), {}))
    ppo.train("CartPole-v1", algorithm="trpo", config=TrainConfig(gamma=0.5), output_dir="out")
    assert asked == [TrainConfig(gamma=0.5, algorithm="trpo", output_dir="out")]


def test_an_environment_without_a_preset_starts_from_the_defaults(asked):
    assert main(["train", "Nothing-v0"]) == 0
    assert asked == [TrainConfig(env_id="Nothing-v0")]


def test_a_preset_can_be_asked_for_by_name_for_another_environment(asked):
    assert main(["train", "Nothing-v0", "--preset", "CartPole-v1"]) == 0
    assert asdict(asked[0]) == asdict(PRESETS["CartPole-v1"]) | {"env_id": "Nothing-v0"}


def test_a_preset_names_its_own_environment(asked):
    assert main(["train", "--preset", "Pendulum-v1"]) == 0
    assert asked == [PRESETS["Pendulum-v1"]]


def test_a_config_file_stands_on_its_own_and_options_come_after_it(asked):
    Path("mine.yaml").write_text("env_id: CartPole-v1\ngamma: 0.5\nnum_envs: 2\nenvironment: {env_kwargs: {a: 1}}\n")
    assert main(["train", "--num-envs", "4", "--config", "mine.yaml"]) == 0
    assert (asked[0].env_id, asked[0].gamma, asked[0].num_envs) == ("CartPole-v1", 0.5, 4)
    assert asked[0].environment.env_kwargs == {"a": 1}
    assert asked[0].optimizer == TrainConfig().optimizer


def test_a_config_file_can_be_laid_over_a_preset(asked):
    Path("mine.yaml").write_text("gamma: 0.5\n")
    assert main(["train", "--preset", "CartPole-v1", "--config", "mine.yaml"]) == 0
    assert asdict(asked[0]) == asdict(PRESETS["CartPole-v1"]) | {"gamma": 0.5}


@pytest.mark.parametrize("words", ["--compile --seed 3", "--seed 3 --compile", "--seed 3 --compile true"])
def test_a_yes_or_no_setting_alone_means_yes(words, asked):
    assert main(["train", "CartPole-v1", *words.split(), "--network.orthogonal", "false"]) == 0
    assert asked[0].compile
    assert not asked[0].network.orthogonal


def test_the_time_limit_has_a_short_name(asked):
    assert main(["train", "CartPole-v1", "--max-episode-steps", "-1"]) == 0
    assert asked[0].environment.max_episode_steps == -1


def test_resume_alone_does_not_swallow_the_environment(asked):
    assert main(["train", "--resume", "CartPole-v1", "--output_dir", "out"]) == 0
    assert asked[0].resume
    assert asked[0].env_id == "CartPole-v1"


def test_the_run_s_own_configuration_is_accepted_back_by_config(cartpole, asked):
    assert main(["train", "--config", str(cartpole / "config.yaml")]) == 0
    (config,) = asked
    assert json.loads(json.dumps(asdict(config))) == settings_of(cartpole)


# ------------------------------------------------------------------------------------------------- what a run does


def test_train_leaves_a_run_folder_and_prints_its_summary_as_json(capfd):
    summary = answer(capfd, "train", "CartPole-v1", *TINY_WORDS, "--output-dir", "out")
    assert summary["env_id"] == "CartPole-v1"
    assert summary["steps"] == 128
    assert summary["output_dir"] == "out"
    assert json.loads(Path("out/summary.json").read_text())["return_after"] == summary["return_after"]
    assert {path.name for path in Path("out").iterdir()} == {
        *("config.yaml", "environment.json", "metrics.jsonl", "policy_pictures.jsonl", "summary.json"),
        *("checkpoints", "policy", "best"),
    }
    assert [row["steps"] for row in metrics_of("out")] == [64, 128]
    assert all(row["steps_per_second"] > 0 for row in metrics_of("out"))


def test_without_an_output_dir_fresh_numbered_folders_are_made(capfd):
    for number in (1, 2):
        summary = answer(capfd, "train", "CartPole-v1", *TINY_WORDS)
        assert summary["output_dir"] == f"runs/classic-000{number}"


def test_progress_elsewhere_than_on_a_terminal_is_plain_lines_with_return_and_speed(capfd):
    train("CartPole-v1", "out")
    lines = capfd.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/2", "2/2"]
    assert all("return" in line and "steps/s" in line for line in lines)


@pytest.mark.parametrize("algorithm", ["clip", "penalty", "trpo", "fixed", "none"])
def test_every_algorithm_can_be_asked_for(algorithm):
    train("CartPole-v1", "out", "--algorithm", algorithm)
    assert settings_of("out")["algorithm"] == algorithm


def test_an_environment_of_one_s_own_is_module_and_id(capfd):
    Path("mine.py").write_text(USER_ENVIRONMENT)
    train("mine:Mine-v0", "out")
    assert answer(capfd, "evaluate", "out", "--episodes", 3)["mean_length"] <= 20


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(monkeypatch, capfd):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(ppo, "run", interrupted)
    assert main(["train", "CartPole-v1"]) == 130
    folder, line = capfd.readouterr().err.splitlines()
    assert folder == "runs/classic-0001 holds no checkpoint yet."
    assert "--resume" in line


def test_a_job_in_the_background_hears_an_interrupt_before_its_run_begins(monkeypatch, capfd):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts it
    monkeypatch.setattr(ppo, "run", lambda config: signal.raise_signal(signal.SIGINT))
    try:
        assert main(["train", "CartPole-v1"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from_without_being_asked_for_one(monkeypatch, capfd):
    improve, words = ppo.improve, ["--horizon", "4096", "--num-steps", str(5 * 16384)]

    def interrupted(learner, state):
        if state.step == 4:
            raise KeyboardInterrupt
        return improve(learner, state)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "improve", interrupted)
        assert main(["train", "CartPole-v1", *TINY_WORDS, *words, "--output-dir", "out"]) == 130
    assert "out holds a checkpoint." in capfd.readouterr().err.splitlines()
    assert [row["step"] for row in metrics_of("out")] == [1, 2, 3, 4]
    monkeypatch.setattr(ppo, "improve", lambda learner, state: improve(learner, state) if state.step >= 4 else 1 / 0)
    assert answer(capfd, "train", "--resume", "--output-dir", "out")["steps"] == 5 * 16384


def test_a_trust_region_in_half_precision_is_refused(capfd):
    told = refused(capfd, "train", "CartPole-v1", "--algorithm", "trpo", "--precision", "fp16")
    assert all(name in told for name in ("algorithm=trpo", "precision=fp16", "bf16"))


def test_an_algorithm_starts_from_its_own_preset_where_it_has_one(asked):
    assert main(["train", "Pendulum-v1", "--algorithm", "trpo", "--gamma", "0.5"]) == 0
    own = asdict(preset_for("Pendulum-v1", "trpo"))
    assert own["horizon"] != PRESETS["Pendulum-v1"].horizon
    assert asdict(asked[0]) == own | {"gamma": 0.5}


def test_without_a_command_the_help_is_shown(capfd):
    assert main([]) == 0
    assert "evaluate" in capfd.readouterr().out


# ----------------------------------------------------------------------------------------------------- going on


def test_resuming_a_finished_run_says_so_and_changes_nothing(cartpole, capfd):
    before = {path: path.read_bytes() for path in cartpole.rglob("*") if path.is_file()}
    assert main(["train", "--resume", "--output-dir", str(cartpole)]) == 0
    assert "finished already" in capfd.readouterr().out
    assert answer(capfd, "train", "--resume", "--output-dir", cartpole) == {"finished": str(cartpole)}
    assert answer(capfd, "train", "--resume", "--output-dir", cartpole, "--num-steps", 100)
    assert before == {path: path.read_bytes() for path in cartpole.rglob("*") if path.is_file()}


def test_a_finished_run_that_is_given_more_steps_ends_where_one_of_that_length_ends(capfd):
    same_schedule = ("--optimizer.schedule", "constant", "--save-every", "64")
    train("CartPole-v1", "longer", *same_schedule)
    summary = answer(capfd, "train", "--resume", "--output-dir", "longer", "--num-steps", 256)
    whole = train("CartPole-v1", "whole", *same_schedule, "--num-steps", "256")
    assert summary["steps"] == 256
    assert settings_of("longer")["num_steps"] == 256
    assert same_policy("longer", "whole")
    assert [row["step"] for row in metrics_of("longer")] == [1, 2, 3, 4]
    last = [without_times(metrics_of(folder))[-1] for folder in ("longer", whole)]
    assert last[0] == last[1]


def test_a_run_that_was_interrupted_while_it_was_made_longer_goes_on(cartpole, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "improve", lambda learner, state: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(["train", "--resume", "--output-dir", str(cartpole), "--num-steps", "256"])
    assert not (cartpole / "summary.json").exists()
    assert answer(capfd, "train", "--resume", "--output-dir", cartpole)["steps"] == 256


def test_a_run_that_is_resumed_beyond_its_end_is_finished_where_it_stands(capfd):
    folder = train("CartPole-v1", "out", "--save-every", "64")
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step_000002")
    summary = answer(capfd, "train", "--resume", "--output-dir", folder, "--num-steps", 64)
    assert summary["steps"] == 64
    assert summary["return_after"] > 0


def test_the_checkpoint_before_a_damaged_one_is_used_and_this_is_said(capfd):
    whole = train("CartPole-v1", "whole", "--save-every", "64")
    folder = shutil.copytree(whole, "damaged")
    Path(folder, "summary.json").unlink()
    weights = Path(folder) / "checkpoints" / "step_000002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    capfd.readouterr()
    assert main(["train", "--resume", "--output-dir", "damaged", "--json"]) == 0
    captured = capfd.readouterr()
    assert "step_000002 is damaged; the one before it is used" in captured.err
    assert json.loads(captured.out)["steps"] == 128
    assert same_policy("damaged", "whole")


# ---------------------------------------------------------------------------------------------------- evaluate


def test_evaluate_prints_mean_standard_deviation_and_episodes_as_one_object(cartpole, capfd):
    result = answer(capfd, "evaluate", cartpole, "--episodes", 7)
    assert result["episodes"] == 7
    assert result["policy"] == "final"
    assert result["deterministic"] is True
    assert result["mean_return"] == result["mean_length"] > 0  # CartPole pays one a step
    assert result["std_return"] >= 0


def test_evaluate_plays_a_hundred_episodes_of_its_own_with_the_likeliest_actions(cartpole, capfd):
    from classic.evaluate import evaluate

    outcome = evaluate(load(cartpole), TrainConfig(), episodes=100, seed=0, deterministic=True)
    result = answer(capfd, "evaluate", cartpole)
    assert result["episodes"] == 100
    assert result["mean_return"] == outcome.returns.mean()
    assert result["std_return"] == outcome.returns.std(correction=0)


def test_evaluate_repeats_itself_and_follows_its_seed(cartpole, capfd):
    def result(*words):
        return answer(capfd, "evaluate", cartpole, "--episodes", 5, *words)

    assert result() == result()
    assert result("--stochastic") == result("--stochastic")
    assert result()["mean_return"] != result("--seed", 1)["mean_return"]
    assert result("--stochastic")["deterministic"] is False


def test_evaluate_tells_the_best_policy_from_the_final_one(cartpole, finished_runs, capfd):
    shutil.rmtree(cartpole / "policy")
    assert answer(capfd, "evaluate", cartpole, "--best", "--episodes", 2)["policy"] == "best"
    assert "no final policy" in refused(capfd, "evaluate", cartpole)


def test_evaluate_takes_the_environment_as_the_run_had_it_and_its_rewards_raw(capfd):
    limit = ("--environment.max_episode_steps", "5", "--reward-scale", "0.01", "--normalize-rewards")
    train("CartPole-v1", "out", *limit)
    assert answer(capfd, "evaluate", "out", "--episodes", 3)["mean_return"] == 5


def test_evaluate_for_the_eye_is_one_line(cartpole, capfd):
    assert main(["evaluate", str(cartpole), "--episodes", "2"]) == 0
    assert "over 2 episodes" in capfd.readouterr().out


def test_every_command_has_what_executes_it():
    assert set(cli.EXECUTE) == set(cli.COMMANDS)
