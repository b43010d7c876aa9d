"""Rewards of several parts in a run: named in YAML, logged apart, shaped, resumed; and looked at before it."""

import json
import math
from pathlib import Path

import pytest
import tiny_runs
from tiny_runs import STOPS, metrics_in_one_go_and_in_two, metrics_of, same_weights, settings_of, without_times

from ppo_rlhf.cli import main
from ppo_rlhf.config import MissingEOS, PPOConfig
from ppo_rlhf.reward_settings import RewardPart, ScoreShaping
from ppo_rlhf.rewards import Weighted, WeightedSum, exact_match
from ppo_rlhf.settings import OptimizerSettings, SamplingSettings
from ppo_rlhf.train import ppo

PARTS = """
reward:
  - {reward: user.py:vowels, weight: 2}
  - {reward: [user.py:length, user.py:vowels], ensemble: min, name: sure}
  - {reward: "ppo_rlhf.rewards:regular_expression", weight: -1, arguments: {pattern: "[aeiou]"}}
"""


def config_of(models, data, **changes):
    settings = {
        "policy": models["gpt2"],
        "prompts": data["prompts"],
        "reward": "user.py:vowels",
        "batch_size": 4,
        "num_steps": 2,
        "eval_fraction": 0.2,
        "eval_every": 0,
        "log_with": (),
        "matmul_precision": "highest",
        "sampling": SamplingSettings(max_new_tokens=6, stop_token_ids=STOPS),
        "optimizer": OptimizerSettings(lr=1e-2),
    }
    return PPOConfig(**{**settings, **changes})


def words_of(models, data, *more):
    stops = json.dumps(STOPS).replace(" ", "")
    words = f"ppo --policy {models['gpt2']} --prompts {data['prompts']} --batch_size 4 --num_steps 1 --log_with []"
    return [*words.split(), *f"--sampling.max_new_tokens 6 --sampling.stop_token_ids {stops}".split(), *more]


def test_parts_named_in_yaml_are_added_up_and_logged_apart(models, data):
    Path("parts.yaml").write_text(PARTS)
    assert main([*words_of(models, data, "--config", "parts.yaml", "--output-dir", "out")]) == 0
    for kind, row in zip(("eval", "objective"), metrics_of("out"), strict=True):
        found = {name: row[f"{kind}/score/{name}"] for name in ("vowels", "sure", "regular_expression")}
        total = 2 * found["vowels"] + found["sure"] - found["regular_expression"]
        assert row[f"{kind}/score"] == pytest.approx(total, abs=1e-5)
        assert found["sure"] <= row[f"{kind}/score/sure/mean"]
        assert 0 < found["regular_expression"] <= 1
    assert settings_of("out")["reward"][2]["arguments"] == {"pattern": "[aeiou]"}
    assert main(["ppo", "--config", "out/config.yaml", "--output-dir", "again"]) == 0
    assert without_times(metrics_of("again")) == without_times(metrics_of("out"))


def test_a_mistake_in_a_part_is_told_in_one_line(models, data, capfd):
    Path("parts.yaml").write_text("reward:\n  - {reward: user.py:vowels, wieght: 2}\n")
    assert main([*words_of(models, data, "--config", "parts.yaml", "--output-dir", "out")]) == 2
    told = capfd.readouterr().err
    assert told.count("\n") == 1
    assert "wieght" in told
    assert not Path("out").exists()


def test_extra_columns_reach_the_parts_of_a_reward(models, data):
    rows = [{**row, "answer": str(index)} for index, row in enumerate(tiny_runs.prompts(20))]
    seen = []

    def remember(prompts, responses, *, answer):
        seen.extend(zip(prompts, answer, strict=True))
        return [0.0] * len(prompts)

    reward = WeightedSum([Weighted("remember", remember), Weighted("right", exact_match)])
    ppo.train(config_of(models, data, num_steps=1, save_every=0), reward=reward, prompts=rows)
    assert seen
    assert set(seen) <= {(row["prompt"], row["answer"]) for row in rows}


def test_a_dense_reward_pays_each_token_of_the_run(models, data):
    def places(prompts, responses, *, response_tokens):
        return [[float(place) for place in range(len(tokens))] for tokens in response_tokens]

    ppo.train(config_of(models, data, num_steps=1, kl_coef=0.0, output_dir="out"), reward=places)
    rows = [row for row in tiny_runs.jsonl("out/samples.jsonl") if row["kind"] == "rollout"]
    for row in rows:
        count = len(row["tokens"])
        assert row["score"] == count * (count - 1) / 2
        expected = list(range(count))
        if not row["finished"]:  # its score becomes −1, whatever it earned before
            expected[-1] = -1.0 - sum(expected[:-1])
        assert row["rewards"] == pytest.approx(expected)


def test_reference_normalisation_takes_the_mean_and_spread_of_the_starting_policy(models, data):
    shaping = ScoreShaping(normalize="reference")
    config = config_of(models, data, num_steps=1, kl_coef=0.0, score_shaping=shaping, output_dir="out")
    ppo.train(config)
    before, *_ = metrics_of("out")
    for row in [row for row in tiny_runs.jsonl("out/samples.jsonl") if row["kind"] == "rollout"]:
        expected = (row["score"] - before["eval/score"]) / math.sqrt(before["eval/score_std"] ** 2 + 1e-8)
        assert sum(row["rewards"]) == pytest.approx(expected if row["finished"] else -1.0, abs=1e-4)


def test_running_normalisation_goes_on_where_it_was(models, data):
    parts = (RewardPart("user.py:vowels"), RewardPart("user.py:length", weight=0.5))
    shaping = ScoreShaping(normalize="running")
    config = config_of(models, data, reward=parts, score_shaping=shaping, num_steps=4, save_every=2)
    whole, resumed = metrics_in_one_go_and_in_two(config, cut_at=3)
    assert resumed == whole
    assert same_weights("parts/policy", "whole/policy")
    loop = json.loads(Path("whole/checkpoints/step_000004/loop.json").read_text())
    assert loop["score_moments"][2] == 16  # responses of four steps


def test_running_normalisation_measures_the_best_policy_by_the_starting_one(models, data):
    changes = {"score_shaping": ScoreShaping(normalize="running"), "missing_eos": MissingEOS("none")}
    ppo.train(config_of(models, data, output_dir="out", save_every=2, **changes))
    before, *_, after = metrics_of("out")
    loop = json.loads(Path("out/checkpoints/step_000002/loop.json").read_text())
    expected = (after["eval/score"] - before["eval/score"]) / before["eval/score_std"] - 0.05 * after["eval/kl"]
    assert loop["best"] == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------------------------------------------- dry run


def test_a_dry_run_shows_ten_samples_with_their_parts_and_writes_nothing(models, data, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    Path("parts.yaml").write_text(PARTS)
    files = sorted(Path().rglob("*"))
    assert main([*words_of(models, data, "--config", "parts.yaml", "--dry-run", "--output-dir", "out")]) == 0
    assert sorted(path for path in Path().rglob("*") if "__pycache__" not in str(path)) == files
    table = capfd.readouterr().out
    for name in ("prompt", "response", "vowels", "sure", "sure/std", "regular_expression", "score"):
        assert name in table
    assert table.count("\n│") == 10


def test_a_dry_run_scores_what_the_run_would_sample_first(models, data, capfd):
    reward = ["--reward", "user.py:vowels", "--gold", "user.py:length"]
    assert main([*words_of(models, data, *reward, "--dry-run", "--json")]) == 0
    samples = json.loads(capfd.readouterr().out)["samples"]
    assert len(samples) == 10
    for sample in samples:
        assert sample["score"] == sum(letter in "aeiou" for letter in sample["response"])
        assert sample["gold_score"] == pytest.approx(len(sample["response"]) / 10)
    assert main([*words_of(models, data, *reward, "--output-dir", "out")]) == 0
    first = next(row for row in tiny_runs.jsonl("out/samples.jsonl") if row["kind"] == "rollout")
    assert (first["prompt"], first["response"]) == (samples[0]["prompt"], samples[0]["response"])


def test_a_dry_run_tells_a_users_mistake_in_one_line(models, data, capfd):
    assert main([*words_of(models, data, "--reward", "user.py:vowles", "--dry-run")]) == 2
    assert "Did you mean vowels?" in capfd.readouterr().err
