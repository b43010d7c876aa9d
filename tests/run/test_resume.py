"""A run that was interrupted and resumed ends bit for bit where it would have ended."""

import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_runs
import torch
from tiny_runs import STOPS, PowerCut, metrics_of, same_weights, steps_of, without_times

from ppo_rlhf import compute, pipeline
from ppo_rlhf.cli import main
from ppo_rlhf.config import ComparisonConfig, MissingEOS, PipelineConfig, PPOConfig, RewardConfig, SFTConfig
from ppo_rlhf.errors import UserError
from ppo_rlhf.run import Run, matmul_precision_of, refuse_changes
from ppo_rlhf.settings import OptimizerSettings, PPOSettings, SamplingSettings
from ppo_rlhf.train import inputs, ppo, reward_model, sft

SAMPLING = SamplingSettings(max_new_tokens=6, stop_token_ids=STOPS)


def interrupt(monkeypatch, step):
    """The next run ends when it logs this step; what it logged before stays."""
    log = Run.log

    def failing(self, number, metrics):
        if number == step:
            raise PowerCut
        log(self, number, metrics)

    monkeypatch.setattr(Run, "log", failing)


def sft_config(models, data, **changes):
    return SFTConfig(
        policy=models["dropout"],
        data=data["demonstrations"],
        batch_size=4,
        eval_fraction=0.2,
        eval_every=3,
        save_every=2,
        optimizer=OptimizerSettings(lr=1e-2, schedule="cosine", warmup_steps=2, weight_decay=0.1),
        log_with=(),
        **changes,
    )


def reward_config(models, data, **changes):
    return RewardConfig(
        policy=models["dropout"],
        data=data["rankings"],
        batch_size=4,
        eval_fraction=0.2,
        eval_every=3,
        save_every=2,
        language_model_coef=0.1,
        normalization_prompts=8,
        sampling=SAMPLING,
        optimizer=OptimizerSettings(lr=1e-2, schedule="linear"),
        log_with=(),
        **changes,
    )


def ppo_config(models, data, **changes):
    return PPOConfig(
        policy=models["llama"],
        prompts=data["prompts"],
        reward="user.py:vowels",
        batch_size=8,
        num_steps=6,
        eval_every=3,
        save_every=2,
        max_eval_prompts=4,
        value_model="separate",
        kl_coef=0.2,
        kl_target=0.5,
        kl_horizon=80,
        missing_eos=MissingEOS("subtract", 0.5),
        sampling=SAMPLING,
        ppo=PPOSettings(num_epochs=2, num_minibatches=2, micro_batch_size=2),
        optimizer=OptimizerSettings(lr=1e-2),
        log_with=(),
        **changes,
    )


STAGES = {
    "sft": (sft, sft_config, "policy"),
    "reward": (reward_model, reward_config, "reward_model"),
    "ppo": (ppo, ppo_config, "policy"),
    "ppo ahead": (ppo, functools.partial(ppo_config, sample_ahead=True, overlap_scoring=3), "policy"),
}
LINES = {"sft": 9, "reward": 9, "ppo": 7, "ppo ahead": 7}  # of metrics.jsonl: step 0 and every step


def without_seconds(summary):
    return {name: value for name, value in summary.items() if name not in ("seconds", "output_dir")}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("step", [4, 6], ids=["between checkpoints", "at the last step but one evaluation"])
def test_a_resumed_run_ends_bit_for_bit_where_the_uninterrupted_one_ends(stage, step, models, data, monkeypatch):
    module, config_of, model = STAGES[stage]
    whole = module.train(config_of(models, data, output_dir="whole"))

    config = config_of(models, data, output_dir="resumed")
    with monkeypatch.context() as patch:
        interrupt(patch, step)
        with pytest.raises(PowerCut):
            module.train(config)
    assert steps_of("resumed") == list(range(step))  # one step more than the last checkpoint holds
    resumed = module.train(replace(config, resume=True))

    assert steps_of("whole") == list(range(LINES[stage]))
    assert without_times(metrics_of("resumed")) == without_times(metrics_of("whole"))
    assert same_weights(f"resumed/{model}", f"whole/{model}")
    assert without_seconds(resumed) == without_seconds(whole)
    assert Path("resumed/samples.jsonl").read_bytes() == Path("whole/samples.jsonl").read_bytes()
    if module is ppo:
        coefs = {row["kl_coef"] for row in metrics_of("whole") if "kl_coef" in row}
        assert len(coefs) == 6  # the adapted coefficient was part of what had to be resumed


@pytest.fixture
def measured(monkeypatch):
    """What `auto` finds to be quickest: the list's one entry."""
    found, before = ["highest"], torch.get_float32_matmul_precision()
    monkeypatch.setattr(compute, "_quickest_exact", lambda: (found[0], "measured"))
    yield found
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_multiplies_as_it_began_from_its_first_product_on(stage, measured, models, data, monkeypatch):
    module, config_of, _ = STAGES[stage]
    measured[:] = ["medium"]
    used = set()

    def loading(*arguments, **options):
        used.add(torch.get_float32_matmul_precision())
        return load(*arguments, **options)

    load = inputs.load_policy
    config = config_of(models, data, output_dir="out")
    with monkeypatch.context() as patch:
        interrupt(patch, 4)
        with pytest.raises(PowerCut):
            module.train(config)
    measured[:] = ["highest"]
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(inputs, "load_policy", loading)
    module.train(replace(config, resume=True), callbacks=[lambda *_: used.add(torch.get_float32_matmul_precision())])
    assert used == {"medium"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_interrupted_before_its_first_checkpoint_starts_again_and_logs_no_step_twice(
    stage, models, data, monkeypatch
):
    module, config_of, _ = STAGES[stage]
    config = config_of(models, data, output_dir="out")
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        with pytest.raises(PowerCut):
            module.train(config)
    module.train(replace(config, resume=True))
    assert steps_of("out") == list(range(LINES[stage]))
    rows = [(row["step"], row["kind"], row["prompt"]) for row in tiny_runs.jsonl("out/samples.jsonl")]
    assert len(rows) == len(set(rows))


def test_a_killed_process_is_resumed_bit_for_bit(models, data):
    def words(folder):
        return (
            f"sft --policy {models['dropout']} --data {data['demonstrations']} --batch-size 4 --eval-fraction 0.2 "
            f"--num-epochs 15 --save-every 3 --eval-every 50 --optimizer.lr 0.01 --matmul-precision highest "
            f"--output-dir {folder}"
        ).split()

    process = subprocess.Popen(
        [sys.executable, "-m", "ppo_rlhf", *words("killed")], env=tiny_runs.environment(), stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not Path("killed/checkpoints/step_000003").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path("killed/summary.json").exists()

    assert main([*words("killed"), "--resume"]) == 0
    assert main(words("whole")) == 0
    assert steps_of("killed") == list(range(121))
    assert without_times(metrics_of("killed")) == without_times(metrics_of("whole"))
    assert same_weights("killed/policy", "whole/policy")


def test_resume_starts_where_there_is_nothing_yet(models, data):
    config = sft_config(models, data, output_dir="out", resume=True)
    sft.train(config)
    sft.train(replace(config, output_dir="plain", resume=False))
    assert metrics_of("out") == metrics_of("plain")
    assert same_weights("out/policy", "plain/policy")


def test_resuming_a_finished_run_says_so_and_changes_nothing(models, data, capfd):
    sft.train(sft_config(models, data, output_dir="out"))
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    capfd.readouterr()
    assert main(["sft", "--resume", "--output-dir", "out"]) == 0
    assert "finished already" in capfd.readouterr().out
    assert main(["sft", "--resume", "--output-dir", "out", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {"finished": "out"}
    assert before == {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}


@pytest.mark.parametrize("words", [["--output-dir", "out", "--resume"], ["--resume", "--output_dir=out"]])
def test_resume_needs_no_more_than_the_folder(words, models, data, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 4)
        with pytest.raises(PowerCut):
            sft.train(sft_config(models, data, output_dir="out"))
    assert main(["sft", *words]) == 0
    assert steps_of("out") == list(range(LINES["sft"]))


@pytest.fixture
def interrupted(models, data, monkeypatch):
    """An SFT run in `out` with checkpoints at steps 2 and 4; → its configuration, to be resumed."""
    config = sft_config(models, data, output_dir="out")
    with monkeypatch.context() as patch:
        interrupt(patch, 6)
        with pytest.raises(PowerCut):
            sft.train(config)
    return replace(config, resume=True)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (
            "optimizer.lr",
            {"optimizer": OptimizerSettings(lr=2e-2, schedule="cosine", warmup_steps=2, weight_decay=0.1)},
        ),
        ("seed", {"seed": 1}),
        ("batch_size", {"batch_size": 8}),
        ("data", {"data": "other.jsonl"}),
    ],
)
def test_a_resumed_run_refuses_other_training_by_name(name, change, interrupted, data):
    Path("other.jsonl").write_bytes(Path(data["demonstrations"]).read_bytes())
    before = metrics_of("out")
    with pytest.raises(UserError, match=f"with {name}="):
        sft.train(replace(interrupted, **change))
    assert metrics_of("out") == before
    assert tiny_runs.settings_of("out")["seed"] == 0


def test_a_resumed_run_may_be_longer(interrupted):
    sft.train(replace(interrupted, num_epochs=2.0, keep_checkpoints=3, save_every=5, eval_every=4))
    assert steps_of("out") == list(range(17))
    assert tiny_runs.settings_of("out")["num_epochs"] == 2.0


def damage(checkpoint, how):
    weights = checkpoint / "model.safetensors"
    if how == "a flipped byte":
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    elif how == "a cut file":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "a missing file":
        weights.unlink()
    elif how == "an empty optimizer":
        (checkpoint / "optimizer.bin").write_bytes(b"")
    elif how == "no manifest":
        (checkpoint / "manifest.json").unlink()
    else:
        (checkpoint / "manifest.json").write_text('{"model')


HOWS = ["a flipped byte", "a cut file", "a missing file", "an empty optimizer", "no manifest", "a cut manifest"]


@pytest.mark.parametrize("how", HOWS)
def test_the_checkpoint_before_a_damaged_one_is_used_and_this_is_said(how, interrupted, capfd):
    sft.train(replace(interrupted, output_dir="whole", resume=False))
    damage(Path("out/checkpoints/step_000004"), how)
    capfd.readouterr()
    sft.train(interrupted)
    captured = capfd.readouterr()
    assert "step_000004 is damaged" in captured.out + captured.err
    assert metrics_of("out") == metrics_of("whole")
    assert same_weights("out/policy", "whole/policy")


def test_a_damaged_checkpoint_is_told_of_on_stderr_so_that_json_stays_alone(interrupted, capfd):
    damage(Path("out/checkpoints/step_000004"), "a cut file")
    capfd.readouterr()
    assert main(["sft", "--resume", "--output-dir", "out", "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["output_dir"] == "out"
    assert "step_000004 is damaged" in captured.err


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_keeps_what_it_measured(interrupted):
    measured = Path("out/metrics.jsonl").read_bytes()
    for checkpoint in Path("out/checkpoints").iterdir():
        damage(checkpoint, "a cut file")
    with pytest.raises(UserError, match="every checkpoint in out/checkpoints is damaged"):
        sft.train(interrupted)
    assert Path("out/metrics.jsonl").read_bytes() == measured
    shutil.rmtree("out/checkpoints")
    sft.train(interrupted)
    sft.train(replace(interrupted, output_dir="whole", resume=False))
    assert metrics_of("out") == metrics_of("whole")


def test_a_damaged_checkpoint_never_displaces_a_good_one(models, data, monkeypatch):
    config = sft_config(models, data, output_dir="out", keep_checkpoints=2)
    with monkeypatch.context() as patch:
        interrupt(patch, 6)
        with pytest.raises(PowerCut):
            sft.train(config)
    damage(Path("out/checkpoints/step_000004"), "a cut file")
    with monkeypatch.context() as patch:
        interrupt(patch, 4)
        with pytest.raises(PowerCut):
            sft.train(replace(config, resume=True, save_every=1, keep_checkpoints=1))
    assert [path.name for path in Path("out/checkpoints").iterdir()] == ["step_000003"]


def test_a_run_that_ended_between_its_last_step_and_its_summary_is_finished_by_resume(models, data, monkeypatch):
    for stage, (module, config_of, model) in STAGES.items():
        config = config_of(models, data, output_dir=stage)
        with monkeypatch.context() as patch:
            patch.setattr(Run, "finish", lambda *_: (_ for _ in ()).throw(PowerCut))
            with pytest.raises(PowerCut):
                module.train(config)
        weights = tiny_runs.weights_of(f"{stage}/{model}")
        module.train(replace(config, resume=True))
        assert Path(stage, "summary.json").exists()
        assert steps_of(stage) == list(range(LINES[stage]))
        assert all(weights[name].equal(value) for name, value in tiny_runs.weights_of(f"{stage}/{model}").items())


def pipeline_config(models, data):
    return PipelineConfig(
        output_dir="out",
        sft=replace(sft_config(models, data), num_epochs=0.5),
        comparisons=ComparisonConfig(
            prompts=data["prompts"], annotator="user.py:annotate", num_prompts=12, sampling=SAMPLING
        ),
        reward=replace(reward_config(models, data), policy=None, data=None),
        ppo=replace(ppo_config(models, data), policy=None, reward=None, num_steps=3),
    )


@pytest.fixture
def cut_pipeline(models, data, monkeypatch):
    """A pipeline in `out` that ended in its reward stage; → its configuration, to be resumed."""
    config = pipeline_config(models, data)
    with monkeypatch.context() as patch:
        train = reward_model.train

        def cut(*arguments, **options):
            interrupt(patch, 2)
            return train(*arguments, **options)

        patch.setattr(reward_model, "train", cut)
        with pytest.raises(PowerCut):
            pipeline.run(config)
    return replace(config, resume=True)


def test_a_resumed_pipeline_samples_its_comparisons_as_its_policy_was_trained(measured, models, data, monkeypatch):
    used = []

    def sampling(*arguments, **options):
        used.append(torch.get_float32_matmul_precision())
        raise PowerCut

    monkeypatch.setattr(pipeline, "sample", sampling)
    config = pipeline_config(models, data)
    for measured[0], resume in (("medium", False), ("highest", True)):
        torch.set_float32_matmul_precision("highest")
        with pytest.raises(PowerCut):
            pipeline.run(replace(config, resume=resume))
    assert used == ["medium", "medium"]


def test_a_process_without_a_prompt_to_compare_samples_nothing_and_asks_nobody(models, data, monkeypatch):
    third = SimpleNamespace(
        num_processes=3, process_index=2, is_main_process=False, device=torch.device("cpu"), wait_for_everyone=list
    )
    seen = []
    monkeypatch.setattr(pipeline, "make_accelerator", lambda *_, **__: third)
    monkeypatch.setattr(pipeline, "gathered", lambda pairs: seen.append(pairs) or pairs)
    monkeypatch.setattr(pipeline, "call", None)
    config = pipeline_config(models, data)
    tokenizer = tiny_runs.tokenizer()
    tiny_runs.save(Path("out/sft/policy"), tiny_runs.model(tokenizer), tokenizer)
    pipeline.compare(replace(config, comparisons=replace(config.comparisons, num_prompts=2)), Path("out"))
    assert seen == [[]]


def test_how_another_kind_of_machine_multiplied_is_no_rule(tmp_path):
    (tmp_path / "environment.json").write_text('{"device": "cuda:0", "matmul_precision": "medium"}')
    assert matmul_precision_of(tmp_path, "auto", torch.device("cpu")) == "auto"
    assert matmul_precision_of(tmp_path, "auto", torch.device("cuda")) == "medium"
    assert matmul_precision_of(tmp_path, "high", torch.device("cuda")) == "high"


@pytest.mark.parametrize("content", ["{", "[]", '"run"', "{}", '{"device": 3}', '{"device": "abacus"}'])
def test_an_environment_that_no_run_wrote_is_named(content, tmp_path):
    (tmp_path / "environment.json").write_text(content)
    with pytest.raises(UserError, match=r"environment\.json cannot be read"):
        matmul_precision_of(tmp_path, "auto", torch.device("cpu"))


def test_a_pipeline_that_was_interrupted_skips_its_finished_stages(cut_pipeline, capfd):
    judged = Path("out/comparisons.jsonl").read_bytes()
    finished = {path: path.stat().st_mtime_ns for path in Path("out/sft").rglob("*")}
    resumed = pipeline.run(cut_pipeline)
    assert {path: path.stat().st_mtime_ns for path in Path("out/sft").rglob("*")} == finished
    assert Path("out/comparisons.jsonl").read_bytes() == judged

    whole = pipeline.run(replace(cut_pipeline, output_dir="whole"))
    assert Path("whole/comparisons.jsonl").read_bytes() == judged
    assert same_weights("out/ppo/policy", "whole/ppo/policy")
    assert resumed["ppo"] == whole["ppo"]
    capfd.readouterr()
    assert main(["pipeline", "--resume", "--output-dir", "out"]) == 0
    assert "finished already" in capfd.readouterr().out


CHANGES_TOO_LATE = {
    "a setting of a finished stage": ("sft.optimizer.lr", "0.01, not 0.5", "--sft.optimizer.lr 0.5"),
    "the length of a finished stage": ("sft.num_epochs", "0.5, not 2.0", "--sft.num-epochs 2"),
    "a setting of a stage that was begun": ("reward.batch_size", "4, not 8", "--reward.batch_size 8"),
    "a setting of the comparisons that were made": (
        "comparisons.num_prompts",
        "12, not 9",
        "--comparisons.num_prompts=9",
    ),
    "the seed": ("seed", "0, not 1", "--seed 1"),
}


@pytest.mark.parametrize("change", CHANGES_TOO_LATE)
def test_a_resumed_pipeline_refuses_by_name_what_would_change_a_stage_that_was_run(change, cut_pipeline, capfd):
    name, values, words = CHANGES_TOO_LATE[change]
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    capfd.readouterr()
    assert main(["pipeline", "--resume", "--output-dir", "out", *words.split()]) == 2
    told = capfd.readouterr().err
    assert len(told.splitlines()) == 1
    assert f"was started with {name}={values}: " in told
    assert before == {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}


OWN = {"name": "mine.py:mine", "arguments": {"weight": 2}}


@pytest.mark.parametrize(
    ("before", "now", "name"),
    [
        ({"advantage": "gae"}, {"advantage": OWN}, "advantage"),
        ({"advantage": OWN}, {"advantage": "gae"}, "advantage"),
        ({"reward_shaping": None}, {"reward_shaping": OWN}, "reward_shaping"),
        ({"advantage": OWN}, {"advantage": {**OWN, "arguments": {}}}, "advantage.arguments"),
        ({"environment": {"env_kwargs": {"g": 9}}}, {"environment": {"env_kwargs": {}}}, "environment.env_kwargs"),
    ],
)
def test_a_resumed_run_refuses_another_function_and_other_arguments(before, now, name):
    with pytest.raises(UserError, match=f"was started with {name}="):
        refuse_changes(Path("out"), before, now)


def test_a_resumed_run_may_have_settings_that_it_was_started_without():
    refuse_changes(Path("out"), {"ppo": {"num_epochs": 2}}, {"ppo": {"num_epochs": 2, "new": 1}, "value_lr": None})


def test_a_resumed_pipeline_may_change_a_stage_that_was_not_begun(cut_pipeline):
    words = "--ppo.kl_coef 0.1 --ppo.num_steps 1 --reward.num_epochs 0.5 --sft.keep_checkpoints 1"
    assert main(["pipeline", "--resume", "--output-dir", "out", *words.split()]) == 0
    assert tiny_runs.settings_of("out/ppo")["kl_coef"] == 0.1
    assert steps_of("out/ppo") == [0, 1]


def test_a_finished_pipeline_refuses_other_settings_too(cut_pipeline, capfd):
    pipeline.run(cut_pipeline)
    assert main(["pipeline", "--resume", "--output-dir", "out", "--ppo.num_steps", "5"]) == 2
    assert "out/ppo was started with ppo.num_steps=3, not 5: " in capfd.readouterr().err


def test_a_pipeline_interrupted_in_its_first_stage_is_resumed_by_its_folder_alone(models, data, monkeypatch):
    Path("pipeline.yaml").write_text(
        f"""
sft: {{policy: {models["gpt2"]}, data: {data["demonstrations"]}, batch_size: 4, eval_fraction: 0.2, save_every: 2}}
reward: {{data: {data["comparisons"]}, batch_size: 4, eval_fraction: 0.2, normalization_prompts: 4, num_epochs: 0.2,
          sampling: {{max_new_tokens: 4}}}}
ppo: {{prompts: {data["prompts"]}, num_steps: 1, batch_size: 4, max_eval_prompts: 4, sampling: {{max_new_tokens: 4}}}}
"""
    )
    with monkeypatch.context() as patch:
        interrupt(patch, 4)
        with pytest.raises(PowerCut):
            main(["pipeline", "--config", "pipeline.yaml", "--output-dir", "out"])
    assert main(["pipeline", "--resume", "--output-dir", "out"]) == 0
    assert json.loads(Path("out/summary.json").read_text())["ppo"]
