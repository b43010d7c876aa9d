"""`--estimate-memory`: bytes told before a run, against those that the run then has."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_runs
import torch
from tiny_runs import STOPS, write_rows
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel

from ppo_rlhf import packing
from ppo_rlhf.cli import main
from ppo_rlhf.config import PPOConfig, SFTConfig
from ppo_rlhf.core import Experience
from ppo_rlhf.models import load_policy, use_quick_kernels
from ppo_rlhf.optimizer import make_optimizer
from ppo_rlhf.packing import Packing, last_hidden_states
from ppo_rlhf.reward_settings import RewardPart
from ppo_rlhf.rewards import RewardModel
from ppo_rlhf.run import make_accelerator
from ppo_rlhf.sampling import sample
from ppo_rlhf.settings import PPOSettings, SamplingSettings
from ppo_rlhf.train.memory_estimate import activation_bytes, estimate_ppo, estimate_sft
from ppo_rlhf.train.ppo_parts import load_parts
from ppo_rlhf.train.sft import CompletionModule, completion_logprobs, load_examples
from ppo_rlhf.update import ppo_update


def ppo_config(models, data, **changes):
    settings = {
        "policy": models["gpt2"],
        "reward": "user.py:length",
        "prompts": data["prompts"],
        "batch_size": 8,
        "sampling": SamplingSettings(max_new_tokens=6, stop_token_ids=STOPS),
    }
    return PPOConfig(**settings | changes)


@pytest.fixture(scope="module")
def reward_models(models, tmp_path_factory):
    """A reward model on the trunk of each of these models."""
    folder = tmp_path_factory.mktemp("reward_models")
    return {name: tiny_runs.reward_model_on(models[name], folder / name) for name in ("gpt2", "llama", "pad_is_eos")}


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("value_model", ["shared", "separate"])
@pytest.mark.parametrize("policy", ["gpt2", "llama", "pad_is_eos"])
def test_weights_gradients_and_optimizer_are_told_to_the_byte(policy, value_model, models, reward_models, data):
    """Also where a pad token is added, for which the embeddings grow."""
    reward = {"reward": reward_models["gpt2"]} if policy == "gpt2" else {}
    config = ppo_config(models, data, policy=models[policy], value_model=value_model, **reward)
    estimate = estimate_ppo(config)
    accelerator = make_accelerator(None, precision="no", log_with=(), cpu=True)
    parts = load_parts(config, accelerator, *[None] * 6)
    optimizer = make_optimizer(parts.model, config.optimizer)
    for parameter in parts.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    told = estimate.parts
    assert told["policy"] + told.get("value model", 0) == bytes_of([*parts.model.parameters(), *parts.model.buffers()])
    assert ("value model" in told) == (value_model == "separate")
    assert told["reference"] == bytes_of([*parts.reference.parameters(), *parts.reference.buffers()])
    if policy == "gpt2":
        assert told["reward model"] == bytes_of(parts.reward.network.parameters())
    assert told["optimizer"] == bytes_of(states)
    assert estimate.phases["update"]["gradients"] == bytes_of(p.grad for p in parts.model.parameters())


def test_every_model_of_a_reward_of_parts_is_told_and_neither_functions_nor_servers_are(models, reward_models, data):
    reward = (
        RewardPart((reward_models["gpt2"], reward_models["llama"]), name="quality", ensemble="min"),
        RewardPart("user.py:length"),
        RewardPart("http://localhost:9/score", name="server"),
        RewardPart(reward_models["pad_is_eos"]),
    )
    told = estimate_ppo(ppo_config(models, data, reward=reward)).parts
    assert list(told) == ["policy", "reference", "reward model 1", "reward model 2", "reward model 3", "optimizer"]
    for name, folder in zip(list(told)[2:5], ("gpt2", "llama", "pad_is_eos"), strict=True):
        loaded = RewardModel.load(reward_models[folder], setting="reward")
        assert told[name] == bytes_of([*loaded.network.parameters(), *loaded.network.buffers()])


def test_a_server_as_reward_is_not_looked_for_in_a_folder(models, data):
    told = estimate_ppo(ppo_config(models, data, reward="http://localhost:9/score")).parts
    assert list(told) == ["policy", "reference", "optimizer"]


def test_without_values_there_is_no_head_for_them(models, data):
    with_head, without = (
        estimate_ppo(ppo_config(models, data, advantage=each, responses_per_prompt=2)).parts["policy"]
        for each in ("gae", "rloo")
    )
    policy, _ = load_policy(models["gpt2"], setting="policy")
    assert with_head - without == 4 * (policy.config.hidden_size + 1)


def test_models_that_are_frozen_in_bf16_take_half(models, reward_models, data):
    whole, half = (
        estimate_ppo(ppo_config(models, data, reward=reward_models["gpt2"], frozen_precision=each)).parts
        for each in ("no", "bf16")
    )
    for name in ("reference", "reward model"):
        assert half[name] * 2 == whole[name]
    assert half["policy"] == whole["policy"]


@pytest.mark.parametrize("policy", ["gpt2", "llama"])
@pytest.mark.parametrize("fused_width", [16, 17], ids=["fused attention", "plain attention"])
def test_activations_are_those_that_autograd_keeps(policy, fused_width, models, data, monkeypatch):
    """Eight rows of 16 tokens, through the packed forward that a run takes: within a tenth."""
    monkeypatch.setattr(packing, "fused_width", lambda dtype: fused_width)
    model, _ = load_policy(models[policy], setting="policy")
    config = ppo_config(models, data)
    accelerator = make_accelerator(None, precision="no", log_with=(), cpu=True)
    parts = load_parts(config, accelerator, model, load_policy(models[policy], setting="policy")[1], *[None] * 4)
    trunk = parts.model.language_model.base_model
    kept = {}
    weights = {parameter.untyped_storage()._cdata for parameter in trunk.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    ids = torch.ones(8, 16, dtype=torch.int64)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        last_hidden_states(trunk, Packing.of(ids, ids.bool()))
    measured = sum(storage.nbytes() for storage in kept.values())
    assert activation_bytes(trunk.to("meta"), 8, 16, fused=fused_width <= 16) == pytest.approx(measured, rel=0.1)


@pytest.fixture(scope="module")
def wider(tmp_path_factory):
    """A model wide enough for activations to be most of an update."""
    tokens = tiny_runs.tokenizer()
    config = GPT2Config(
        bos_token_id=0, eos_token_id=0, n_embd=64, n_layer=4, n_head=4, n_positions=64, vocab_size=len(tokens)
    )
    return tiny_runs.save(tmp_path_factory.mktemp("wider"), GPT2LMHeadModel(config), tokens)


def most_allocated(work):
    """The most bytes of tensors that were made in `work` and alive at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("value_model", ["shared", "separate"])
def test_an_update_takes_what_was_told(value_model, gradient_checkpointing, wider, data):
    """The largest sum of an update's tensors, within a fifth of what was told."""
    settings = PPOSettings(num_epochs=1, micro_batch_size=16)
    config = ppo_config(
        {"gpt2": wider}, data, value_model=value_model, gradient_checkpointing=gradient_checkpointing, ppo=settings
    )
    config = replace(config, batch_size=32, sampling=SamplingSettings(max_new_tokens=40, stop_token_ids=(299,)))
    accelerator = make_accelerator(None, precision="no", log_with=(), cpu=True)
    parts = load_parts(config, accelerator, *[None] * 6)
    ids = sorted(parts.prompts.ids, key=len)[-1]
    inputs = {
        "prompt_ids": torch.tensor([ids] * 32),
        "prompt_mask": torch.ones(32, len(ids), dtype=torch.bool),
        "response_ids": torch.ones(32, 40, dtype=torch.int64),
        "response_mask": torch.ones(32, 40, dtype=torch.bool),
    }
    zeros = torch.zeros(32, 40)
    experience = Experience(inputs, zeros, zeros, zeros, zeros, inputs["response_mask"])
    optimizer = make_optimizer(parts.model, config.optimizer)

    def update():
        generator = torch.Generator().manual_seed(0)
        ppo_update(parts.model, optimizer, experience, settings, accelerator=accelerator, generator=generator)

    update()  # makes the optimizer's moments
    told = sum(estimate_ppo(config).phases["update"].values())
    assert most_allocated(update) == pytest.approx(told, rel=0.2)


def test_a_supervised_update_takes_what_was_told(tmp_path):
    """Its 6,400 × 12,000 logits would take 300 MB: they never are there at once."""
    tokens = tiny_runs.tokenizer()
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256, "vocab_size": 12_000}
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **shape))
    folder = tiny_runs.save(tmp_path / "long", model, tokens)
    write_rows(tmp_path / "texts.jsonl", [{"text": tokens.decode([5] * 199)} for _ in range(40)])
    config = SFTConfig(policy=folder, data=str(tmp_path / "texts.jsonl"), batch_size=32, eval_fraction=0.2)
    policy, tokenizer = load_policy(folder, setting="policy")
    examples, _ = load_examples(config, None, tokenizer, 256)
    module = CompletionModule(use_quick_kernels(policy))

    def update():
        module.zero_grad()
        logprobs, _ = completion_logprobs(module, examples[:32], torch.device("cpu"))
        (-logprobs).mean().backward()

    estimate = estimate_sft(config)
    assert sum(examples.lengths[:32]) > 6_000
    assert most_allocated(update) == pytest.approx(sum(estimate.phases["update"].values()), rel=0.2)


def test_sampling_takes_what_was_told(wider, data):
    """Keys, values and logits of 32 rows, within a fifth."""
    sampling = SamplingSettings(max_new_tokens=40, stop_token_ids=(299,))
    config = ppo_config({"gpt2": wider}, data, batch_size=32, sampling=sampling)
    accelerator = make_accelerator(None, precision="no", log_with=(), cpu=True)
    parts = load_parts(config, accelerator, *[None] * 6)
    prompts = parts.prompts.batch(range(32), torch.device("cpu"))
    noise = 0.9 * torch.rand(32, 40)  # never draws the last id: no row stops

    def work():
        sample(parts.model.language_model, parts.tokenizer, prompts, sampling, noise)

    work()
    told = sum(estimate_ppo(config).phases["sampling"].values())
    assert most_allocated(work) == pytest.approx(told, rel=0.2)


COMMANDS = {
    "sft": ("--policy {gpt2} --data {demonstrations} --eval_fraction 0.2", ["policy", "optimizer"], ["update"]),
    "reward": (
        "--policy {gpt2} --data {rankings} --eval_fraction 0.2 --language_model_coef 0.1",
        ["reward model", "optimizer"],
        ["sampling", "update"],
    ),
    "ppo": (
        "--policy {gpt2} --reward {gpt2} --gold user.py:length --prompts {prompts} --batch_size 8 --reference {llama} "
        "--value_model separate --precision bf16",
        ["policy", "value model", "reference", "reward model", "optimizer"],
        ["sampling", "update"],
    ),
}


@pytest.mark.parametrize("stage", COMMANDS)
def test_the_commands_tell_without_weights_and_write_nothing(stage, models, data, capsys):
    words, parts, phases = COMMANDS[stage]
    for name in ("gpt2", "llama"):
        shutil.copytree(models[name], name, ignore=shutil.ignore_patterns("*.safetensors"))
    folders = {"gpt2": "gpt2", "llama": "llama"}
    line = [stage, *words.format(**folders, **data).split(), "--output-dir", "out", "--estimate-memory"]
    before = sorted(Path.cwd().rglob("*"))
    assert main([*line, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["parts"]) == parts
    assert list(told["phases"]) == phases
    assert told["peak"] == sum(told["parts"].values()) + max(sum(phase.values()) for phase in told["phases"].values())
    assert main(line) == 0
    shown = capsys.readouterr().out
    for name in [*parts, *told["phases"]["update"]]:
        assert name in shown
    assert f"at most, beside Python and its libraries{told['peak'] / 2**20:>20,.1f} MiB" in shown
    assert [path for path in sorted(Path.cwd().rglob("*")) if "__pycache__" not in path.parts] == before


def test_the_estimate_of_a_run_that_cannot_be_is_one_line(models, data, capsys):
    line = f"ppo --policy nowhere/at/all --reward {models['gpt2']} --prompts {data['prompts']} --estimate-memory"
    assert main(line.split()) == 2
    assert capsys.readouterr().err == "error: policy: there is no folder nowhere/at/all.\n"


def test_a_smaller_micro_batch_takes_less(models, data):
    large, small = (
        estimate_ppo(ppo_config(models, data, ppo=PPOSettings(micro_batch_size=size))) for size in (None, 2)
    )
    assert small.peak < large.peak
    assert small.parts == large.parts
