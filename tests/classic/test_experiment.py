"""`table1` and `ablations`: which runs they make, how these are scored, and what is written."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from command_cases import answer, in_tmp_path, refused
from grid_cases import started

from classic.ablations import ABLATIONS, mean_evaluation
from classic.cli import main
from classic.config import ExperimentConfig, TrainConfig
from classic.experiment import Results, random_return, runs_of
from classic.presets import MUJOCO, PRESETS
from classic.table1 import TABLE1, last_episodes, protocol
from classic.variants import DETAILS, SURROGATES, changed
from ppo_rlhf.errors import UserError
from ppo_rlhf.run import read_config

__all__ = ["in_tmp_path", "started"]

# Schulman et al. (2017), table 1.
PAPER = {
    "none": (None, -0.39),
    "clip-0.1": (0.1, 0.76),
    "clip-0.2": (0.2, 0.82),
    "clip-0.3": (0.3, 0.70),
    "adaptive-0.003": (0.003, 0.68),
    "adaptive-0.01": (0.01, 0.74),
    "adaptive-0.03": (0.03, 0.71),
    "fixed-0.3": (0.3, 0.62),
    "fixed-1": (1, 0.71),
    "fixed-3": (3, 0.72),
    "fixed-10": (10, 0.69),
}
SETTING = {
    "clip": lambda run: run.ppo.clip_range,
    "penalty": lambda run: run.penalty.kl_target,
    "fixed": lambda run: run.penalty.kl_coef,
    "none": lambda run: None,
}


def write_metrics(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("env_id: Some-v0\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def out():
    """A folder that knows already what the untrained policy comes to."""
    Path("out").mkdir()
    Path("out/random.json").write_text(json.dumps({"CartPole-v1": 20.0, "Pendulum-v1": -1200.0}))
    return "out"


# ------------------------------------------------------------------------------------------------------ which runs


def test_a_variant_changes_what_it_names_and_nothing_else():
    config = TrainConfig()
    other = changed(config, {"algorithm": "penalty", "ppo.clip_range": 0.1, "ppo.num_epochs": 3, "gae_lambda": 0.5})
    assert (other.algorithm, other.ppo.clip_range, other.ppo.num_epochs, other.gae_lambda) == ("penalty", 0.1, 3, 0.5)
    ppo = replace(other.ppo, clip_range=0.2, num_epochs=10)
    assert replace(other, algorithm="clip", ppo=ppo, gae_lambda=0.95) == config


@pytest.mark.parametrize("name", PAPER)
def test_the_rows_are_the_paper_s(name):
    variant, (value, score) = SURROGATES[name], PAPER[name]
    run = changed(TrainConfig(), variant.changes)
    assert SETTING[run.algorithm](run) == value
    assert run.penalty.kl_coef == (value if run.algorithm == "fixed" else 1)  # β's start
    assert variant.paper == score


def test_trpo_is_the_one_row_beside():
    assert set(SURROGATES) - set(PAPER) == {"trpo"}
    assert changed(TrainConfig(), SURROGATES["trpo"].changes) == TrainConfig(algorithm="trpo")


def test_the_protocol_is_that_of_table_3():
    run = protocol("Hopper-v5", None)
    assert (run.num_envs, run.horizon, run.num_steps) == (1, 2048, 1_000_000)
    assert run.horizon / run.ppo.num_minibatches == 64
    assert (run.ppo.num_epochs, run.optimizer.lr, run.gamma, run.gae_lambda) == (10, 3e-4, 0.99, 0.95)
    assert (run.network.hidden_sizes, run.network.activation) == ((64, 64), "tanh")
    assert (run.ppo.entropy_coef, run.ppo.value_clip_range) == (0, None)
    assert (run.normalize_observations, run.normalize_rewards) == (True, False)
    assert run.optimizer.schedule == "linear"
    value_steps = run.trust_region.value_epochs * run.trust_region.value_minibatches
    assert value_steps == run.ppo.num_epochs * run.ppo.num_minibatches


def test_every_variant_runs_with_every_seed_on_every_environment():
    config = ExperimentConfig(env_ids=("Hopper-v5",), seeds=(3, 5), variants=("clip-0.1", "trpo"), num_steps=4096)
    runs = runs_of(TABLE1, config, Path("out"))
    assert [str(path) for path in runs] == [
        f"out/Hopper-v5/{variant}/seed-{seed}" for seed in (3, 5) for variant in ("clip-0.1", "trpo")
    ]
    assert [(run.algorithm, run.ppo.clip_range, run.seed) for run in runs.values()] == [
        ("clip", 0.1, 3),
        ("trpo", 0.2, 3),
        ("clip", 0.1, 5),
        ("trpo", 0.2, 5),
    ]
    assert {run.num_steps for run in runs.values()} == {4096}


@pytest.mark.parametrize(
    ("made_of", "env_ids", "variants"),
    [(TABLE1, MUJOCO, SURROGATES), (ABLATIONS, ("CartPole-v1", "Pendulum-v1"), DETAILS)],
)
def test_the_settings_of_all_variants_go_together(made_of, env_ids, variants):
    config = ExperimentConfig(env_ids=env_ids, seeds=(0,), variants=tuple(variants))
    assert len(runs_of(made_of, config, Path("out"))) == len(env_ids) * len(variants)


def test_a_detail_differs_from_the_environment_s_preset_in_itself_alone():
    config = ExperimentConfig(env_ids=("Pendulum-v1",), seeds=(0,), variants=("preset", "adam-epsilon"))
    preset, other = runs_of(ABLATIONS, config, Path("out")).values()
    assert (preset.ppo, preset.optimizer) == (PRESETS["Pendulum-v1"].ppo, PRESETS["Pendulum-v1"].optimizer)
    assert preset.num_steps == 10 * preset.eval_every == 150_000
    assert replace(other, optimizer=replace(other.optimizer, epsilon=1e-5)) == preset
    assert other.optimizer.epsilon == 1e-8


# ------------------------------------------------------------------------------------------------------ the scores


def test_a_run_s_return_is_that_of_its_last_hundred_episodes(tmp_path):
    rows = [
        {"episodes": 50.0, "episode/return": 0.0},
        {"episodes": 0.0},
        {"episodes": 40.0, "episode/return": 10.0},
        {"episodes": 80.0, "episode/return": 20.0},
    ]
    assert last_episodes(write_metrics(tmp_path / "run", rows)) == (80 * 20 + 20 * 10) / 100
    assert last_episodes(write_metrics(tmp_path / "run", rows[:3])) == pytest.approx((40 * 10 + 50 * 0) / 90)


def test_a_detail_s_return_is_the_mean_of_the_run_s_evaluations(tmp_path):
    rows = [{"steps": 1, "eval/return": 1.0}, {"steps": 2}, {"steps": 3, "eval/return": 5.0}]
    assert mean_evaluation(write_metrics(tmp_path / "run", rows)) == 3


def test_the_untrained_policy_is_0_and_the_best_run_of_all_is_1():
    results = Results(
        {"a": {"One-v0": [20.0, 70.0], "Two-v0": [-3.0, -1.0]}, "b": {"One-v0": [120.0, 0.0], "Two-v0": [-2.0, -4.0]}},
        {"One-v0": 20.0, "Two-v0": -5.0},
    )
    assert results.best == {"One-v0": 120, "Two-v0": -1}
    assert np.allclose(results.scores("a"), [[0, 0.5], [0.5, 1]])
    assert np.allclose(results.scores("b"), [[1, -0.2], [0.75, 0.25]])


def test_where_nothing_was_learnt_there_is_no_scale():
    told = "no run on One-v0 did better than the untrained policy: no scale. Leave it out, by --resume"
    with pytest.raises(UserError, match=told):
        Results({"a": {"One-v0": [20.0, 19.0]}}, {"One-v0": 20.0}).scores("a")


def test_the_untrained_policy_pushes_the_cart_at_random(tmp_path):
    # Uniform actions keep the pole up for 22.3 steps in the mean, with a deviation of 11.8 (Gymnasium's, 20,000
    # episodes); 4 is more than three deviations of a hundred episodes' mean.
    config = PRESETS["CartPole-v1"]
    assert random_return(tmp_path, config) == pytest.approx(22.3, abs=4)
    assert json.loads((tmp_path / "random.json").read_text()).keys() == {"CartPole-v1"}


# --------------------------------------------------------------------------------------------------- what is written

LINE = "table1 --envs CartPole-v1 --variants none clip-0.2 trpo --seeds 0 1 --num-steps 4096"
WORDS = LINE.split()


def test_table1_tells_scores_intervals_and_the_paper_s(started, out, capfd):
    started.returns |= {
        "CartPole-v1/none/seed-0": 0.0,
        "CartPole-v1/none/seed-1": 10.0,
        "CartPole-v1/clip-0.2/seed-0": 120.0,
        "CartPole-v1/clip-0.2/seed-1": 100.0,
    }
    summary = answer(capfd, *WORDS, "--output-dir", out)
    none, clip, trpo = summary["rows"]
    # Scores −0.2 and −0.1; 1 and 0.8; 0.3 twice. Of two runs the interval reaches from one to the other.
    assert (none["variant"], none["paper"], clip["paper"], trpo["paper"]) == ("none", -0.39, 0.82, None)
    assert [none["value"], none["low"], none["high"]] == pytest.approx([-0.15, -0.2, -0.1])
    assert [clip["value"], clip["low"], clip["high"]] == pytest.approx([0.9, 0.8, 1.0])
    assert [trpo["value"], trpo["low"], trpo["high"]] == pytest.approx([0.3, 0.3, 0.3])
    assert summary["returns"]["clip-0.2"] == {"CartPole-v1": [120, 100]}
    written = Path(out, "table1.md").read_text()
    assert "| clipping, ε = 0.2 | 0.90 | 0.80 to 1.00 | 0.82 |" in written
    assert "| TRPO, δ = 0.01 | 0.30 | 0.30 to 0.30 | – |" in written
    assert "| clipping, ε = 0.2 | 110.0 |" in written
    assert "| the untrained policy (score 0) | 20.0 |" in written
    assert f"    python -m classic {LINE}\n" in written
    assert "torch 2.0.0, gymnasium 1.0.0, numpy 2.1.0\n" in written
    assert json.loads(Path(out, "table1.json").read_text()) == summary
    assert "clipping, ε = 0.2" in Path(out, "table1.svg").read_text()
    assert all(Path(out, f"learning_curves.{kind}").stat().st_size for kind in ("png", "svg", "csv"))


def test_one_seed_alone_has_a_score_and_no_interval(started, out, capfd):
    assert main([*WORDS[:-4], "0", *WORDS[-2:], "--output-dir", out]) == 0
    assert "| TRPO, δ = 0.01 | 1.00 | – | – |" in capfd.readouterr().out


def test_ablations_tell_what_the_preset_has_over_each_change(started, out, capfd):
    words = "ablations --variants preset adam-epsilon one-epoch --seeds 0 1"
    started.returns |= {
        f"{env_id}/{variant}/seed-{seed}": found
        for env_id, low, high in (("CartPole-v1", 20.0, 120.0), ("Pendulum-v1", -1200.0, -200.0))
        for variant, scores in (("preset", (1.0, 0.9)), ("adam-epsilon", (1.0, 0.9)), ("one-epoch", (0.4, 0.5)))
        for seed, score in enumerate(scores)
        for found in [low + score * (high - low)]
    }
    preset, same, worse = answer(capfd, *words.split(), "--output-dir", out)["rows"]
    assert [preset["value"], preset["worth"]] == [pytest.approx(0.95), None]  # the middle two of 1, 1, 0.9, 0.9
    assert same["worth"]["value"] == pytest.approx(0)
    assert same["worth"]["low"] == pytest.approx(-same["worth"]["high"], abs=1e-9) == pytest.approx(-0.1)
    assert worse["changes"] == {"ppo.num_epochs": 1}
    assert [worse["value"], worse["worth"]["value"]] == pytest.approx([0.45, 0.5])
    assert 0.4 - 1e-9 <= worse["worth"]["low"] < worse["worth"]["high"] <= 0.6 + 1e-9
    written = Path(out, "ablations.md").read_text()
    assert "| the preset | 0.95 | 0.90 to 1.00 | – | – |" in written
    assert "| 1 epoch | 0.45 | 0.40 to 0.50 | +0.50 | 0.40 to 0.60 |" in written
    assert Path(out, "ablations.png").read_bytes().startswith(b"\x89PNG")


def test_a_change_that_a_preset_has_already_is_refused(capfd):
    words = ["ablations", "--envs", "CartPole-v1", "Hopper-v5", "--variants", "preset", "one-epoch", "raw-rewards"]
    assert main([*words, "--output-dir", "out"]) == 2
    told = "on Hopper-v5 raw-rewards is the same as preset: leave one of them out by --variants."
    assert told in capfd.readouterr().err
    assert not Path("out").exists()


def test_without_the_preset_nothing_tells_what_a_detail_is_worth(started, out, capfd):
    words = ["ablations", "--envs", "CartPole-v1", "--variants", "one-epoch", "--seeds", "0"]
    (row,) = answer(capfd, *words, "--output-dir", out)["rows"]
    assert row["worth"] is None


def test_a_table_goes_on_by_its_folder_alone_and_repeats_no_finished_run(started, out, capfd):
    assert main([*WORDS, "--output-dir", out]) == 0
    before = Path(out, "table1.md").read_text()
    shutil.rmtree(Path(out, "CartPole-v1/trpo/seed-1"))
    started.names.clear()
    assert main(["table1", "--resume", "--output-dir", out]) == 0
    assert started.names == ["CartPole-v1/trpo/seed-1"]
    assert Path(out, "table1.md").read_text() == before


def test_a_table_can_be_given_more_seeds(started, out, capfd):
    assert main([*WORDS, "--output-dir", out]) == 0
    started.names.clear()
    summary = answer(capfd, "table1", "--resume", "--output-dir", out, "--seeds", "0", "1", "2")
    assert started.names == [f"CartPole-v1/{name}/seed-2" for name in ("none", "clip-0.2", "trpo")]
    assert len(summary["returns"]["trpo"]["CartPole-v1"]) == 3


def test_runs_of_another_length_are_not_mixed(started, out, capfd):
    assert main([*WORDS, "--output-dir", out]) == 0
    before = Path(out, "config.yaml").read_text()
    told = refused(capfd, "table1", "--resume", "--output-dir", out, "--num-steps", "8192")
    assert "num_steps=4096, not 8192" in told
    assert Path(out, "config.yaml").read_text() == before


def test_each_run_s_folder_holds_its_settings(started, out, capfd):
    assert main([*WORDS, "--output-dir", out]) == 0
    saved = read_config(Path(out, "CartPole-v1/none/seed-1"))
    assert (saved["algorithm"], saved["seed"], saved["env_id"]) == ("none", 1, "CartPole-v1")


def test_the_runs_train_in_processes_of_their_own(out, capfd):
    words = ["--envs", "CartPole-v1", "--variants", "clip-0.1", "--seeds", "7", "--num-steps", "2048", "--workers", "1"]
    summary = answer(capfd, "table1", *words, "--output-dir", out)
    run = Path(out, "CartPole-v1/clip-0.1/seed-7")
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert (saved["ppo"]["clip_range"], saved["seed"], saved["horizon"]) == (0.1, 7, 2048)
    (row,) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert summary["returns"]["clip-0.1"]["CartPole-v1"] == [pytest.approx(row["episode/return"])]
    assert re.search(r"classic 1/1 ", (run.parent / "seed-7.log").read_text())


@pytest.mark.parametrize("command", ["table1", "ablations"])
@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--envs Cartpole-v1", ["Cartpole-v1", "Did you mean CartPole-v1?"]),
        ("--envs CartPole-v1 CartPole-v1", ["env_ids", "twice"]),
        ("--variants clop-0.2", ["clop-0.2"]),
        ("--seeds 0 0", ["seeds", "twice"]),
        ("--seeds -1", ["seeds"]),
        ("--num-steps 0", ["num_steps=0"]),
        ("--workers 0", ["workers=0"]),
        ("--workers two", ["workers", "two"]),
        ("--worker 2", ["worker", "workers"]),
    ],
)
def test_a_mistake_is_named_in_one_line_and_leaves_nothing(command, words, named, capfd):
    told = refused(capfd, command, *words.split(), "--output-dir", "fresh")
    assert all(name in told for name in named), told
    assert not Path("fresh").exists()


def test_the_nearest_variant_is_offered(capfd):
    assert "Did you mean clip-0.2?" in refused(capfd, "table1", "--variants", "clip0.2")


def test_resume_of_a_folder_that_holds_something_else_is_refused(capfd):
    Path("other").mkdir()
    Path("other/config.yaml").write_text("env_id: CartPole-v1\n")
    assert "not of a comparison" in refused(capfd, "table1", "--resume", "--output-dir", "other")
