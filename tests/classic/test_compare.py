"""`compare`: which runs it makes, what it repeats, and what it writes."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from command_cases import answer, in_tmp_path, refused

from classic import compare as compare_module
from classic.cli import main
from classic.compare import Result, runs_of, table
from classic.config import CompareConfig, TrainConfig
from classic.presets import OWN_PRESETS, PRESETS
from classic.settings import NetworkSettings
from ppo_rlhf.settings import PPOSettings

__all__ = ["in_tmp_path"]

TINY = TrainConfig(
    num_envs=4,
    horizon=16,
    network=NetworkSettings(hidden_sizes=(8,)),
    ppo=PPOSettings(num_epochs=1, num_minibatches=1),
    log_with=(),
)
LINE = "compare CartPole-v1 --algorithms clip trpo --seeds 0 1 --num-steps 128 --eval-episodes 2"
WORDS = LINE.split()


@pytest.fixture
def tiny(monkeypatch):
    """Presets of a few dozen steps."""
    monkeypatch.setattr(compare_module, "preset_for", lambda env_id, algorithm: TINY)


@pytest.fixture
def started(monkeypatch):
    """The runs that train, in their order."""
    seen = []
    run = compare_module.run

    def noted(config, **arguments):
        if not Path(config.output_dir, "summary.json").exists():
            seen.append((config.algorithm, config.seed))
        return run(config, **arguments)

    monkeypatch.setattr(compare_module, "run", noted)
    return seen


def test_runs_differ_in_environment_algorithm_and_seed_and_in_nothing_else():
    config = CompareConfig(env_ids=("CartPole-v1",), algorithms=("clip", "trpo"), seeds=(3, 5), num_steps=2048)
    runs = runs_of(config)
    assert [(run.algorithm, run.seed) for run in runs] == [("clip", 3), ("clip", 5), ("trpo", 3), ("trpo", 5)]
    assert all(run.ppo == PRESETS["CartPole-v1"].ppo and run.num_steps == 2048 for run in runs)
    assert all(run.eval_episodes == 100 for run in runs)


def test_an_algorithm_runs_with_its_own_preset_where_it_has_one():
    config = CompareConfig(env_ids=("Pendulum-v1", "Acrobot-v1"), algorithms=("clip", "trpo"), seeds=(7,))
    pendulum, own, acrobot, likewise = runs_of(config)
    assert (pendulum.num_envs, pendulum.horizon) == (32, 64)
    assert own == dataclasses.replace(OWN_PRESETS["Pendulum-v1", "trpo"], seed=7, eval_episodes=100)
    assert likewise == dataclasses.replace(acrobot, algorithm="trpo")


def test_a_result_is_summed_up_over_its_seeds():
    numbers = Result("Some-v0", "clip", (1.0, 2.0, 6.0)).numbers()
    half = 4.302653 * np.sqrt(7 / 3)
    assert numbers["mean"] == 3
    assert numbers["interval"] == pytest.approx([3 - half, 3 + half])
    assert (numbers["median"], numbers["min"], numbers["max"]) == (2, 1, 6)


def test_one_seed_alone_has_no_interval():
    result = Result("CartPole-v1", "clip", (7.0,))
    assert result.numbers()["interval"] is None
    assert "| clip | 49,152 | 1 | 7.0 | – | 7.0 | 7.0 to 7.0 |" in table(CompareConfig(("CartPole-v1",)), [result])


def test_every_algorithm_runs_with_every_seed_and_the_table_and_the_curves_are_written(tiny, started, capfd):
    summary = answer(capfd, *WORDS, "--output-dir", "out")
    assert started == [("clip", 0), ("clip", 1), ("trpo", 0), ("trpo", 1)]
    assert [(row["algorithm"], len(row["returns"])) for row in summary["results"]] == [("clip", 2), ("trpo", 2)]
    final = json.loads(Path("out/CartPole-v1/trpo/seed-1/summary.json").read_text())["return_after"]
    assert summary["results"][1]["returns"][1] == final
    written = Path("out/comparison.md").read_text()
    assert "## CartPole-v1\n" in written
    assert "| trpo | 128 | 2 |" in written
    assert "--seeds 0 1 --num-steps 128" in written
    assert all(Path(f"out/comparison.{kind}").stat().st_size for kind in ("png", "svg", "csv"))


def test_each_run_is_told_when_it_begins_and_with_its_outcome_and_shows_no_progress(tiny, capfd):
    capfd.readouterr()
    assert main([*WORDS, "--output-dir", "out"]) == 0
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 * 4
    final = json.loads(Path("out/CartPole-v1/trpo/seed-0/summary.json").read_text())["return_after"]
    assert lines[4] == "CartPole-v1 trpo seed 0 (3 of 4)"
    assert re.fullmatch(rf"CartPole-v1 trpo seed 0: {final:.1f} in \d+\.\d s", lines[5])


def test_what_a_run_says_beside_its_progress_is_told(tiny, monkeypatch, capfd):
    run = compare_module.run

    def noisy(config, **arguments):
        print("something is odd", file=sys.stderr)
        return run(config, **arguments)

    monkeypatch.setattr(compare_module, "run", noisy)
    assert main([*WORDS, "--output-dir", "out"]) == 0
    assert capfd.readouterr().err.splitlines().count("something is odd") == 4


def test_a_comparison_goes_on_by_its_folder_alone_and_repeats_no_finished_run(tiny, started, capfd):
    assert main([*WORDS, "--output-dir", "out"]) == 0
    before = Path("out/comparison.md").read_text()
    shutil.rmtree("out/CartPole-v1/clip/seed-1")
    started.clear()
    assert main(["compare", "--resume", "--output-dir", "out"]) == 0
    assert started == [("clip", 1)]
    assert Path("out/comparison.md").read_text() == before


def test_a_comparison_can_be_given_more_seeds(tiny, started, capfd):
    assert main([*WORDS, "--output-dir", "out"]) == 0
    started.clear()
    more = ["--algorithms", "clip", "--seeds", "0", "1", "2"]
    summary = answer(capfd, "compare", "--resume", "--output-dir", "out", *more)
    assert started == [("clip", 2)]
    assert len(summary["results"][0]["returns"]) == 3


def test_a_folder_that_holds_a_comparison_is_not_used_again(tiny, capfd):
    assert main([*WORDS, "--output-dir", "out"]) == 0
    assert "--resume" in refused(capfd, *WORDS, "--output-dir", "out")


def test_a_comparison_is_interrupted_as_a_run_is(tiny, monkeypatch, capfd):
    def interrupted(config, **arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_module, "run", interrupted)
    assert main(WORDS) == 130
    assert "--resume" in capfd.readouterr().err.splitlines()[-1]


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
