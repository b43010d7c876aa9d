"""The examples of extensions in a run, each held to a number that is known; and what is refused."""

import csv
from pathlib import Path

import pytest
import torch
from test_samplers import config_of, rows_without
from tiny_runs import jsonl, metrics_of, settings_of

from ppo_rlhf.cli import main
from ppo_rlhf.config import PPOConfig
from ppo_rlhf.errors import UserError
from ppo_rlhf.settings import Extension, SamplingSettings
from ppo_rlhf.train import ppo

FOLDER = Path(__file__).parents[2] / "examples" / "extensions"
EXAMPLES = {path.stem: str(path) for path in FOLDER.glob("*.py")}


def test_each_of_the_examples_is_run_below():
    text = Path(__file__).read_text(encoding="utf-8")
    assert EXAMPLES.keys() == {"advantage", "callback", "reward_shaping", "sampler"}
    assert all(f'EXAMPLES["{name}"]' in text for name in EXAMPLES)
    assert all(len(Path(path).read_text(encoding="utf-8").splitlines()) <= 35 for path in EXAMPLES.values())


def test_the_monte_carlo_advantage_trains_as_gae_does_at_lambda_one(models, data):
    ppo.train(config_of(models, data, "own", advantage=EXAMPLES["advantage"] + ":monte_carlo"))
    ppo.train(config_of(models, data, "gae", gae_lambda=1.0))
    ppo.train(config_of(models, data, "other"))
    own, gae, other = (metrics_of(folder)[-1] for folder in ("own", "gae", "other"))
    for name in ("objective/score", "objective/kl", "loss/value", "value/explained_variance", "grad_norm"):
        assert own[name] == pytest.approx(gae[name], rel=1e-3)
    assert own["loss/value"] != pytest.approx(other["loss/value"], rel=1e-3)
    for folder, shown in (("own", {"values"}), ("gae", {"values", "advantages", "returns"})):
        for row in [row for row in jsonl(f"{folder}/samples.jsonl") if row["kind"] == "held-out"]:
            assert {"values", "advantages", "returns"} & row.keys() == shown


def test_a_response_that_is_paid_at_its_end_is_paid_the_same_in_sum(models, data):
    ppo.train(config_of(models, data, "own", reward_shaping=EXAMPLES["reward_shaping"] + ":at_the_end"))
    ppo.train(config_of(models, data, "default"))
    first, usual = (metrics_of(folder)[1] for folder in ("own", "default"))
    assert first["objective/reward"] == pytest.approx(usual["objective/reward"], abs=1e-5)
    rows = [row for row in jsonl("own/samples.jsonl") if len(row["tokens"]) > 1]
    assert {row["kind"] for row in rows} == {"rollout", "held-out"}
    assert all(set(row["rewards"][:-1]) == {0.0} for row in rows)
    moved = [row for row in jsonl("default/samples.jsonl") if row["step"] > 1 and len(row["tokens"]) > 1]
    assert any(set(row["rewards"][:-1]) != {0.0} for row in moved)


def test_generate_of_transformers_samples_what_the_policy_says(models, data):
    settings = SamplingSettings(max_new_tokens=12, stop_token_ids=tuple(range(2, 22)))
    changes = {"num_steps": 1, "batch_size": 32, "sampling": settings}
    ppo.train(config_of(models, data, "own", sampler=EXAMPLES["sampler"] + ":generate", **changes))
    ppo.train(config_of(models, data, "again", sampler=EXAMPLES["sampler"] + ":generate", **changes))
    row = metrics_of("own")[1]
    assert rows_without("", "own") == rows_without("", "again")
    assert 0.2 < row["response/stop_rate"] < 0.9
    assert row["response/length"] < 12
    for sample in jsonl("own/samples.jsonl"):
        assert sample["finished"] == (sample["ids"][-1] in settings.stop_token_ids)
        assert not set(sample["ids"][:-1]) & set(settings.stop_token_ids)


def test_a_callback_with_arguments_writes_its_table(models, data):
    table = Extension(EXAMPLES["callback"] + ":Table", {"path": "course.csv"})
    seen = []
    ppo.train(config_of(models, data, callbacks=(table,)), callbacks=[lambda step, metrics: seen.append(step)])
    with open("course.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == seen == [1, 2, 3]
    assert [float(row["objective/kl"]) for row in rows] == [row["objective/kl"] for row in metrics_of("out")[1:]]


def test_the_command_line_takes_extensions_and_the_run_s_configuration_names_them(models, data):
    words = f"ppo --policy {models['gpt2']} --prompts {data['prompts']} --reward user.py:length --batch_size 4 "
    words += f"--num_steps 1 --log_with [] --reward-shaping {EXAMPLES['reward_shaping']}:at_the_end "
    words += f"--advantage {EXAMPLES['advantage']}:monte_carlo --output-dir out"
    table = f'[{{"name": "{EXAMPLES["callback"]}:Table", "arguments": {{"path": "course.csv"}}}}]'
    assert main([*words.split(), "--callbacks", table]) == 0
    assert Path("course.csv").exists()
    assert settings_of("out")["advantage"].endswith("advantage.py:monte_carlo")
    assert settings_of("out")["callbacks"][0]["arguments"] == {"path": "course.csv"}
    assert main(["ppo", "--config", "out/config.yaml", "--output-dir", "again"]) == 0
    assert metrics_of("again")[1]["objective/score"] == metrics_of("out")[1]["objective/score"]


def one_number(rewards, *arguments, **options):
    return torch.zeros(3)


def row_by_row(rewards, *arguments, **options):
    return rewards[:, 0], rewards


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantage": one_number}, "advantage must return advantages and returns, not Tensor"),
        ({"advantage": row_by_row}, r"advantages must be a tensor of shape \(8, \d\), \(B, T\), not \(8,\)"),
        ({"reward_shaping": one_number}, r"rewards of reward_shaping must be a tensor of shape .*, not \(3,\)"),
        (
            {"reward_shaping": lambda *_, **__: [0.0]},
            r"rewards of reward_shaping must be a tensor .*, not list",
        ),
    ],
    ids=["no pair", "no tokens", "another shape", "no tensor"],
)
def test_numbers_that_do_not_fit_the_tokens_are_refused(changes, message, models, data):
    with pytest.raises(UserError, match=message):
        ppo.train(config_of(models, data), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantage": "user.py:nowhere"}, "user.py has no nowhere"),
        ({"reward_shaping": "user"}, "reward_shaping: user is not module:function, nor file.py:function"),
        ({"callbacks": ("nowhere.py:Table",)}, "there is no file nowhere.py"),
        ({"callbacks": (Extension("user.py:length", {"size": 1}),)}, "names no argument 'size'"),
    ],
    ids=str,
)
def test_an_extension_that_cannot_be_had_is_refused_before_anything_is_written(changes, message, models, data):
    with pytest.raises(UserError, match=message):
        ppo.train(config_of(models, data, **changes))
    assert not Path("out").exists()


def test_a_misspelt_advantage_is_told_with_the_nearest_one():
    message = r"advantage=rlo is neither gae, rloo, grpo nor module:function\. Did you mean rloo"
    with pytest.raises(UserError, match=message):
        PPOConfig(advantage="rlo")
