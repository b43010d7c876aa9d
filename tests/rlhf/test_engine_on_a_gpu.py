"""The engine on a GPU says what it says on a CPU: packed forwards, compiled decoding, a run."""

import language_cases as cases
import pytest
import tiny_runs
import torch
from test_packing import PROMPTS, RESPONSES, quick, says
from test_sampling_cache import decoded, float64_model
from tiny_runs import STOPS, metrics_of

from ppo_rlhf.config import PPOConfig
from ppo_rlhf.models import use_quick_kernels
from ppo_rlhf.settings import OptimizerSettings, PPOSettings, SamplingSettings
from ppo_rlhf.train import ppo

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("separate", [False, True], ids=["shared value head", "separate value model"])
def test_a_packed_forward_and_its_gradients_are_those_of_a_cpu(architecture, separate):
    """In float32, which Llama's and Qwen2's grouped heads take another way through attention in."""
    policy = quick(cases.make_policy(architecture, separate=separate, differentiable_entropy=True))
    inputs = cases.inputs_of(PROMPTS, RESPONSES, extra_left=2, extra_right=1)
    mask = inputs["response_mask"]
    expected, gradients = says(policy, inputs)
    actual, others = says(policy.cuda(), {name: tensor.cuda() for name, tensor in inputs.items()})
    for one, other in zip(expected[:3], actual[:3], strict=True):
        torch.testing.assert_close(other.cpu()[mask], one[mask], rtol=0, atol=1e-4)
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name].cpu(), gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shortest", [False, True], ids=["prompts", "prompts of one token"])
def test_compiled_decoding_draws_what_a_cpu_draws(architecture, tokenizer, shortest):
    lines = [tokenizer(text)["input_ids"][: 1 if shortest else None] for text in cases.SENTENCES]
    model = float64_model(architecture)
    expected = decoded(model, tokenizer, lines)
    assert decoded(use_quick_kernels(model.cuda()), tokenizer, lines, static=None) == expected


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_takes_its_steps(precision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokens = tiny_runs.tokenizer()
    config = PPOConfig(
        policy=tiny_runs.save(tmp_path / "model", tiny_runs.model(tokens), tokens),
        prompts=tiny_runs.write_rows("prompts.jsonl", tiny_runs.prompts(40)),
        reward="ppo_rlhf.toy:gold",
        output_dir="out",
        batch_size=8,
        num_steps=2,
        max_eval_prompts=4,
        precision=precision,
        sampling=SamplingSettings(max_new_tokens=6, stop_token_ids=STOPS),
        ppo=PPOSettings(num_epochs=1, num_minibatches=2),
        optimizer=OptimizerSettings(lr=1e-3),
        log_with=(),
    )
    ppo.train(config)
    rows = metrics_of("out")[1:]
    assert [row["skipped_steps"] for row in rows] == [0, 0]
    assert all(abs(row["policy/first_kl"]) < 1e-4 for row in rows)
    assert all(row["memory/peak_gib"] > 0 for row in rows)
