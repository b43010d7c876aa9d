"""`compare`: which runs it makes, what it repeats, and what it writes."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from command_cases import answer, in_tmp_path, refused
from grid_cases import started

from classic.cli import main
from classic.compare import Result, runs_of
from classic.config import CompareConfig
from classic.presets import OWN_PRESETS, PRESETS

__all__ = ["in_tmp_path", "started"]

LINE = "compare CartPole-v1 --algorithms clip trpo --seeds 0 1 --num-steps 128 --eval-episodes 2"
WORDS = LINE.split()


def test_runs_differ_in_environment_algorithm_and_seed_and_in_nothing_else():
    config = CompareConfig(env_ids=("CartPole-v1",), algorithms=("clip", "trpo"), seeds=(3, 5), num_steps=2048)
    runs = runs_of(config, Path("out")).values()
    assert [(run.algorithm, run.seed) for run in runs] == [("clip", 3), ("clip", 5), ("trpo", 3), ("trpo", 5)]
    assert all(run.ppo == PRESETS["CartPole-v1"].ppo and run.num_steps == 2048 for run in runs)
    assert all(run.eval_episodes == 100 for run in runs)


def test_an_algorithm_runs_with_its_own_preset_where_it_has_one():
    config = CompareConfig(env_ids=("Pendulum-v1", "Acrobot-v1"), algorithms=("clip", "trpo"), seeds=(7,))
    pendulum, own, acrobot, likewise = runs_of(config, Path("out")).values()
    assert (pendulum.num_envs, pendulum.horizon) == (32, 64)
    assert own == dataclasses.replace(OWN_PRESETS["Pendulum-v1", "trpo"], seed=7, eval_episodes=100)
    assert likewise == dataclasses.replace(acrobot, algorithm="trpo")


def test_a_result_is_summed_up_over_its_seeds():
    numbers = Result("Some-v0", "clip", (1.0, 2.0, 6.0)).numbers()
    half = 4.302653 * np.sqrt(7 / 3)
    assert numbers["mean"] == 3
    assert numbers["interval"] == pytest.approx([3 - half, 3 + half])
    assert (numbers["median"], numbers["min"], numbers["max"]) == (2, 1, 6)


def test_one_seed_alone_has_no_interval(started, capfd):
    summary = answer(capfd, *WORDS[:5], "--seeds", "4", "--output-dir", "out")
    assert [row["interval"] for row in summary["results"]] == [None, None]
    assert "| clip | 49,152 | 1 | 50.0 | – | 50.0 | 50.0 to 50.0 |" in Path("out/comparison.md").read_text()


def test_every_algorithm_runs_with_every_seed_and_the_table_and_the_curves_are_written(started, capfd):
    started.returns |= {"CartPole-v1/trpo/seed-0": 100.0, "CartPole-v1/trpo/seed-1": 200.0}
    summary = answer(capfd, *WORDS, "--output-dir", "out")
    assert started.names == [f"CartPole-v1/{name}/seed-{seed}" for name in ("clip", "trpo") for seed in (0, 1)]
    assert started.told == ["50.0", "50.0", "100.0", "200.0"]
    assert [(row["algorithm"], row["returns"]) for row in summary["results"]] == [
        ("clip", [50, 50]),
        ("trpo", [100, 200]),
    ]
    written = Path("out/comparison.md").read_text()
    assert "## CartPole-v1\n" in written
    assert "| trpo | 1,024 | 2 | 150.0 |" in written
    assert "--seeds 0 1 --num-steps 128" in written
    assert "torch 2.0.0, gymnasium 1.0.0, numpy 2.1.0\n" in written
    assert all(Path(f"out/comparison.{kind}").stat().st_size for kind in ("png", "svg", "csv"))


def test_the_runs_train_in_processes_of_their_own_and_each_outcome_is_told(capfd):
    summary = answer(capfd, *WORDS[:2], "--algorithms", "trpo", *WORDS[5:7], *WORDS[8:], "--output-dir", "out")
    run = Path("out/CartPole-v1/trpo/seed-0")
    final = json.loads((run / "summary.json").read_text())["return_after"]
    assert summary["results"][0]["returns"] == [final]
    assert yaml.safe_load((run / "config.yaml").read_text())["algorithm"] == "trpo"
    assert main([*WORDS[:2], "--resume", "--seeds", "0", "1", "--output-dir", "out"]) == 0
    final = json.loads((run.with_name("seed-1") / "summary.json").read_text())["return_after"]
    assert f"CartPole-v1/trpo/seed-1: {final:.1f}\n" in capfd.readouterr().err


def test_a_comparison_goes_on_by_its_folder_alone_and_repeats_no_finished_run(started, capfd):
    assert main([*WORDS, "--output-dir", "out"]) == 0
    before = Path("out/comparison.md").read_text()
    shutil.rmtree("out/CartPole-v1/clip/seed-1")
    started.names.clear()
    assert main(["compare", "--resume", "--output-dir", "out"]) == 0
    assert started.names == ["CartPole-v1/clip/seed-1"]
    assert Path("out/comparison.md").read_text() == before


def test_a_comparison_of_before_goes_on_without_settings_that_it_lacks(started, capfd):
    assert main([*WORDS, "--output-dir", "out"]) == 0
    saved = yaml.safe_load(Path("out/config.yaml").read_text())
    Path("out/config.yaml").write_text(yaml.safe_dump({name: saved[name] for name in saved if name != "workers"}))
    assert main(["compare", "--resume", "--output-dir", "out"]) == 0


def test_a_comparison_can_be_given_more_seeds(started, capfd):
    assert main([*WORDS, "--output-dir", "out"]) == 0
    started.names.clear()
    more = ["--algorithms", "clip", "--seeds", "0", "1", "2"]
    summary = answer(capfd, "compare", "--resume", "--output-dir", "out", *more)
    assert started.names == ["CartPole-v1/clip/seed-2"]
    assert len(summary["results"][0]["returns"]) == 3


@pytest.mark.parametrize("other", [["--num-steps", "64"], ["--num-steps", "256"], ["--eval-episodes", "3"]])
def test_runs_that_trained_or_were_judged_otherwise_are_not_mixed(started, other, capfd):
    assert main([*WORDS, "--output-dir", "out"]) == 0
    before = Path("out/config.yaml").read_text()
    assert other[1] in refused(capfd, "compare", "--resume", "--output-dir", "out", *other)
    assert Path("out/config.yaml").read_text() == before


def test_a_folder_that_holds_a_comparison_is_not_used_again(started, capfd):
    assert main([*WORDS, "--output-dir", "out"]) == 0
    assert "--resume" in refused(capfd, *WORDS, "--output-dir", "out")


def test_a_folder_that_cannot_be_made_is_named(capfd):
    assert "/proc/nope" in refused(capfd, *WORDS, "--output-dir", "/proc/nope")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("Cartpole-v1", ["Cartpole-v1", "Did you mean CartPole-v1?"]),
        ("CartPole-v1 --algorithms clip cilp", ["cilp", "Did you mean clip?"]),
        ("CartPole-v1 --algorithms clip clip", ["algorithms", "twice"]),
        ("CartPole-v1 --seeds 0 0", ["seeds", "twice"]),
        ("CartPole-v1 --seeds -1", ["seeds"]),
        ("CartPole-v1 --seeds one", ["seeds", "one"]),
        ("CartPole-v1 --num-steps 0", ["num_steps=0"]),
        ("CartPole-v1 --eval-episodes 0", ["eval_episodes=0"]),
        ("CartPole-v1 --num-step 9", ["num_step", "num_steps"]),
        ("CartPole-v1 --device tpu", ["device", "tpu"]),
        ("CartPole-v1 --workers 0", ["workers=0"]),
    ],
)
def test_a_mistake_is_named_in_one_line_and_leaves_nothing(words, named, capfd):
    told = refused(capfd, "compare", *words.split(), "--output-dir", "out")
    assert all(name in told for name in named), told
    assert not Path("out").exists()


def test_resume_of_a_folder_that_holds_something_else_is_refused(capfd):
    Path("out").mkdir()
    Path("out/config.yaml").write_text("env_id: CartPole-v1\n")
    assert "not of a comparison" in refused(capfd, "compare", "--resume", "--output-dir", "out")
