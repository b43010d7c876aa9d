"""Tiny models, tiny files and ways to run the commands on them, for the tests of whole runs."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
import yaml
from safetensors.torch import load_file

from ppo_rlhf import compute
from ppo_rlhf.config import MissingEOS, PPOConfig
from ppo_rlhf.models import load_policy
from ppo_rlhf.rewards import RewardModel
from ppo_rlhf.settings import OptimizerSettings, PPOSettings, SamplingSettings
from ppo_rlhf.train.reward_model import classifier_from

WORDS = ["red", "blue", "green", "fish", "bird", "stone", "river", "small", "bright", "old"]
STOPS = tuple(range(2, 62))  # ids that end a response in many of these tests: an untrained model then stops by itself
CONTEXT = 64


# ----------------------------------------------------------------------------------------------------- models


def tokenizer(texts=None, *, size=300, **special):
    """size 300: two special tokens, 256 bytes, 42 merges."""
    texts = texts or [row["prompt"] + row["completion"] for row in demonstrations(60)]
    return tiny_models.make_tokenizer(texts, size=size, **special)


def model(tokens, architecture="gpt2", **options):
    return tiny_models.make_model(architecture, vocabulary=len(tokens), context=CONTEXT, spread=0.2, **options)


def save(folder, made, tokens):
    made.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return str(folder)


def make_models(folder):
    """Folders of models by name."""
    tokens = tokenizer()
    return {
        "gpt2": save(folder / "gpt2", model(tokens), tokens),
        "dropout": save(folder / "dropout", model(tokens, dropout=0.1), tokens),
        "llama": save(folder / "llama", model(tokens, "llama"), tokens),
        "pad_is_eos": save(folder / "pad_is_eos", model(tokens), tokenizer(pad=tiny_models.EOS)),
        "without_eos": save(folder / "without_eos", model(tokens), tokenizer(eos=None)),
    }


def weights_of(folder):
    """All tensors of a saved model."""
    return load_file(Path(folder) / "model.safetensors")


def same_weights(one, other):
    one, other = weights_of(one), weights_of(other)
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------------- data


def prompts(count):
    return [{"prompt": f"{WORDS[i % 10]} {WORDS[(i // 10 + i) % 10]} {i}:"} for i in range(count)]


def demonstrations(count):
    return [
        {**row, "completion": f" the {WORDS[(3 * i) % 10]} {WORDS[(7 * i + 1) % 10]} ."}
        for i, row in enumerate(prompts(count))
    ]


def comparisons(count):
    """The longer response is the better one."""
    return [
        {**row, "chosen": f" {WORDS[i % 10]} {WORDS[(i + 3) % 10]} .", "rejected": f" {WORDS[i % 10]}"}
        for i, row in enumerate(prompts(count))
    ]


def rankings(count):
    return [
        {**row, "responses": [f" {WORDS[i % 10]}", f" {WORDS[i % 10]} bird .", " stone"], "ranks": [2, 1, 2]}
        for i, row in enumerate(prompts(count))
    ]


def write_rows(path, rows):
    path = Path(path)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make_data(folder):
    """Files of rows by name."""
    return {
        "demonstrations": write_rows(folder / "demonstrations.jsonl", demonstrations(40)),
        "comparisons": write_rows(folder / "comparisons.jsonl", comparisons(40)),
        "rankings": write_rows(folder / "rankings.jsonl", rankings(40)),
        "prompts": write_rows(folder / "prompts.jsonl", prompts(40)),
    }


USER_FUNCTIONS = """
def length(prompts, responses, **columns):
    return [len(response) / 10 for response in responses]

def vowels(prompts, responses, **columns):
    return [sum(letter in "aeiou" for letter in response) for response in responses]

def annotate(prompts, responses, *, seed):
    rows = []
    for prompt, texts in zip(prompts, responses, strict=True):
        rejected, chosen = sorted(texts, key=len)[0], sorted(texts, key=len)[-1]
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows
"""


# ---------------------------------------------------------------------------------------------------- settings


def ppo_config(models, **changes):
    """PPO into `run`, a few seconds long, where every response counts by its own score."""
    settings = {
        "policy": models["gpt2"],
        "output_dir": "run",
        "num_steps": 4,
        "batch_size": 8,
        "eval_every": 0,
        "save_every": 0,
        "missing_eos": MissingEOS("none"),  # else the score of a response that is cut off does not count
        "log_with": (),
        "sampling": SamplingSettings(max_new_tokens=8, stop_token_ids=STOPS),
        "ppo": PPOSettings(num_epochs=2),
        "optimizer": OptimizerSettings(lr=1e-3, schedule="constant"),
    }
    return PPOConfig(**settings | changes)


SHORT_DEMO = (
    "--sft.num-epochs 0.1 --sft.eval-every 0 --sft.save-every 0 --comparisons.num-prompts 300 --reward.num-epochs 2 "
    "--reward.save-every 0 --reward.eval-every 0 --reward.normalization-prompts 32 --ppo.num-steps 12 "
    "--ppo.batch-size 16 --ppo.eval-every 0 --ppo.save-every 0 --ppo.max-eval-prompts 64"
)


# ----------------------------------------------------------------------------------------------------- running


def environment(**more):
    """The environment of a subprocess: one thread, no network, no trace of a launcher."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "COLUMNS": "200",
        **more,
    }


def python(*words, cwd, timeout=120, **more):
    """`python …` in a process of its own."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def command(*words, cwd, **more):
    """`python -m ppo_rlhf …` as a user types it."""
    return python("-m", "ppo_rlhf", *words, cwd=cwd, **more)


def two_processes(*words, cwd):
    """`torchrun --standalone --nproc_per_node=2 …` on CPUs."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return python(*launcher, *words, cwd=cwd, timeout=180, ACCELERATE_USE_CPU="true")


def jsonl(path):
    return [strict(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def strict(text):
    """What a strict reader makes of JSON: NaN and Infinity, which Python writes and reads, are no part of it."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON: {text}")

    return json.loads(text, parse_constant=refuse)


def metrics_of(folder):
    return jsonl(Path(folder) / "metrics.jsonl")


def metrics_of_whole_lines(folder):
    """Those of a run that was killed, perhaps in the middle of a line."""
    lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return [strict(line) for line in lines if line.endswith("\n")]


def steps_of(folder):
    return [row["step"] for row in metrics_of(folder)]


CLOCKED = ("time/", "tokens_per_second", "throughput/", "memory/")


def without_times(rows):
    """The rows without what a clock decides."""
    return [{name: value for name, value in row.items() if not name.startswith(CLOCKED)} for row in rows]


def settings_of(folder):
    return yaml.safe_load((Path(folder) / "config.yaml").read_text())


class PowerCut(Exception):
    """What ends a run in the middle."""


def metrics_in_one_go_and_in_two(config, *, cut_at):
    """The metrics of a PPO run into "whole", and of one into "parts" that was cut at a step and resumed."""
    from ppo_rlhf.train import ppo

    def cut(step, metrics):
        if step == cut_at:
            raise PowerCut

    ppo.train(replace(config, output_dir="whole"))
    with pytest.raises(PowerCut):
        ppo.train(replace(config, output_dir="parts"), callbacks=[cut])
    ppo.train(replace(config, output_dir="parts", resume=True))
    return [without_times(metrics_of(folder)) for folder in ("whole", "parts")]


# ---------------------------------------------------------------------------------------------------- fixtures


def reward_model_on(source, folder):
    """A reward model with a random head on the trunk of a saved policy. → its folder."""
    policy, tokenizer = load_policy(source, setting="policy")
    RewardModel(classifier_from(policy), tokenizer).save(Path(folder))
    return str(folder)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Every test runs in an empty folder of its own, with the user's functions in user.py; and all runs multiply alike.

    matmul_precision=auto chooses by measurement, which may differ between two runs that are compared bit for bit.
    """
    monkeypatch.setattr(compute, "_quickest_exact", lambda: ("highest", "in tests"))
    (tmp_path / "user.py").write_text(USER_FUNCTIONS)
    monkeypatch.chdir(tmp_path)
