"""`ppo-rlhf evaluate` on tiny runs."""

import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import tiny_runs
import torch
from refusals import refusal
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_rlhf.cli import main
from ppo_rlhf.config import SFTConfig
from ppo_rlhf.evaluate import evaluate
from ppo_rlhf.evaluate.show import show
from ppo_rlhf.evaluation_settings import EvaluationSettings
from ppo_rlhf.settings import LoRASettings
from ppo_rlhf.train import ppo, sft


def train(folder, models, data, **changes):
    """A PPO run of three steps with a checkpoint at each."""
    (folder / "user.py").write_text(tiny_runs.USER_FUNCTIONS)
    settings = {
        "num_steps": 3,
        "eval_every": 1,
        "save_every": 1,
        "keep_checkpoints": 3,
        "eval_fraction": 0.3,
        "matmul_precision": "highest",
        "prompts": data["prompts"],
        "reward": f"{folder}/user.py:length",
        "gold": f"{folder}/user.py:vowels",
        "output_dir": str(folder / "run"),
    }
    ppo.train(tiny_runs.ppo_config(models, **settings | changes))
    return str(folder / "run")


@pytest.fixture(scope="module")
def run(models, data, tmp_path_factory):
    return train(tmp_path_factory.mktemp("finished"), models, data)


def one(name, **settings):
    (found,) = evaluate([name], EvaluationSettings(**settings))
    return found


JUDGE = "def judge(prompts, a, b):\n    return ['a'] * len(prompts)\n"


def test_a_policy_has_no_kl_to_itself_and_wins_half_of_the_pairs_against_itself(models, data):
    Path("judge.py").write_text(JUDGE)
    mine = models["gpt2"]
    judged = {"reward": "user.py:length", "gold": "user.py:vowels", "judge": "judge.py:judge"}
    found = one(mine, prompts=data["prompts"], reference=mine, against=mine, max_new_tokens=8, samples=2, **judged)
    assert (found.numbers["kl"].value, found.numbers["kl"].low, found.numbers["kl"].high) == (0, 0, 0)
    assert {name: rate.value for name, rate in found.win_rates.items()} == {"reward": 0.5, "gold": 0.5, "judge": 0.5}
    assert all(rate.low < 0.5 < rate.high for rate in found.win_rates.values())


def test_the_perplexity_is_exp_of_the_loss_that_transformers_computes(models):
    texts = ["a red fish", "the old stone river", "small bright green bird and stone"]
    tiny_runs.write_rows("text.jsonl", [{"text": text} for text in texts])
    found = one(models["gpt2"], text="text.jsonl")
    model, tokenizer = (kind.from_pretrained(models["gpt2"]) for kind in (AutoModelForCausalLM, AutoTokenizer))
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert found.numbers["perplexity"].value == pytest.approx(math.exp(total / count), rel=1e-5)
    assert list(found.numbers) == ["perplexity"]
    assert found.prompts == 0


def test_the_numbers_of_a_run_are_means_over_the_rows_that_it_writes(run, capfd):
    words = ["--samples", "3", "--best-of", "6", "--against", run, "--output", "rows.jsonl", "--json"]
    assert main(["evaluate", run, *words]) == 0
    (found,) = json.loads(capfd.readouterr().out.splitlines()[-1])["policies"]
    rows = tiny_runs.jsonl("rows.jsonl")
    assert found["prompts"] == len(rows) == 12  # those that the run held out
    assert len({row["prompt"] for row in rows}) == 12
    responses = [response for row in rows for response in row["responses"]]
    assert len(responses) == 3 * 12
    for number in ("score", "gold_score", "kl", "length"):
        assert found[number]["value"] == pytest.approx(sum(each[number] for each in responses) / 36)
        assert found[number]["low"] <= found[number]["value"] <= found[number]["high"]
    assert all(each["score"] == pytest.approx(len(each["response"]) / 10) for each in responses)
    assert found["stop_rate"]["value"] == pytest.approx(sum(each["finished"] for each in responses) / 36)
    assert found["win_rate"]["reward"]["value"] == 0.5
    best = [[each["score"] for each in row["best_of"]] for row in rows]
    assert [each["n"] for each in found["best_of_n"]] == [1, 2, 4, 6]
    assert found["best_of_n"][0]["score"]["value"] == pytest.approx(sum(map(sum, best)) / 72)
    assert found["best_of_n"][-1]["score"]["value"] == pytest.approx(sum(map(max, best)) / 12)
    assert found["best_of_n"][1]["kl"] == pytest.approx(math.log(2) - 1 / 2)


def test_policies_of_one_reference_show_its_best_of_n_once(run):
    console = Console(file=io.StringIO(), width=200)
    evaluation = one(run, best_of=2)
    show([evaluation, replace(evaluation, policy="another"), replace(evaluation, reference="of another")], console)
    assert console.file.getvalue().count("the best of n of") == 2


def test_the_best_of_n_are_responses_of_the_reference(run, models, data):
    own = one(run, best_of=2)
    reference = one(models["gpt2"], prompts=data["prompts"], reward="user.py:length", best_of=2, max_new_tokens=8)
    theirs = {row["prompt"]: [each["response"] for each in row["best_of"]] for row in reference.rows}
    assert own.reference == models["gpt2"]
    assert {row["prompt"] for row in own.rows} <= set(theirs)
    again = one(models["gpt2"], against=run, best_of=2)  # measured as the run is
    assert [row["best_of"] for row in again.rows] == [row["best_of"] for row in own.rows]


def test_same_seed_same_numbers(run):
    assert one(run).as_dict() == one(run).as_dict()
    assert one(run).rows != one(run, seed=1).rows


def test_a_policy_without_a_ppo_run_is_measured_as_the_run_beside_it(run, models):
    tuned, start = evaluate([run, models["gpt2"]], EvaluationSettings())
    assert [row["prompt"] for row in start.rows] == [row["prompt"] for row in tuned.rows]
    assert list(start.numbers) == list(tuned.numbers)
    assert start.numbers["length"].value <= 8
    assert start.numbers["kl"].value == 0
    assert tuned.numbers["kl"].value != 0


def test_a_checkpoint_is_the_policy_of_its_step(run):
    assert one(run, step=3).rows == one(run).rows
    assert one(run, step=1).rows != one(run).rows


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": LoRASettings(rank=4)},
        {"lora": LoRASettings(rank=4, merge=False)},
        {"ema_decay": 0.5},
        {"value_model": "separate"},
    ],
    ids=["merged adapter", "adapter", "average", "separate value model"],
)
def test_the_last_checkpoint_of_any_run_is_its_final_policy(changes, models, data, tmp_path):
    folder = train(tmp_path, models, data, **changes)
    final, last = one(folder), one(folder, step=3)
    for row, other in zip(final.rows, last.rows, strict=True):
        assert row["responses"][0]["response"] == other["responses"][0]["response"]
        assert row["responses"][0]["kl"] == pytest.approx(other["responses"][0]["kl"], abs=1e-4)
    assert any(row["responses"][0]["kl"] != 0 for row in final.rows)


def test_the_best_policy_is_the_one_that_the_run_kept_as_that(run, data):
    of_folder = one(str(Path(run) / "best"), against=run)
    assert one(run, best=True).rows[0]["responses"] == of_folder.rows[0]["responses"]


def test_an_sft_run_is_scored_by_a_given_reward(models, data):
    config = SFTConfig(policy=models["gpt2"], data=data["demonstrations"], output_dir="sft", batch_size=8, log_with=())
    sft.train(config)
    parts = '[{reward: "user.py:length", weight: 2.0}, {reward: "user.py:vowels"}]'
    words = ["--prompts", data["prompts"], "--reward", parts, "--num-prompts", "10", "--output", "rows.jsonl"]
    assert main(["evaluate", "sft", *words]) == 0
    rows = tiny_runs.jsonl("rows.jsonl")
    assert len(rows) == 10
    (response,) = rows[0]["responses"]
    assert set(response["score_parts"]) == {"length", "vowels"}
    assert response["score"] == pytest.approx(2 * response["score_parts"]["length"] + response["score_parts"]["vowels"])


def test_conversations_are_read_by_the_chat_template_of_the_policy():
    tokens = tiny_models.make_chat_tokenizer(["a red fish and a stone"], size=300)
    tiny_runs.save(Path("chat"), tiny_runs.model(tokens), tokens)
    tiny_runs.write_rows(
        "chats.jsonl", [{"prompt": [{"role": "user", "content": f"fish {index}"}]} for index in range(3)]
    )
    found = one("chat", prompts="chats.jsonl", reward="user.py:length", max_new_tokens=4)
    assert found.rows[0]["prompt"] == "<|im_start|>user\nfish 0<|im_end|>\n<|im_start|>assistant\n"


def test_tables_show_each_policy_beside_the_others(run, models, capsys):
    assert main(["evaluate", run, "--policy", models["gpt2"], "--against", models["gpt2"], "--best-of", "2"]) == 0
    told = capsys.readouterr().out
    for name in ("score", "gold", "KL to the reference", "stopped", "distinct", "wins", "best of n"):
        assert name in told


# ------------------------------------------------------------------------------------------------------- refusals

MISTAKES = [
    ("evaluate", ["RUN", "--policy"]),
    ("evaluate nowhere", ["nowhere", "no such folder"]),
    ("evaluate empty --prompts {prompts}", ["empty"]),
    ("evaluate --policy ./nowhere", ["./nowhere"]),
    ("evaluate {run} unfinished", ["unfinished", "--step"]),
    ("evaluate {gpt2}", ["{gpt2}", "--prompts"]),
    ("evaluate {run} --sampels 3", ["sampels", "samples"]),
    ("evaluate {run} --samples 0", ["samples=0"]),
    ("evaluate {run} --num-prompts 1", ["num_prompts=1"]),
    ("evaluate {run} --best-of -1", ["best_of=-1"]),
    ("evaluate {run} --seed -1", ["seed=-1"]),
    ("evaluate {run} --temperature 0", ["temperature=0"]),
    ("evaluate {run} --temperature .nan", ["temperature=nan"]),
    ("evaluate {run} --max-new-tokens 0", ["max_new_tokens=0"]),
    ("evaluate {run} --max-new-tokens 64", ["max_new_tokens=64"]),
    ("evaluate {run} --max-new-tokens 60", ["prompt 0"]),
    ("evaluate {run} --prompts nowhere.jsonl", ["--prompts", "nowhere.jsonl"]),
    ("evaluate {run} --prompts one.jsonl", ["--prompts", "at least 2"]),
    ("evaluate {run} --prompts {demonstrations}?take=0", ["take=0"]),
    ("evaluate {run} --text nowhere.jsonl", ["--text", "nowhere.jsonl"]),
    ("evaluate {run} --text {prompts}", ["--text", "completion"]),
    ("evaluate {run} --text text.jsonl", ["--text", "at least 2 texts"]),
    ("evaluate {run} --reward nowhere.py:length", ["nowhere.py"]),
    ("evaluate {run} --reward ./nowhere", ["--reward", "./nowhere"]),
    ("evaluate {run} --reward user.py:lenght", ["Did you mean length?"]),
    ("evaluate {run} --gold ./nowhere", ["--gold", "./nowhere"]),
    ("evaluate {run} --reference ./nowhere", ["--reference", "./nowhere"]),
    ("evaluate {run} --reference {other}", ["--reference", "vocabulary"]),
    ("evaluate {run} --against ./nowhere", ["./nowhere"]),
    ("evaluate {gpt2} --prompts {prompts} --against {gpt2}", ["--against", "--judge"]),
    ("evaluate {gpt2} --prompts {prompts} --best-of 2", ["--best-of", "--reward"]),
    ("evaluate {run} --judge user.py:length", ["judge", "--against"]),
    ("evaluate {run} --against {gpt2} --judge length", ["--judge length", "module:function"]),
    ("evaluate {run} --against {gpt2} --judge user.py:nobody", ["nobody"]),
    ("evaluate {run} --against {gpt2} --judge bad.py:three", ["--judge", "not a function"]),
    ("evaluate {run} --step 7", ["step 7", "1, 2, 3"]),
    ("evaluate {run} --step -1", ["step=-1"]),
    ("evaluate {run} --step 1 --best true", ["step=1", "best"]),
    ("evaluate {gpt2} --step 1 --prompts {prompts}", ["no checkpoint"]),
    ("evaluate {gpt2} --best --prompts {prompts}", ["--best"]),
    ("evaluate {run} --output nowhere/rows.jsonl", ["--output", "nowhere"]),
    ("evaluate {run} --output empty", ["--output", "empty"]),
    ("evaluate unfinished --prompts {prompts}", ["unfinished", "--step"]),
]
BAD = """
three = 3
def nan(prompts, responses, **columns):
    return [float("nan")] * len(responses)
def judge(prompts, a, b):
    return ["left"] * len(prompts)
"""


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    tokens = tiny_runs.tokenizer(size=280)
    return tiny_runs.save(tmp_path_factory.mktemp("other"), tiny_runs.model(tokens), tokens)


@pytest.mark.parametrize(("line", "named"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_named_in_one_line(line, named, run, other, models, data, capfd):
    Path("empty").mkdir()
    Path("unfinished").mkdir()
    Path("unfinished/config.yaml").write_text("seed: 0\n")
    Path("bad.py").write_text(BAD)
    tiny_runs.write_rows("one.jsonl", tiny_runs.prompts(1))
    tiny_runs.write_rows("text.jsonl", [{"text": "a red fish"}])
    paths = models | data | {"run": run, "other": other}
    words = [word.format(**paths) for word in line.split()]
    before = sorted(Path().rglob("*.jsonl"))
    told = refusal(main, words, capfd)
    for name in named:
        assert name.format(**paths) in told
    assert sorted(Path().rglob("*.jsonl")) == before


@pytest.mark.parametrize(
    ("option", "named"),
    [(["--reward", "bad.py:nan"], "reward function nan"), (["--judge", "bad.py:judge"], "'left'")],
)
def test_what_shows_only_in_responses_is_named_and_leaves_an_earlier_output_as_it_is(option, named, run, models, capfd):
    Path("bad.py").write_text(BAD)
    Path("rows.jsonl").write_text("earlier\n")
    assert main(["evaluate", run, "--against", models["gpt2"], *option, "--output", "rows.jsonl"]) == 2
    captured = capfd.readouterr()
    assert named in captured.err.splitlines()[-1]
    assert captured.out == ""
    assert Path("rows.jsonl").read_text() == "earlier\n"


def test_a_checkpoint_that_is_damaged_is_refused(run, capfd, tmp_path):
    shutil.copytree(run, "copy")
    weights = Path("copy/checkpoints/step_000002/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4])
    assert "step_000002" in refusal(main, ["evaluate", "copy", "--step", "2"], capfd)
