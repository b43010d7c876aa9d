"""The stages as a user runs them: commands, files, and what they leave in the run folder."""

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny_runs
import torch
import yaml
from tiny_runs import STOPS, command, jsonl, metrics_of, settings_of
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from ppo_rlhf.cli import main
from ppo_rlhf.rewards import RewardModel

EVERY_STEP = {"loss", "grad_norm", "lr", "step"}
PPO_STEP = {
    "step",
    "objective/score",
    "objective/score_std",
    "objective/gold_score",
    "objective/kl",
    "objective/reward",
    "objective/entropy",
    "policy/approx_kl",
    "policy/clip_fraction",
    "policy/ratio",
    "loss/policy",
    "loss/value",
    "value/explained_variance",
    "kl_coef",
    "grad_norm",
    "lr",
    "response/length",
    "response/repetition",
    "response/stop_rate",
    "time/sample",
    "time/evaluate",
    "time/score",
    "time/update",
    "tokens_per_second",
    "episodes",
}

SFT = """
policy: {gpt2}
data: {demonstrations}
num_epochs: 1
batch_size: 4
eval_fraction: 0.2
eval_every: 3
save_every: 2
optimizer: {{lr: 1.0e-2, schedule: cosine, warmup_steps: 2}}
"""
REWARD = """
policy: sft/policy
data: {comparisons}
gold: user.py:length
batch_size: 4
eval_fraction: 0.2
eval_every: 4
save_every: 4
normalization_prompts: 16
sampling: {{max_new_tokens: 6}}
optimizer: {{lr: 1.0e-2}}
"""
PPO = """
policy: sft/policy
reward: reward/reward_model
gold: user.py:length
prompts: {prompts}
num_steps: 9
batch_size: 8
eval_every: 2
save_every: 2
max_eval_prompts: 4
sampling: {{max_new_tokens: 6, temperature: 0.8, stop_token_ids: {stops}}}
ppo: {{num_epochs: 2, num_minibatches: 2}}
optimizer: {{lr: 1.0e-2}}
"""


@pytest.fixture(scope="module")
def chain(tmp_path_factory, models, data):
    """sft ► reward ► ppo, each a command with a YAML file and overrides; → their folder, and what each printed."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "user.py").write_text(tiny_runs.USER_FUNCTIONS)
    for name, text in {"sft": SFT, "reward": REWARD, "ppo": PPO}.items():
        (folder / f"{name}.yaml").write_text(text.format(**models, **data, stops=list(STOPS)))
    done = {
        "sft": command("sft", "--config", "sft.yaml", "--output-dir", "sft", "--num-epochs", "2", "--json", cwd=folder),
        "reward": command("reward", "--config", "reward.yaml", "--output_dir", "reward", cwd=folder),
        "ppo": command(
            *[
                "ppo",
                "--json",
                "--config",
                "ppo.yaml",
                "--output-dir=ppo",
                "--num_steps",
                "3",
                "--ppo.num-epochs",
                "3",
                "--seed",
                "7",
            ],
            cwd=folder,
        ),
    }
    for name, answer in done.items():
        assert answer.returncode == 0, f"{name}: {answer.stderr}"
    return folder, done


def test_the_commands_tell_their_progress_on_stderr_and_their_outcome_on_stdout(chain):
    folder, done = chain
    for name in ("sft", "ppo"):
        summary = json.loads(done[name].stdout.splitlines()[-1])
        assert summary == json.loads((folder / name / "summary.json").read_text()) | {"output_dir": name}
        assert f"{name} 3/" in done[name].stderr
    assert done["reward"].stdout.startswith("reward: held-out pairs ordered right")
    assert "report: reward/report.html" in done["reward"].stdout
    for answer in done.values():
        assert "Traceback" not in answer.stderr
        assert "Warning" not in answer.stderr


def test_a_run_folder_holds_everything_of_the_run(chain):
    folder, _ = chain
    for stage, model in {"sft": "policy", "reward": "reward_model", "ppo": "policy"}.items():
        for name in (
            "config.yaml",
            "environment.json",
            "metrics.jsonl",
            "samples.jsonl",
            "summary.json",
            "report.html",
        ):
            assert (folder / stage / name).exists(), (stage, name)
        assert (folder / stage / "checkpoints").is_dir()
        assert (folder / stage / model / "model.safetensors").exists()
        assert list((folder / stage).rglob("events.out.tfevents*"))
        assert not list((folder / stage).rglob("*.partial"))
        assert not list((folder / stage).rglob("*.old"))


def test_the_configuration_is_resolved_with_what_the_command_line_overrode(chain):
    folder, _ = chain
    assert settings_of(folder / "sft")["num_epochs"] == 2
    assert settings_of(folder / "sft")["optimizer"]["weight_decay"] == 0.0  # a default is written out
    ppo = settings_of(folder / "ppo")
    assert ppo["num_steps"] == 3
    assert ppo["seed"] == 7
    assert ppo["ppo"] == ppo["ppo"] | {"num_epochs": 3, "num_minibatches": 2, "clip_range": 0.2}
    assert ppo["sampling"]["temperature"] == 0.8
    assert ppo["output_dir"] == "ppo"


def test_the_configuration_is_accepted_back_and_gives_the_same_run(chain, tmp_path, monkeypatch):
    folder, _ = chain
    monkeypatch.chdir(folder)
    again = str(tmp_path / "again")
    for stage, model in {"sft": "policy", "reward": "reward_model", "ppo": "policy"}.items():
        assert main([stage, "--config", f"{stage}/config.yaml", "--output-dir", f"{again}/{stage}"]) == 0
        assert settings_of(f"{again}/{stage}") == settings_of(stage) | {"output_dir": f"{again}/{stage}"}
        assert tiny_runs.same_weights(f"{again}/{stage}/{model}", f"{stage}/{model}")
        times = tiny_runs.without_times
        assert times(metrics_of(f"{again}/{stage}")) == times(metrics_of(stage))


def test_the_environment_says_what_ran(chain):
    folder, _ = chain
    environment = json.loads((folder / "ppo" / "environment.json").read_text())
    assert environment["processes"] == 1
    assert environment["seed"] == 7
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["versions"]["ppo_rlhf"]
    assert "ppo" in environment["command"]
    assert environment["stage"] == "ppo"
    assert "commit" in environment


def test_supervised_metrics_have_one_line_a_step(chain):
    folder, _ = chain
    for stage, num_steps in {"sft": 16, "reward": 8}.items():
        rows = metrics_of(folder / stage)
        assert [row["step"] for row in rows] == list(range(num_steps + 1))
        assert all(row.keys() >= EVERY_STEP for row in rows[1:])
        every = {"sft": 3, "reward": 4}[stage]
        evaluated = [row["step"] for row in rows if "eval/loss" in row]
        assert evaluated == sorted({0, num_steps, *range(every, num_steps, every)})
    assert all(metrics_of(folder / "reward")[-1][f"eval/{name}"] >= 0 for name in ("accuracy", "gold_accuracy"))


def test_ppo_metrics_have_their_standard_names_on_every_line(chain):
    folder, _ = chain
    rows = metrics_of(folder / "ppo")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row in rows[1:]:
        assert row.keys() >= PPO_STEP
        assert row["episodes"] == 8 * row["step"]
        assert all(isinstance(value, int | float) for value in row.values())
        assert row["optimizer_steps"] == 3 * 2
        assert row["kl_coef"] == 0.05
        assert 0 < row["response/length"] <= 6
    assert rows[1]["objective/kl"] == pytest.approx(0, abs=1e-5)  # nothing was learnt before the first rollout
    assert rows[1]["lr"] == pytest.approx(1e-2)


def test_samples_hold_what_ppo_knew_of_every_token(chain):
    folder, _ = chain
    rows = jsonl(folder / "ppo" / "samples.jsonl")
    rollouts = [row for row in rows if row["kind"] == "rollout"]
    assert {row["step"] for row in rollouts} == {1, 2, 3}
    for row in rollouts:
        assert {"prompt", "response", "score", "finished"} <= row.keys()
        for name in ("logprobs", "ref_logprobs", "entropy", "values", "rewards", "advantages", "returns"):
            assert len(row[name]) == len(row["tokens"]), name
        shaped = [-0.05 * (p - q) for p, q in zip(row["logprobs"], row["ref_logprobs"], strict=True)]
        shaped[-1] += row["score"] if row["finished"] else -1.0
        assert row["rewards"] == pytest.approx(shaped, abs=1e-4)
    held_out = [row for row in rows if row["kind"] == "held-out"]
    assert {row["step"] for row in held_out} == {0, 2, 3}
    assert {"prompt", "response", "score", "gold_score", "kl"} <= held_out[0].keys()


def held_out_by_step(folder):
    """The held-out samples of each evaluation."""
    steps = {}
    for row in jsonl(folder / "samples.jsonl"):
        assert row["kind"] == "held-out"
        steps.setdefault(row["step"], []).append(row)
    return steps


def test_every_evaluation_shows_responses_beside_the_same_eight_held_out_demonstrations(chain):
    folder, _ = chain
    steps = held_out_by_step(folder / "sft")
    assert list(steps) == [row["step"] for row in metrics_of(folder / "sft") if "eval/loss" in row]
    written = {row["prompt"]: row["completion"] for row in tiny_runs.demonstrations(40)}
    for rows in steps.values():
        assert len(rows) == 8
        assert [row["prompt"] for row in rows] == [row["prompt"] for row in steps[0]]
        assert all(row["demonstration"] == written[row["prompt"]] for row in rows)
    assert [row["response"] for row in steps[0]] != [row["response"] for row in steps[16]]


def test_every_evaluation_shows_the_raw_scores_of_the_same_eight_held_out_pairs(chain):
    folder, _ = chain
    steps = held_out_by_step(folder / "reward")
    losses = {row["step"]: row["eval/loss"] for row in metrics_of(folder / "reward") if "eval/loss" in row}
    assert list(steps) == list(losses)
    written = {row["prompt"]: row for row in tiny_runs.comparisons(40)}
    for rows in steps.values():
        assert len(rows) == 8
        for row in rows:
            assert (row["chosen"], row["rejected"]) == (
                written[row["prompt"]]["chosen"],
                written[row["prompt"]]["rejected"],
            )
    model = RewardModel.load(folder / "reward" / "reward_model", setting="test")
    del losses[0]
    best = steps[min(losses, key=losses.get)]  # whose model was kept
    for side in ("chosen", "rejected"):
        raw = model.raw_scores(model.encode([row["prompt"] for row in best], [row[side] for row in best]))
        assert [row[f"{side}_score"] for row in best] == pytest.approx(raw.tolist(), abs=1e-5)


def test_the_report_shows_the_samples_of_every_stage(chain):
    folder, _ = chain
    headings = {
        "sft": ["prompt", "demonstration", "before", "after"],
        "reward": ["prompt", "chosen", "rejected"],
    }
    for stage, expected in headings.items():
        page = (folder / stage / "report.html").read_text()
        table = page[page.index("before and after</summary>") :]
        assert re.findall('<th scope="col">(.*?)</th>', table) == expected
        first = jsonl(folder / stage / "samples.jsonl")[0]
        assert f">{first['prompt']}</span>" in table
    rows = held_out_by_step(folder / "reward")
    change = f"score {rows[0][0]['chosen_score']:.2f} → {rows[8][0]['chosen_score']:.2f}".replace("-", "−")
    assert change in (folder / "reward" / "report.html").read_text()


def test_the_latest_two_checkpoints_are_there(chain):
    folder, _ = chain
    assert sorted(path.name for path in (folder / "sft" / "checkpoints").iterdir()) == ["step_000014", "step_000016"]
    assert sorted(path.name for path in (folder / "ppo" / "checkpoints").iterdir()) == ["step_000002", "step_000003"]


def test_plain_transformers_loads_the_policies_with_the_run_s_sampling(chain):
    folder, _ = chain
    for stage, temperature, stops in (("sft", 1.0, [0]), ("ppo", 0.8, list(STOPS))):
        model = AutoModelForCausalLM.from_pretrained(folder / stage / "policy")
        tokenizer = AutoTokenizer.from_pretrained(folder / stage / "policy")
        assert tokenizer.padding_side == "left"
        assert tokenizer.pad_token_id != tokenizer.eos_token_id
        settings = GenerationConfig.from_pretrained(folder / stage / "policy")
        assert settings.do_sample
        assert settings.temperature == temperature
        assert settings.top_k in (0, None)
        assert settings.top_p in (1.0, None)
        assert settings.eos_token_id == stops
        assert settings.pad_token_id == tokenizer.pad_token_id
        batch = tokenizer(["red fish", "a"], return_tensors="pt", padding=True)
        batch.pop("token_type_ids", None)
        output = model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=3)
        assert output.shape[1] > batch["input_ids"].shape[1]


def test_plain_transformers_loads_the_reward_model_and_gives_its_raw_score(chain):
    folder, _ = chain
    path = folder / "reward" / "reward_model"
    ours = RewardModel.load(path, setting="test")
    plain = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert plain.config.pad_token_id == tokenizer.pad_token_id
    prompts, responses = ["red fish:", "a"], [" blue bird .", " the old stone"]
    ids = [
        [*tokenizer(p)["input_ids"], *tokenizer(r, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for p, r in zip(prompts, responses, strict=True)
    ]
    with torch.no_grad():
        raw = torch.stack([plain(torch.tensor([line])).logits[0, 0] for line in ids])
    assert ours.mean != 0
    torch.testing.assert_close(ours(prompts, responses), (raw - ours.mean) / ours.scale, atol=1e-5, rtol=1e-5)
    card = (path / "README.md").read_text()
    assert f"{ours.mean:.6g}" in card
    assert "not" in card or "raw" in card


def test_summaries_hold_the_outcome_in_numbers(chain):
    folder, _ = chain
    keys = {
        "sft": {"loss_before", "loss_after", "seconds"},
        "reward": {"pairwise_accuracy", "seconds"},
        "ppo": {
            "score_before",
            "score_after",
            "gold_score_before",
            "gold_score_after",
            "gold_score_std_before",
            "kl",
            "stop_rate",
            "seconds",
        },
    }
    for stage, expected in keys.items():
        summary = tiny_runs.strict((folder / stage / "summary.json").read_text())
        assert summary.keys() >= expected
        assert all(isinstance(value, int | float) for value in summary.values())
    assert json.loads((folder / "sft" / "summary.json").read_text())["loss_after"] < 6


def test_the_report_is_one_file_that_opens_offline(chain):
    folder, _ = chain
    for stage in ("sft", "reward", "ppo"):
        page = (folder / stage / "report.html").read_text()
        assert "default-src 'none'" in page
        for remote in ('src="http', "src='http", 'href="http', "@import", "<script src"):
            assert remote not in page.split("<body>\n")[1]


def test_tensorboard_reads_the_scalars(chain):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = chain
    (events,) = (folder / "ppo").rglob("events.out.tfevents*")
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    scalars = accumulator.Scalars("objective/score")
    assert [point.step for point in scalars] == [1, 2, 3]
    expected = [row["objective/score"] for row in metrics_of(folder / "ppo")[1:]]
    assert [point.value for point in scalars] == pytest.approx(expected)


def test_a_run_without_a_folder_gets_a_numbered_one(models, data):
    words = f"sft --policy {models['llama']} --data {data['demonstrations']} --batch-size 8 --eval-fraction 0.2"
    for _ in range(2):
        assert main([*words.split(), "--log_with", "[]"]) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["sft-0001", "sft-0002"]
    assert metrics_of("runs/sft-0001") == metrics_of("runs/sft-0002")


def test_an_override_before_the_config_file_still_overrides_it(models, data):
    Path("config.yaml").write_text(SFT.format(**models, **data))
    assert main(["sft", "--batch-size", "8", "--config", "config.yaml", "--output-dir", "out"]) == 0
    assert settings_of("out")["batch_size"] == 8


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.parquet", "saved", "text.txt", "function"])
def test_demonstrations_come_from_everything_that_datasets_loads(name, models):
    from datasets import Dataset

    rows = tiny_runs.demonstrations(20)
    made = Dataset.from_list(rows)
    {
        "rows.json": lambda: Path(name).write_text(json.dumps(rows)),
        "rows.csv": lambda: made.to_csv(name),
        "rows.parquet": lambda: made.to_parquet(name),
        "saved": lambda: made.save_to_disk(name),
        "text.txt": lambda: Path(name).write_text("\n".join(row["prompt"] for row in rows)),
        "function": lambda: Path("rows.py").write_text(f"def rows():\n    return {rows!r}\n"),
    }[name]()
    source = "rows.py:rows" if name == "function" else name
    words = f"sft --policy {models['gpt2']} --data {source} --batch-size 4 --eval-fraction 0.2 --output-dir out"
    assert main([*words.split(), "--log_with", "[]"]) == 0
    assert len(metrics_of("out")) == 5


# ---------------------------------------------------------------------------------------------- pipeline

PIPELINE = """
sft:
  policy: {gpt2}
  data: {demonstrations}
  batch_size: 8
  num_epochs: 0.75
  eval_fraction: 0.2
comparisons:
  prompts: {prompts}
  annotator: user.py:annotate
  num_prompts: 20
  sampling: {{max_new_tokens: 6, stop_token_ids: {stops}}}
reward:
  gold: user.py:length
  batch_size: 4
  num_epochs: 0.75
  eval_fraction: 0.25
  normalization_prompts: 8
  sampling: {{max_new_tokens: 6, stop_token_ids: {stops}}}
ppo:
  gold: user.py:length
  prompts: {prompts}
  num_steps: 2
  batch_size: 8
  max_eval_prompts: 4
  value_model: separate
  sampling: {{max_new_tokens: 6, stop_token_ids: {stops}}}
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, models, data):
    """A pipeline run by one command; → its folder's parent, and what it printed."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "user.py").write_text(tiny_runs.USER_FUNCTIONS)
    (folder / "pipeline.yaml").write_text(PIPELINE.format(**models, **data, stops=list(STOPS)))
    done = command(
        *[
            "pipeline",
            "--config",
            "pipeline.yaml",
            "--output-dir",
            "out",
            "--seed",
            "3",
            "--ppo.num-steps",
            "3",
            "--json",
        ],
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return folder, done


def test_a_pipeline_leaves_a_run_folder_a_stage_and_a_summary_of_all(whole):
    folder, done = whole
    out = folder / "out"
    summary = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((out / "summary.json").read_text()) == {k: v for k, v in summary.items() if k != "output_dir"}
    assert summary["sft"].keys() >= {"loss_before", "loss_after"}
    assert "pairwise_accuracy" in summary["reward"]
    before_and_after = {f"{name}_{when}" for name in ("score", "gold_score") for when in ("before", "after")}
    assert summary["ppo"].keys() >= before_and_after | {"kl", "stop_rate", "gold_score_std_before"}
    assert summary["seconds"].keys() >= {"sft", "reward", "ppo"}
    for name in ("config.yaml", "report.html", "sft/policy", "reward/reward_model", "ppo/policy", "ppo/metrics.jsonl"):
        assert (out / name).exists(), name
    assert "PPO raised the reward model’s score" in (out / "report.html").read_text()


def test_a_pipeline_hands_its_seed_and_each_stage_s_outcome_to_the_next(whole):
    folder, _ = whole
    settings = {stage: settings_of(folder / "out" / stage) for stage in ("sft", "reward", "ppo")}
    assert {stage["seed"] for stage in settings.values()} == {3}
    assert settings["reward"]["policy"] == "out/sft/policy"
    assert settings["reward"]["data"] == "out/comparisons.jsonl"
    assert settings["ppo"]["policy"] == "out/sft/policy"
    assert settings["ppo"]["reward"] == "out/reward/reward_model"
    assert settings["ppo"]["num_steps"] == 3
    judged = jsonl(folder / "out" / "comparisons.jsonl")
    assert len(judged) == 20
    assert all(len(row["chosen"]) >= len(row["rejected"]) for row in judged)


def test_a_pipeline_s_configuration_given_back_with_another_folder_uses_that_folder_s_models(whole, monkeypatch):
    folder, _ = whole
    monkeypatch.chdir(folder)
    shutil.rmtree("again", ignore_errors=True)
    assert main(["pipeline", "--config", "out/config.yaml", "--output-dir", "again", "--seed", "4"]) == 0
    assert settings_of("again/reward")["policy"] == "again/sft/policy"
    assert settings_of("again/reward")["data"] == "again/comparisons.jsonl"
    assert settings_of("again/ppo")["policy"] == "again/sft/policy"
    assert settings_of("again/ppo")["reward"] == "again/reward/reward_model"


def test_a_report_is_written_again_by_its_own_command(whole, monkeypatch, capfd):
    folder, _ = whole
    monkeypatch.chdir(folder)
    Path("out/report.html").unlink()
    assert main(["report", "out", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {"report": "out/report.html"}
    assert Path("out/report.html").exists()


def test_a_pipeline_trains_on_given_comparisons_without_an_annotator(models, data):
    settings = yaml.safe_load(PIPELINE.format(**models, **data, stops=list(STOPS)))
    del settings["comparisons"]
    settings["reward"]["data"] = data["rankings"]
    Path("pipeline.yaml").write_text(yaml.safe_dump(settings))
    assert main(["pipeline", "--config", "pipeline.yaml", "--output-dir", "out"]) == 0
    assert not Path("out/comparisons.jsonl").exists()
    assert settings_of("out/reward")["data"] == data["rankings"]


def test_an_annotator_is_not_asked_where_comparisons_are_given(models, data):
    settings = yaml.safe_load(PIPELINE.format(**models, **data, stops=list(STOPS)))
    settings["reward"]["data"] = data["rankings"]
    Path("pipeline.yaml").write_text(yaml.safe_dump(settings))
    assert main(["pipeline", "--config", "pipeline.yaml", "--output-dir", "out", "--ppo.num_steps", "1"]) == 0
    assert not Path("out/comparisons.jsonl").exists()
