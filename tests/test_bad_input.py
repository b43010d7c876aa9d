"""Users' mistakes: exit code 2, one line that names the thing, no traceback, and nothing left on disk."""

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny_models
import tiny_runs
import torch
from refusals import refusal
from tiny_runs import data, in_tmp_path, models, write_rows

from ppo_rlhf.cli import main

__all__ = ["data", "in_tmp_path", "models"]

USER = """
import math

def length(prompts, responses, **columns):
    return [float(len(response)) for response in responses]

def nan(prompts, responses, **columns):
    return [math.nan] * len(responses)

def infinite(prompts, responses, **columns):
    return [math.inf] * len(responses)

def none(prompts, responses, **columns):
    return None

def nones(prompts, responses, **columns):
    return [None] * len(responses)

def too_few(prompts, responses, **columns):
    return [1.0] * (len(responses) - 1)

def number(prompts, responses, **columns):
    return 1.0

def one(prompts, responses, **columns):
    return [1.0] * len(responses)

def strings(prompts, responses, **columns):
    return ["good"] * len(responses)

def raises(prompts, responses, **columns):
    raise RuntimeError("the judge is ill")

def raises_over_lines(prompts, responses, **columns):
    raise RuntimeError("the judge\\nis very\\nill")

def table(prompts, responses, **columns):
    import numpy
    return numpy.ones((len(responses), 2))

def huge(prompts, responses, **columns):
    return [10**400] * len(responses)

def tensor_table(prompts, responses, **columns):
    import torch
    return torch.ones(len(responses), 2)

def complex_tensor(prompts, responses, **columns):
    import torch
    return 1j * torch.ones(len(responses))

def by_name(prompts, responses, **columns):
    return {response: 1.0 for response in responses}

def text(prompts, responses, **columns):
    return "1" * len(responses)

def two_arguments(prompts, responses):
    return [1.0] * len(responses)

def leaves(prompts, responses, **columns):
    raise SystemExit(3)

not_a_function = 3

def leaving():
    raise SystemExit(3)

def failing():
    raise FileNotFoundError("no such disk")

def failing_midway():
    yield {"prompt": "a", "completion": " b"}
    raise FileNotFoundError("no such disk")
"""


def damaged(folder, source, change):
    """A copy of a model's folder; change(folder) harms it."""
    shutil.copytree(source, folder)
    change(folder)
    return str(folder)


def cut_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def another_width(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_embd": 2 * config["n_embd"]}))


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


DAMAGES = {
    "cut_weights": cut_weights,
    "no_weights": lambda folder: (folder / "model.safetensors").unlink(),
    "another_width": another_width,
    "no_config": lambda folder: (folder / "config.json").unlink(),
    "broken_config": lambda folder: (folder / "config.json").write_text('{"model_type": '),
    "unknown_type": lambda folder: (folder / "config.json").write_text('{"model_type": "abacus"}'),
    "no_tokenizer": without_tokenizer,
    "broken_tokenizer": lambda folder: (folder / "tokenizer.json").write_text('{"model": '),
}


@pytest.fixture(scope="session")
def bad_models(models, tmp_path_factory):
    """Folders of models that cannot be used, by what is wrong with them."""
    folder = tmp_path_factory.mktemp("bad")
    made = {name: damaged(folder / name, models["gpt2"], change) for name, change in DAMAGES.items()}
    tokens = tiny_runs.tokenizer(size=280)
    made["small_vocabulary"] = tiny_runs.save(folder / "small_vocabulary", tiny_runs.model(tokens), tokens)
    made["two_outputs"] = reward_model_of(folder / "two_outputs", tiny_runs.tokenizer(), num_labels=2)
    return made


@pytest.fixture
def paths(models, data, bad_models, tmp_path):
    """What the command lines below name in braces."""
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "broken.py").write_text("def length(:\n")
    (tmp_path / "raises.py").write_text("raise OSError('no disk')\n")
    (tmp_path / "script.py").write_text("def length(): ...\nraise SystemExit(0)\n")
    write_rows("bonus.jsonl", [{**row, "bonus": 1} for row in tiny_runs.prompts(20)])
    return models | data | bad_models


def reward_model_of(folder, tokens, *, num_labels=1):
    """A reward model with this tokenizer."""
    from transformers import GPT2ForSequenceClassification

    config = tiny_runs.model(tokens).config
    config.num_labels = num_labels
    config.pad_token_id = 1
    return tiny_runs.save(folder, GPT2ForSequenceClassification(config), tokens)


def refused(capfd, words, output="out"):
    """The one line by which a command refuses; nothing but it may be left behind."""
    existed = os.path.exists(output)
    line = refusal(main, words, capfd)
    assert existed or not os.path.exists(output)
    return line


STAGES = {
    "sft": "sft --policy {gpt2} --data {demonstrations} --batch-size 4 --eval-fraction 0.2",
    "reward": "reward --policy {gpt2} --data {comparisons} --batch-size 4 --eval-fraction 0.2 "
    "--normalization-prompts 4 --sampling.max-new-tokens 4",
    "ppo": "ppo --policy {gpt2} --prompts {prompts} --reward user.py:length --batch-size 4 --num-steps 1 "
    "--sampling.max-new-tokens 4 --max-eval-prompts 4",
}


def words_of(line, paths, output="out"):
    """The words of a command line; `sft`, `reward` or `ppo` at its start stands for that whole command."""
    stage, _, rest = line.partition(" ")
    words = [word.format(**paths) for word in STAGES.get(stage, stage).split()] if stage else []
    words += [word.replace("{~}", " ").format(**paths) for word in rest.split()]
    return [*words, "--output-dir", output]


# ---------------------------------------------------------------------------------------------- settings

COMMAND_LINES = [
    # unknown settings
    ("sft --batch_sice 3", ["batch_sice", "batch_size"]),
    ("sft --batch-sice 3", ["batch_sice", "batch_size"]),
    ("sft --optimizer.learning_rat 3", ["optimizer.learning_rat"]),
    ("ppo --ppo.clip-rang 0.1", ["ppo.clip_rang", "ppo.clip_range"]),
    ("ppo --sampling.temprature 1", ["sampling.temprature", "sampling.temperature"]),
    ("ppo --missing_eos.rul set", ["missing_eos.rul", "missing_eos.rule"]),
    # abbreviations
    ("sft --batch 4", ["batch"]),
    ("sft --num_ep 1", ["num_ep"]),
    ("ppo --sampling.temp 1", ["sampling.temp"]),
    # types
    ("sft --batch_size four", ["batch_size", "four"]),
    ("sft --batch_size 4.5", ["batch_size", "4.5"]),
    ("sft --optimizer.lr fast", ["optimizer.lr", "fast"]),
    ("sft --keep_best maybe", ["keep_best", "maybe"]),
    ("sft --resume maybe", ["maybe"]),
    ("sft --precision fp8", ["precision", "fp8"]),
    ("sft --optimizer.schedule step", ["optimizer.schedule", "step"]),
    ("ppo --value_model own", ["value_model", "own"]),
    ("ppo --missing_eos.rule drop", ["missing_eos.rule", "drop"]),
    ("sft --eval_every null", ["eval_every", "None"]),
    ("sft --seed null", ["seed", "None"]),
    ("sft --optimizer.lr null", ["optimizer.lr", "None"]),
    ("sft --optimizer null", ["optimizer"]),
    ("sft --resume null", ["null"]),
    ("sft --batch_size [4]", ["batch_size"]),
    ("sft --batch_size {{}}", ["batch_size"]),
    ("sft --batch_size 1e400", ["batch_size"]),
    ("sft --seed 4294967296", ["seed=4294967296"]),
    ("sft --eval_fraction .nan", ["eval_fraction"]),
    ("sft --matmul_precision best", ["matmul_precision", "best"]),
    ("ppo --sampling.temperature .nan", ["sampling.temperature=nan"]),
    ("ppo --sampling.temperature .inf", ["sampling.temperature=inf"]),
    ("ppo --kl_coef .inf", ["kl_coef=inf"]),
    ("ppo --ppo.entropy_coef .nan", ["ppo.entropy_coef=nan"]),
    ("ppo --ppo.value_coef .inf", ["ppo.value_coef=inf"]),
    ("ppo --missing_eos.value .nan", ["missing_eos.value=nan"]),
    ("sft --optimizer.lr .inf", ["optimizer.lr=inf"]),
    ("sft --optimizer.weight_decay .inf", ["optimizer.weight_decay=inf"]),
    ("reward --language_model_coef .inf", ["language_model_coef=inf"]),
    ("ppo --kl_horizon .nan", ["kl_horizon=nan"]),
    ("ppo --sampling.stop_strings 3", ["stop_strings"]),
    ("ppo --sampling.cached_tokens 0", ["sampling.cached_tokens=0"]),
    ("ppo --frozen_precision fp8", ["frozen_precision", "fp8"]),
    ("ppo --ppo null", ["ppo"]),
    ("ppo --sampling.stop_token_ids a", ["stop_token_ids"]),
    ("ppo --ppo.num_epochs null", ["ppo.num_epochs"]),
    ("sft --optimizer 3", ["optimizer"]),
    # ranges
    ("sft --num_epochs 0", ["num_epochs=0"]),
    ("sft --num_epochs -1", ["num_epochs=-1"]),
    ("sft --num_epochs .inf", ["num_epochs"]),
    ("sft --num_epochs .nan", ["num_epochs"]),
    ("sft --batch_size 0", ["batch_size=0"]),
    ("sft --micro_batch_size 0", ["micro_batch_size=0"]),
    ("sft --max_grad_norm 0", ["max_grad_norm=0"]),
    ("sft --max_length 0", ["max_length"]),
    ("sft --eval_fraction 0", ["eval_fraction=0"]),
    ("sft --eval_fraction 1", ["eval_fraction=1"]),
    ("sft --eval_every -1", ["eval_every=-1"]),
    ("sft --save_every -1", ["save_every=-1"]),
    ("sft --keep_checkpoints 0", ["keep_checkpoints=0"]),
    ("sft --seed -1", ["seed"]),
    ("sft --optimizer.lr 0", ["optimizer.lr=0"]),
    ("sft --optimizer.lr .nan", ["optimizer.lr=nan"]),
    ("sft --optimizer.beta1 1", ["optimizer.beta1=1"]),
    ("sft --optimizer.beta2 -0.1", ["optimizer.beta2=-0.1"]),
    ("sft --optimizer.epsilon 0", ["optimizer.epsilon=0"]),
    ("sft --optimizer.weight_decay -1", ["optimizer.weight_decay=-1"]),
    ("sft --optimizer.warmup_steps -1", ["optimizer.warmup_steps=-1"]),
    ("reward --normalization_prompts 1", ["normalization_prompts"]),
    ("reward --language_model_coef -1", ["language_model_coef=-1"]),
    ("ppo --num_steps 0", ["num_steps=0"]),
    ("ppo --batch_size 0", ["batch_size=0"]),
    ("ppo --kl_coef -0.1", ["kl_coef=-0.1"]),
    ("ppo --kl_coef .nan", ["kl_coef=nan"]),
    ("ppo --kl_target 0", ["kl_target=0"]),
    ("ppo --kl_target 6 --kl_coef 0", ["kl_target=6", "kl_coef"]),
    ("ppo --kl_horizon 2", ["kl_horizon=2", "batch_size=4"]),
    ("ppo --gamma 1.1", ["gamma=1.1"]),
    ("ppo --gae_lambda -0.1", ["gae_lambda=-0.1"]),
    ("ppo --max_eval_prompts 0", ["max_eval_prompts=0"]),
    ("ppo --eval_fraction 1.5", ["eval_fraction=1.5"]),
    ("ppo --missing_eos.rule subtract --missing_eos.value -1", ["missing_eos.value=-1"]),
    ("ppo --sampling.temperature 0", ["sampling.temperature=0"]),
    ("ppo --sampling.max_new_tokens 0", ["sampling.max_new_tokens=0"]),
    ("ppo --sampling.top_k -1", ["sampling.top_k=-1"]),
    ("ppo --sampling.top_p 0", ["sampling.top_p=0"]),
    ("ppo --sampling.top_p 1.1", ["sampling.top_p=1.1"]),
    ("ppo --ppo.num_epochs 0", ["ppo.num_epochs=0"]),
    ("ppo --ppo.num_minibatches 0", ["ppo.num_minibatches=0"]),
    ("ppo --ppo.clip_range 0", ["ppo.clip_range=0"]),
    ("ppo --ppo.value_clip_range -1", ["ppo.value_clip_range=-1"]),
    ("ppo --ppo.dual_clip 1", ["ppo.dual_clip=1"]),
    ("ppo --ppo.target_kl 0", ["ppo.target_kl=0"]),
    ("ppo --ppo.value_coef -1", ["ppo.value_coef=-1"]),
    ("ppo --ppo.micro_batch_size 0", ["ppo.micro_batch_size=0"]),
    ("ppo --ppo.num_minibatches 3", ["batch_size=4", "num_minibatches=3"]),
    # sizes against the data
    ("sft --batch_size 33", ["batch_size=33", "32"]),
    ("reward --batch_size 33", ["batch_size=33", "32"]),
    ("ppo --batch_size 37", ["batch_size=37", "36"]),
    ("sft --eval_fraction 0.001", ["eval_fraction=0.001", "40 prompts"]),
    ("reward --eval_fraction 0.999", ["eval_fraction=0.999"]),
    ("ppo --eval_fraction 0.001", ["eval_fraction=0.001"]),
    # sizes against the model's context of 64
    ("ppo --sampling.max_new_tokens 64", ["max_new_tokens=64"]),
    ("ppo --sampling.max_new_tokens 60", ["prompt 0", "max_new_tokens"]),
    ("reward --sampling.max_new_tokens 64", ["max_new_tokens"]),
    ("sft --max_length 3", ["demonstration", "max_length"]),
    # what is not set
    ("sft --data null", ["data is not set"]),
    ("reward --data null", ["data is not set"]),
    ("reward --policy null", ["policy is not set"]),
    ("ppo --policy null", ["policy is not set"]),
    ("ppo --reward null", ["reward is not set"]),
    ("ppo --prompts null", ["prompts is not set"]),
    # models
    ("sft --policy ./nowhere", ["policy", "./nowhere"]),
    ("sft --policy models/nowhere", ["policy", "models/nowhere"]),
    ("sft --policy .", ["policy", "."]),
    ("ppo --reference ./nowhere", ["reference", "./nowhere"]),
    ("ppo --reward ./nowhere", ["reward", "./nowhere"]),
    ("sft --policy {without_eos}", ["policy", "eos"]),
    ("reward --policy {without_eos}", ["policy", "eos"]),
    ("ppo --policy {without_eos}", ["policy", "eos"]),
    ("sft --policy {cut_weights}", ["policy", "cut_weights"]),
    ("sft --policy {no_weights}", ["policy", "no_weights"]),
    ("sft --policy {another_width}", ["policy", "another_width"]),
    ("sft --policy {no_config}", ["policy", "no_config"]),
    ("sft --policy {broken_config}", ["policy", "broken_config"]),
    ("sft --policy {unknown_type}", ["policy", "unknown_type"]),
    ("sft --policy {no_tokenizer}", ["policy", "no_tokenizer", "tokenizer"]),
    ("sft --policy {broken_tokenizer}", ["policy", "broken_tokenizer"]),
    ("ppo --reference {small_vocabulary}", ["reference", "vocabulary"]),
    ("ppo --reference {another_width}", ["reference", "another_width"]),
    ("ppo --reward {two_outputs}", ["reward", "two_outputs"]),
    ("ppo --sampling.stop_token_ids [5,300]", ["stop_token_ids", "300 is not an id", "300 tokens"]),
    ("ppo --sampling.stop_token_ids [-1]", ["stop_token_ids", "-1"]),
    ("reward --sampling.stop_token_ids [300]", ["stop_token_ids", "300"]),
    ("ppo --reward {gpt2}", ["reward", "gpt2", "score.weight", "ppo-rlhf reward"]),
    ("ppo --gold {gpt2}", ["gold", "gpt2", "score.weight", "ppo-rlhf reward"]),
    ("ppo --reward {cut_weights}", ["reward", "cut_weights"]),
    ("ppo --reward {no_tokenizer}", ["reward", "no_tokenizer"]),
    ("ppo --reward {without_eos}", ["reward", "eos"]),
    ("ppo --gold {two_outputs}", ["gold", "two_outputs"]),
    ("sft --policy user:no_such", ["user:no_such"]),
    ("sft --policy user.py:failing", ["user.py:failing"]),
    ("sft --policy user.py:length", ["user.py:length"]),
    ("sft --policy user.py:failing", ["user.py:failing", "FileNotFoundError", "no such disk"]),
    ("sft --data user.py:failing", ["user.py:failing", "FileNotFoundError", "no such disk"]),
    ("sft --data user.py:failing_midway", ["user.py:failing_midway", "no such disk"]),
    ("ppo --prompts user.py:failing", ["user.py:failing", "no such disk"]),
    # reward functions
    ("ppo --reward user.py:nan", ["nan", "reward function nan"]),
    ("ppo --reward user.py:infinite", ["infinite", "inf"]),
    ("ppo --reward user.py:none", ["none", "None"]),
    ("ppo --reward user.py:nones", ["nones", "None"]),
    ("ppo --reward user.py:number", ["number", "1.0"]),
    ("ppo --reward user.py:too_few", ["too_few", "3 scores for 4 responses"]),
    ("ppo --reward user.py:strings", ["strings", "good"]),
    ("ppo --reward user.py:raises", ["raises", "RuntimeError", "the judge is ill"]),
    ("ppo --reward user.py:raises_over_lines", ["raises_over_lines", "ill"]),
    ("ppo --reward user.py:table", ["table"]),
    ("ppo --reward user.py:huge", ["huge"]),
    ("ppo --reward user.py:tensor_table", ["tensor_table"]),
    ("ppo --reward user.py:complex_tensor", ["complex_tensor"]),
    ("ppo --reward user.py:by_name", ["by_name"]),
    ("ppo --reward user.py:text", ["text", "1111"]),
    ("ppo --reward user.py:two_arguments --prompts bonus.jsonl", ["two_arguments", "bonus"]),
    ("ppo --score_shaping.normalize reference --reward user.py:one", ["normalize=reference", "all 1", "running"]),
    ("ppo --reward user.py:leaves", ["leaves", "SystemExit"]),
    ("ppo --reward user.py:lenght", ["user.py", "lenght", "Did you mean length?"]),
    ("ppo --reward nobody.py:length", ["nobody.py"]),
    ("ppo --reward nobody.rewards:length", ["nobody.rewards:length"]),
    ("ppo --reward broken.py:length", ["broken.py", "SyntaxError"]),
    ("ppo --reward raises.py:length", ["raises.py", "no disk"]),
    ("ppo --reward script.py:length", ["script.py", "SystemExit"]),
    ("ppo --prompts user.py:leaving", ["user.py:leaving", "SystemExit"]),
    ("ppo --reward user.py:not_a_function", ["user.py:not_a_function", "int"]),
    ("ppo --gold user.py:nan", ["nan"]),
    ("reward --gold user.py:raises", ["raises", "the judge is ill"]),
    ("reward --gold user.py:lenght", ["Did you mean length?"]),
    ("reward --gold ./nowhere", ["gold", "./nowhere"]),
    # the rest
    ("sft --log_with tensorbord", ["log_with", "tensorbord"]),
    ("sft --log_with [tensorbord]", ["log_with", "tensorbord", "tensorboard"]),
    ("ppo --log_with [nothing]", ["log_with", "nothing"]),
    ("sft extra", ["extra"]),
    ("sft --config nowhere.yaml", ["nowhere.yaml"]),
    ("sft --config .", ["config"]),
    ("stf", ["stf", "sft"]),
    ("pipeline --sft.batch_sice 4", ["sft.batch_sice", "sft.batch_size"]),
    ("pipeline --ppo.ppo.clip_rang 4", ["ppo.ppo.clip_rang", "ppo.ppo.clip_range"]),
    ("pipeline --comparisons.num_prompts 0", ["comparisons.num_prompts=0"]),
    ("pipeline --comparisons.responses_per_prompt 1", ["comparisons.responses_per_prompt=1"]),
    ("pipeline --comparisons.annotator user.py:nobody", ["user.py:nobody"]),
    ("pipeline --comparisons.annotator nobody.py:annotate", ["nobody.py"]),
]


@pytest.mark.parametrize(("line", "named"), COMMAND_LINES, ids=[line for line, _ in COMMAND_LINES])
def test_a_mistake_on_the_command_line_is_named_in_one_line(line, named, paths, capfd):
    told = refused(capfd, words_of(line, paths))
    for name in named:
        assert name in told


@pytest.mark.skipif(torch.accelerator.is_available(), reason="fp16 works here")
def test_a_precision_that_this_machine_lacks_is_named_in_one_line(paths, capfd):
    assert "fp16" in refused(capfd, words_of("sft --precision fp16", paths))


CONFIGS = {
    "an unknown setting": ("batch_sice: 3\n", ["batch_sice", "batch_size"]),
    "an unknown nested setting": ("optimizer: {learning_rate: 1.0e-3}\n", ["optimizer.learning_rate"]),
    "a near nested setting": ("optimizer: {warmup_step: 3}\n", ["optimizer.warmup_step", "optimizer.warmup_steps"]),
    "a group that is no mapping": ("optimizer: 3\n", ["optimizer"]),
    "an int that is a word": ("batch_size: four\n", ["batch_size", "four"]),
    "a float that is a word": ("num_epochs: many\n", ["num_epochs", "many"]),
    "a float without a dot": ("optimizer: {lr: fast}\n", ["optimizer.lr", "fast"]),
    "a bool that is a word": ("keep_best: maybe\n", ["keep_best", "maybe"]),
    "a choice that there is not": ("precision: fp8\n", ["precision", "fp8"]),
    "a text that is a list": ("data: [a, b]\n", ["data"]),
    "a value out of range": ("eval_every: -3\n", ["eval_every=-3"]),
    "a nested value out of range": ("optimizer: {lr: -1}\n", ["optimizer.lr=-1"]),
    "a list": ("- batch_size\n- 3\n", ["config.yaml"]),
    "a text": ("batch_size\n", ["config.yaml"]),
    "null for a number": ("eval_every: null\n", ["eval_every", "null"]),
    "null for a nested number": ("optimizer: {lr: null}\n", ["optimizer.lr", "null"]),
    "null for a group": ("optimizer: null\n", ["optimizer"]),
    "no value at all": ("batch_size:\n", ["batch_size"]),
    "what refers to itself": ("extra: &a [*a]\n", ["config.yaml"]),
    "another's object": ("data: !!python/object/apply:os.getcwd []\n", ["config.yaml"]),
    "brackets without end": ("[" * 3000, ["config.yaml"]),
    "a number without end": (f"seed: {'9' * 5000}\n", ["config.yaml"]),
    "an invisible name": ("batch_size\u200b: 4\n", ["batch_size"]),
    "malformed YAML": ("batch_size: [3\noptimizer: }\n", ["config.yaml"]),
    "tabs": ("optimizer:\n\tlr: 3\n", ["config.yaml"]),
    "the settings of another stage": ("kl_coef: 0.1\n", ["kl_coef"]),
}


@pytest.mark.parametrize(("text", "named"), CONFIGS.values(), ids=CONFIGS)
def test_a_mistake_in_a_config_file_is_named_in_one_line(text, named, paths, capfd):
    Path("config.yaml").write_text(text)
    told = refused(capfd, words_of("sft --config config.yaml", paths))
    for name in named:
        assert name in told


def test_a_config_file_that_is_not_text_is_named(paths, capfd):
    Path("config.yaml").write_bytes(b"\xff\xfe\x00batch_size: 3")
    assert "config.yaml" in refused(capfd, words_of("sft --config config.yaml", paths))


def test_an_empty_config_file_is_named(paths, capfd):
    Path("config.yaml").write_text("")
    assert "config.yaml" in refused(capfd, words_of("sft --config config.yaml", paths))


# -------------------------------------------------------------------------------------------------- data

LONG = "fish " * 80
GOOD = {"prompt": "a fish", "completion": " the bird .", "chosen": " the bird", "rejected": " a"}


def rows(**changes):
    """Ten good rows, the fourth with changes; a column whose value is ... is left out of all."""
    made = [{**GOOD, "prompt": f"fish {index}"} for index in range(10)]
    dropped = {name for name, value in changes.items() if value is ...}
    made[3] |= {name: value for name, value in changes.items() if value is not ...}
    return [{name: value for name, value in row.items() if name not in dropped} for row in made]


def renamed(**names):
    return [{names.get(name, name): value for name, value in row.items()} for row in rows()]


def ranked(responses, ranks):
    good = {"responses": [" a", " the bird"], "ranks": [2, 1]}
    made = [{"prompt": f"fish {index}", **good} for index in range(10)]
    made[3] |= {"responses": responses, "ranks": ranks}
    return made


def all_ranked(ranks):
    return [{"prompt": f"fish {index}", "responses": [" a", " b"], "ranks": ranks} for index in range(10)]


DATA = {
    "a missing prompt column in demonstrations": ("sft", renamed(prompt="promt"), ["promt", "prompt"]),
    "a missing completion column": ("sft", renamed(completion="completoin"), ["completion", "completoin"]),
    "a missing chosen column": ("reward", renamed(chosen="choosen"), ["chosen", "choosen", "Did you mean"]),
    "a missing rejected column": ("reward", renamed(rejected="reject"), ["rejected", "reject", "Did you mean"]),
    "a missing prompt column in comparisons": ("reward", renamed(prompt="promt"), ["prompt", "Did you mean promt?"]),
    "a missing prompt column in prompts": ("ppo", renamed(prompt="promt"), ["prompt", "Did you mean promt?"]),
    "no prompt in one demonstration": ("sft", rows(prompt=None), ["prompt", "row 3"]),
    "no completion in one demonstration": ("sft", rows(completion=None), ["completion"]),
    "no prompt in one comparison": ("reward", rows(prompt=None), ["prompt", "row 3"]),
    "no chosen in one comparison": ("reward", rows(chosen=None), ["chosen"]),
    "no prompt in one row": ("ppo", rows(prompt=None), ["prompt", "row 3"]),
    "a prompt of a megabyte": ("ppo", rows(prompt="fish " * 200_000), ["prompt 3", "200001 tokens"]),
    "a demonstration of a megabyte": ("sft", rows(completion="fish " * 200_000), ["demonstration 3", "max_length"]),
    "a prompt of special tokens alone": ("ppo", rows(prompt=tiny_models.EOS * 3), ["prompt 3", "special"]),
    "a demonstration's prompt of special tokens alone": (
        "sft",
        rows(prompt=tiny_models.EOS),
        ["data: row 3", "special"],
    ),
    "a number among the prompts": ("ppo", rows(prompt=3), ["prompts: row 3", "int"]),
    "a list among the completions": ("sft", rows(completion=[" a"]), ["data: row 3", "list"]),
    "demonstrations mixed with texts": (
        "sft",
        [*rows(), {"text": "a fish"}],
        ["data: ", "`text`"],
    ),
    "comparisons mixed with rankings": (
        "reward",
        [*rows(completion=...), {"prompt": "a", "responses": [" a", " b"], "ranks": [1, 2]}],
        ["responses"],
    ),
    "numbers for prompts": ("ppo", [{"prompt": number} for number in range(10)], ["prompt", "int"]),
    "numbers for completions": (
        "sft",
        [{**row, "completion": n} for n, row in enumerate(rows())],
        ["completion", "int"],
    ),
    "lists for chosen": ("reward", [{**row, "chosen": ["a"]} for row in rows()], ["chosen", "list"]),
    "a blank prompt": ("ppo", rows(prompt="  \n"), ["prompt", "blank"]),
    "an empty prompt in a demonstration": ("sft", rows(prompt=""), ["prompt", "blank"]),
    "a blank completion": ("sft", rows(completion=" "), ["completion", "blank"]),
    "a prompt longer than the context": ("ppo", rows(prompt=LONG), ["prompt", "tokens"]),
    "a demonstration longer than the context": ("sft", rows(completion=LONG), ["demonstration", "64", "max_length"]),
    "no response that fits the context": (
        "reward",
        [{**row, "chosen": LONG} for row in rows()],
        ["data", "response", "context"],
    ),
    "a prompt longer than the context for normalisation": ("reward", rows(prompt=LONG), ["prompt", "tokens"]),
    "a margin that is a word": ("reward", [{**row, "margin": "big"} for row in rows()], ["margin", "big"]),
    "ranks that are fewer": ("reward", ranked([" a", " b", " c"], [1, 2]), ["ranks", "3"]),
    "ranks that are missing": ("reward", ranked([" a", " b"], None), ["ranks"]),
    "ranks that are null": ("reward", ranked([" a", " b"], [1, None]), ["ranks"]),
    "ranks that are all equal": ("reward", all_ranked([1, 1]), ["ranks", "equal"]),
    "one response alone": ("reward", ranked([" a"], [1]), ["responses"]),
    "responses that are no texts": ("reward", ranked([" a", None], [1, 2]), ["responses"]),
}
SETTING = {"sft": "data", "reward": "data", "ppo": "prompts"}


@pytest.mark.parametrize(("stage", "given", "named"), DATA.values(), ids=DATA)
def test_a_mistake_in_the_data_is_named_in_one_line(stage, given, named, paths, capfd):
    write_rows("given.jsonl", given)
    line = f"{stage} --{SETTING[stage]} given.jsonl --batch_size 2"
    told = refused(capfd, words_of(line, paths))
    for name in named:
        assert name in told


@pytest.mark.parametrize("stage", SETTING)
def test_a_data_file_that_is_missing_is_named(stage, paths, capfd):
    told = refused(capfd, words_of(f"{stage} --{SETTING[stage]} nowhere.jsonl", paths))
    assert SETTING[stage] in told
    assert "nowhere.jsonl" in told


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.jsonl", b""),
        ("blank.jsonl", b"\n\n"),
        ("header.csv", b"prompt,completion\n"),
        ("invalid.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", "compl\n'),
        ("latin.jsonl", '{"prompt": "café", "completion": "b"}\n'.encode("latin-1")),
        ("null.jsonl", b"null\n"),
        ("list.jsonl", b'["a", "b"]\n["c", "d"]\n'),
        ("wide.jsonl", '{"prompt": "a", "completion": "b"}\n'.encode("utf-16")),
        ("zeros.jsonl", b"\0" * 5000),
        ("number.jsonl", b"3\n4\n"),
        ("latin.csv", "prompt,completion\ncafé,b\n".encode("latin-1")),
        ("ragged.csv", b"prompt,completion\na,b\na,b,c,d\n"),
        ("surrogate.jsonl", b'{"prompt": "fish \\ud800", "completion": " a"}\n' * 9),
        ("open_quote.csv", b'prompt,completion\n"a,b\n'),
        ("huge_line.jsonl", b'{"prompt": "' + b"a" * 20_000_000),
        ("object.json", b'{"prompt": "a"'),
        ("empty.parquet", b""),
        ("empty.csv", b""),
        ("other.xyz", b"prompt"),
        ("folder", None),
        ("damaged.parquet", b"PAR1 no more"),
    ],
)
def test_a_file_that_holds_no_rows_is_named(name, content, paths, capfd):
    if content is None:
        Path(name).mkdir()
    else:
        Path(name).write_bytes(content)
    told = refused(capfd, words_of(f"sft --data ./{name}", paths))
    assert name in told


@pytest.mark.parametrize("header", ["prompt;completion", "prompt,prompt", "Prompt,Completion", "completion"])
def test_a_table_of_other_columns_is_named(header, paths, capfd):
    Path("given.csv").write_text("\n".join([header] + [header.replace("p", str(row)) for row in range(20)]))
    told = refused(capfd, words_of("sft --data given.csv", paths))
    assert "`completion`" in told or "column 'prompt'" in told
    assert header.partition(",")[0] in told


def test_rows_that_differ_in_their_columns_are_refused_by_number(paths):
    from ppo_rlhf.config import SFTConfig
    from ppo_rlhf.errors import UserError
    from ppo_rlhf.train import sft

    ragged = rows()
    del ragged[5]["completion"]
    with pytest.raises(UserError, match="completion"):
        sft.train(SFTConfig(policy=paths["gpt2"], output_dir="out", batch_size=2, eval_fraction=0.2), data=ragged)
    assert not Path("out").exists()


# ----------------------------------------------------------------------------------------- output folders


def test_an_output_folder_that_holds_another_run_is_left_as_it_is(paths, capfd):
    Path("out").mkdir()
    Path("out/config.yaml").write_text("seed: 3\n")
    told = refused(capfd, words_of("sft", paths))
    assert "out" in told
    assert "--resume" in told
    assert [path.name for path in Path("out").iterdir()] == ["config.yaml"]
    assert Path("out/config.yaml").read_text() == "seed: 3\n"


def test_an_output_dir_that_is_a_file_is_named(paths, capfd):
    Path("out").write_text("mine")
    assert "out" in refused(capfd, words_of("sft", paths))
    assert Path("out").read_text() == "mine"


def test_an_output_dir_below_a_file_is_named(paths, capfd):
    Path("file").write_text("mine")
    assert "file" in refused(capfd, words_of("sft", paths, output="file/out"), output="file/out")


def test_resume_without_an_output_dir_is_refused(paths, capfd):
    words = words_of("sft --resume", paths)[:-2]
    assert "--output-dir" in refused(capfd, words)
    assert not Path("runs").exists()


def test_report_of_a_folder_without_a_run_is_refused(capfd):
    assert "nowhere" in refused(capfd, ["report", "nowhere"], output="nowhere")
    Path("empty").mkdir()
    assert "empty" in refused(capfd, ["report", "empty"], output="nowhere")


# ------------------------------------------------------------------------------------------ between stages


def test_a_separate_value_model_refuses_a_reward_model_of_another_vocabulary(paths, capfd):
    reward_model_of("rewarder", tiny_runs.tokenizer(size=280))
    told = refused(capfd, words_of("ppo --reward ./rewarder --value_model separate", paths))
    assert "value_model=separate" in told
    assert "vocabulary" in told


def test_a_separate_value_model_refuses_another_vocabulary_of_the_same_size(paths, capfd):
    tokens = tiny_runs.tokenizer(texts=["zebra quartz jump vex waltz glyph"] * 20 + ["abcdefghijklmnop" * 3] * 10)
    reward_model_of("rewarder", tokens)
    told = refused(capfd, words_of("ppo --reward ./rewarder --value_model separate", paths))
    assert "vocabulary" in told


PIPELINES = {
    "comparisons without prompts": ({"comparisons.annotator": "user.py:length"}, "comparisons.prompts"),
    "neither comparisons nor an annotator": ({}, "reward.data"),
    "no prompts for PPO": ({"reward.data": "{comparisons}"}, "ppo.prompts"),
    "a file of prompts that is missing": ({"reward.data": "{comparisons}", "ppo.prompts": "nowhere.jsonl"}, "nowhere"),
    "a file of comparisons that is missing": ({"reward.data": "nowhere.jsonl", "ppo.prompts": "{prompts}"}, "nowhere"),
}


@pytest.mark.parametrize(("settings", "named"), PIPELINES.values(), ids=PIPELINES)
def test_a_pipeline_refuses_what_a_later_stage_lacks_before_the_first_one_trains(settings, named, paths, capfd):
    options = [word for name, value in settings.items() for word in (f"--{name}", value.format(**paths))]
    sft = ["--sft.policy", paths["gpt2"], "--sft.data", paths["demonstrations"], "--sft.batch_size", "4"]
    small = ["--reward.batch_size", "4", "--reward.normalization_prompts", "2", "--reward.sampling.max_new_tokens", "4"]
    words = ["pipeline", "--output-dir", "out", *sft, "--sft.eval_fraction", "0.2", *small, *options]
    assert named in refused(capfd, words)


def test_a_pipeline_that_refuses_its_first_stage_leaves_nothing(paths, capfd):
    rest = f"--reward.data {paths['comparisons']} --ppo.prompts {paths['prompts']} --output-dir out"
    assert "nowhere.jsonl" in refused(
        capfd, f"pipeline --sft.policy {paths['gpt2']} --sft.data nowhere.jsonl {rest}".split()
    )


# ------------------------------------------------------------------------------------- as a user types it


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("sft --batch_sice 3", "Did you mean batch_size?"),
        ("ppo --reward user.py:nan", "reward function nan returned nan"),
    ],
)
def test_a_real_command_exits_with_code_2_and_one_line(line, named, paths):
    done = tiny_runs.command(*words_of(line, paths), cwd=".")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert named in done.stderr
    assert not Path("out").exists()


def test_a_command_that_is_asked_for_json_keeps_stdout_empty_when_it_refuses(paths, capfd):
    assert "batch_size=0" in refused(capfd, words_of("sft --json --batch_size 0", paths))


def test_the_command_lines_above_work_without_their_mistakes(paths, capfd):
    for stage in STAGES:
        assert main([*words_of(f"{stage} --json", paths, output=stage), "--log_with", "[]"]) == 0
        assert json.loads(capfd.readouterr().out.splitlines()[-1])["output_dir"] == stage
