"""Two processes take the same steps as one; started as a user starts them, by torchrun."""

import json

import pytest
import tiny_runs
from tiny_runs import STOPS, data, in_tmp_path, jsonl, metrics_of, models, two_processes, weights_of

from ppo_rlhf.cli import main

__all__ = ["data", "in_tmp_path", "models"]

COMMON = "--log_with [] --eval_fraction 0.2 --save_every 2 --eval_every 2 --matmul_precision highest"
SAMPLING = f"--sampling.max_new_tokens 6 --sampling.stop_token_ids {json.dumps(STOPS).replace(' ', '')}"
COMMANDS = {
    "sft": f"sft --policy {{gpt2}} --data {{demonstrations}} --batch_size 4 --num_epochs 0.75 {COMMON} "
    "--optimizer.lr 1e-2 --micro_batch_size 1",
    "reward": f"reward --policy ONE/sft/policy --data {{rankings}} --batch_size 4 --num_epochs 0.75 {COMMON} "
    f"{SAMPLING} --normalization_prompts 8 --optimizer.lr 1e-3",
    "ppo": f"ppo --policy ONE/sft/policy --reward ONE/reward/reward_model --prompts {{prompts}} --gold user.py:vowels "
    f"--batch_size 8 --num_steps 2 {COMMON} {SAMPLING} --max_eval_prompts 3 --value_model separate --kl_target 1 "
    "--ppo.num_minibatches 2 --ppo.num_epochs 2 --optimizer.lr 1e-3",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, models, data):
    """Each stage by one process and by two, from the same inputs; → the folder of each, and what two printed."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "user.py").write_text(tiny_runs.USER_FUNCTIONS)
    printed = {}
    for stage, line in COMMANDS.items():
        words = line.replace("ONE", str(folder / "one")).format(**models, **data).split()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            assert main([*words, "--output-dir", f"one/{stage}"]) == 0
        printed[stage] = two_processes("-m", "ppo_rlhf", *words, "--json", "--output-dir", f"two/{stage}", cwd=folder)
        assert printed[stage].returncode == 0, printed[stage].stderr
    return folder / "one", folder / "two", printed


def test_two_processes_write_one_run_folder(runs):
    one, two, _ = runs
    for stage in COMMANDS:
        assert json.loads((two / stage / "environment.json").read_text())["processes"] == 2
        assert json.loads((one / stage / "environment.json").read_text())["processes"] == 1
        steps = [row["step"] for row in metrics_of(two / stage)]
        assert steps == list(range(len(steps)))
        assert steps == [row["step"] for row in metrics_of(one / stage)]
        assert (two / stage / "report.html").exists()
        assert not list((two / stage).rglob("*.partial"))
    keys = [(row["step"], row["kind"], row["prompt"]) for row in jsonl(two / "ppo" / "samples.jsonl")]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("stage", COMMANDS)
def test_two_processes_print_one_object(stage, runs):
    _, two, printed = runs
    lines = printed[stage].stdout.splitlines()
    assert len(lines) == 1, lines
    assert json.loads(lines[0]).items() >= json.loads((two / stage / "summary.json").read_text()).items()


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_two_processes_take_the_same_supervised_steps_as_one(stage, runs):
    one, two, _ = runs
    for a, b in zip(metrics_of(one / stage), metrics_of(two / stage), strict=True):
        assert b == pytest.approx(a, abs=1e-4, rel=1e-4)
    model = {"sft": "policy", "reward": "reward_model"}[stage]
    weights = weights_of(one / stage / model)
    for name, value in weights_of(two / stage / model).items():
        assert float((value - weights[name]).abs().max()) < 1e-3, name


def test_two_processes_sample_and_score_the_same_rollout_as_one(runs):
    one, two, _ = runs
    before = metrics_of(one / "ppo")[0], metrics_of(two / "ppo")[0]
    assert before[1] == pytest.approx(before[0], abs=1e-4)
    rows = metrics_of(one / "ppo")[1], metrics_of(two / "ppo")[1]
    for name in (
        "objective/score",
        "objective/score_std",
        "objective/gold_score",
        "objective/kl",
        "objective/reward",
        "response/length",
        "response/repetition",
        "response/stop_rate",
        "value/explained_variance",
        "kl_coef",
        "lr",
        "episodes",
        "optimizer_steps",
    ):
        assert rows[1][name] == pytest.approx(rows[0][name], abs=1e-4), name
    assert rows[0]["response/stop_rate"] > 0
    rollouts = [
        [(row["prompt"], row["response"]) for row in jsonl(folder / "ppo" / "samples.jsonl") if row["step"] == 1]
        for folder in (one, two)
    ]
    assert rollouts[0] == rollouts[1]


def test_two_processes_adapt_the_kl_coefficient_by_the_global_kl(runs):
    one, two, _ = runs
    assert metrics_of(two / "ppo")[2]["kl_coef"] == pytest.approx(metrics_of(one / "ppo")[2]["kl_coef"])
    assert metrics_of(two / "ppo")[2]["kl_coef"] != 0.05


def test_two_processes_normalise_compare_and_read_texts_as_one(models, data, tmp_path):
    parts = "[{reward: user.py:vowels}, {reward: user.py:length, weight: 0.5}]"
    line = (
        f"ppo --policy {models['gpt2']} --prompts {data['prompts']} --batch_size 8 --num_steps 2 {COMMON} {SAMPLING} "
        "--max_eval_prompts 3 --optimizer.lr 1e-3 --ppo.num_epochs 2 --advantage rloo --responses_per_prompt 2 "
        "--kl_penalty k2 --score_shaping.normalize running --ema_decay 0.5 --matmul_precision highest "
        f"--pretraining.data {data['demonstrations']} --pretraining.batch_size 4 --pretraining.micro_batch_size 1"
    )
    words = [*line.split(), "--reward", parts]
    assert main([*words, "--output-dir", "one"]) == 0
    done = two_processes("-m", "ppo_rlhf", *words, "--output-dir", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (metrics_of(tmp_path / name) for name in ("one", "two"))
    for name in ("objective/score", "objective/score/vowels", "objective/reward", "loss/pretraining", "grad_norm"):
        for step in (1, 2):
            assert two[step][name] == pytest.approx(one[step][name], rel=1e-3, abs=1e-4), (step, name)
    states = [
        json.loads((tmp_path / name / "checkpoints/step_000002/loop.json").read_text()) for name in ("one", "two")
    ]
    assert states[1]["score_moments"] == pytest.approx(states[0]["score_moments"])
    weights = weights_of(tmp_path / "one" / "policy")
    for name, value in weights_of(tmp_path / "two" / "policy").items():
        assert float((value - weights[name]).abs().max()) < 1e-4, name


def test_a_batch_that_two_processes_cannot_share_is_refused(models, data, tmp_path):
    words = COMMANDS["sft"].format(**models, **data).replace("--batch_size 4", "--batch_size 5").split()
    done = two_processes("-m", "ppo_rlhf", *words, "--output-dir", "out", cwd=tmp_path)
    assert done.returncode != 0
    assert "error: batch_size=5 does not divide between 2 processes." in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert "ppo_rlhf/" not in done.stderr  # no traceback of ours
    assert not (tmp_path / "out").exists()


FAILS_LATE_IN_ONE_PROCESS = """
import os

calls = []

def length(prompts, responses, **columns):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "{rank}":
        raise RuntimeError("the judge is ill")
    return [len(response) / 10 for response in responses]
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_process_ends_the_run_of_both(rank, models, data, tmp_path):
    (tmp_path / "late.py").write_text(FAILS_LATE_IN_ONE_PROCESS.format(rank=rank))
    words = f"ppo --policy {models['gpt2']} --reward late.py:length --prompts {data['prompts']} --batch_size 8"
    words += f" --num_steps 4 --max_eval_prompts 4 {SAMPLING} --output-dir out"
    done = two_processes("-m", "ppo_rlhf", *words.split(), cwd=tmp_path)  # which would run out of its time
    assert done.returncode != 0
    assert "error: reward function length raised RuntimeError: the judge is ill" in done.stderr
    assert [row["step"] for row in metrics_of(tmp_path / "out")] == [0, 1]


ASKS = """
from user import annotate as judge

def annotate(prompts, responses, *, seed):
    with open("asked.txt", "a") as file:
        file.write(f"{len(prompts)}\\n")
    return judge(prompts, responses, seed=seed)
"""


def test_a_pipeline_runs_in_two_processes_and_asks_its_annotator_once(models, data, tmp_path):
    (tmp_path / "asks.py").write_text(ASKS)
    words = (
        f"pipeline --output-dir out --sft.policy {models['gpt2']} --sft.data {data['demonstrations']} "
        f"--sft.batch_size 4 --sft.num_epochs 0.25 --sft.eval_fraction 0.2 --comparisons.prompts {data['prompts']} "
        "--comparisons.annotator asks.py:annotate --comparisons.num_prompts 13 --comparisons.sampling.max_new_tokens 6 "
        "--reward.batch_size 4 --reward.num_epochs 0.5 --reward.eval_fraction 0.25 --reward.normalization_prompts 4 "
        f"--reward.sampling.max_new_tokens 6 --ppo.prompts {data['prompts']} --ppo.num_steps 1 --ppo.batch_size 4 "
        "--ppo.max_eval_prompts 3 --ppo.sampling.max_new_tokens 6"
    )
    done = two_processes("-m", "ppo_rlhf", *words.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary.keys() >= {"sft", "reward", "ppo", "seconds"}
    assert len(jsonl(tmp_path / "out" / "comparisons.jsonl")) == 13
    assert (tmp_path / "asked.txt").read_text().split() == ["13"]
    assert (tmp_path / "out" / "report.html").exists()
