"""The machine's matrix products, and the figures of a step that follow from them."""

from __future__ import annotations

import sys

import language_cases as cases
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ppo_rlhf import compute
from ppo_rlhf.compute import Compute, num_multiplied, peak_memory_gib, reset_peak_memory, set_up_products
from ppo_rlhf.config import PPOConfig
from ppo_rlhf.models import use_quick_kernels
from ppo_rlhf.policy import PolicyWithValue
from ppo_rlhf.rollout import Rollout
from ppo_rlhf.settings import PPOSettings
from ppo_rlhf.train.ppo_records import model_flops, throughput_metrics

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def products_as_they_were():
    """The choice is the process's, and other tests are of the same process."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_a_set_precision_is_taken_without_a_choice(precision, monkeypatch):
    monkeypatch.setattr(compute, "_quickest_exact", lambda: pytest.fail("measured"))
    found = set_up_products(precision, CPU, torch.float32)
    assert found.precision == precision == torch.get_float32_matmul_precision()
    assert "as told" in found.message


@pytest.mark.parametrize(("seconds", "expected"), [(0.5, "medium"), (0.8, "highest"), (1.5, "highest")])
def test_auto_takes_the_quicker_way_only_where_the_gain_is_no_accident(seconds, expected, monkeypatch):
    def taken(left, right):
        return seconds if torch.get_float32_matmul_precision() == "medium" else 1.0

    monkeypatch.setattr(compute, "_seconds", taken)
    found = set_up_products("auto", CPU, torch.float32)
    assert found.precision == expected == torch.get_float32_matmul_precision()
    assert f"{1 / seconds:.2f} ×" in found.message


def test_auto_refuses_a_way_that_rounds(monkeypatch):
    """As on machines whose bf16 units `medium` uses: 8 bits are left."""
    rounding = torch.Tensor.__matmul__

    def product(left, right):
        if torch.get_float32_matmul_precision() == "medium":
            left, right = left.bfloat16().to(left.dtype), right.bfloat16().to(right.dtype)
        return rounding(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    monkeypatch.setattr(compute, "_seconds", lambda *_: 0.1 if torch.get_float32_matmul_precision() == "medium" else 1)
    found = set_up_products("auto", CPU, torch.float32)
    assert found.precision == "highest"
    assert "rounds" in found.message


def test_the_measured_peak_is_at_least_what_a_product_then_takes():
    found = set_up_products("auto", CPU, torch.float32)
    left = torch.randn(256, 256)
    seconds = min(compute._seconds(left, left) for _ in range(20))
    assert 0.2 * 2 * 256**3 / seconds < found.peak_flops < 1e14
    assert 0.05 < peak_memory_gib(CPU) < 500


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is that of the whole process")
def test_the_peak_of_memory_is_that_since_it_was_last_forgotten():
    torch.ones(2**27)  # half a GiB, gone at once
    before = peak_memory_gib(CPU)
    reset_peak_memory(CPU)
    now = peak_memory_gib(CPU)
    assert now < before - 0.4
    torch.ones(2**26)
    assert peak_memory_gib(CPU) == pytest.approx(now + 0.25, abs=0.05)


def test_a_peak_that_cannot_be_forgotten_goes_on(monkeypatch):
    """As where there is no /proc."""
    monkeypatch.setattr(compute.Path, "write_text", raise_os_error)
    before = peak_memory_gib(CPU)
    reset_peak_memory(CPU)
    assert peak_memory_gib(CPU) >= before


def raise_os_error(*_, **__):
    raise FileNotFoundError("/proc/self/clear_refs")


def small_policy(*, separate=False):
    """One layer of width 4, a vocabulary of 10: 4·12 + 4·4 + 4·16 + 16·4 = 192 weights multiply, 40 of the head."""
    config = GPT2Config(
        n_embd=4, n_layer=1, n_head=1, vocab_size=10, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    models = [use_quick_kernels(GPT2LMHeadModel(config)) for _ in range(3)]
    value_model = cases.TokenValues(models[2].base_model, torch.nn.Linear(4, 1)) if separate else None
    return PolicyWithValue(models[0], value_model=value_model), models[1]


def test_model_flops_by_hand():
    policy, reference = small_policy()
    assert num_multiplied(policy.language_model.base_model) == 192
    # A forward pass: 2·(192·10 + 40·3) = 4,080. Sampling, old policy, reference, and 2 epochs of three times it.
    assert model_flops(policy, reference, num_tokens=10, num_responded=3, num_epochs=2) == 4080 * (3 + 6)
    policy, reference = small_policy(separate=True)
    # A value model of its own: 2·(192·10 + 4·3) = 3,864, once to evaluate and 2 epochs of three times it.
    expected = 4080 * (3 + 6) + 3864 * (1 + 6)
    assert model_flops(policy, reference, num_tokens=10, num_responded=3, num_epochs=2) == expected


def test_the_throughput_of_a_step_by_hand():
    policy, reference = small_policy()
    inputs = cases.inputs_of([[5, 9, 2], [7]], [[1, 1, 0], [2]], extra_left=1)
    mask, zeros = inputs["response_mask"], torch.zeros(2, 3)
    rollout = Rollout(inputs, zeros, zeros, torch.zeros(2, 4), zeros, mask)
    metrics = {"time/sample": 2.0, "time/evaluate": 1.0, "time/update": 5.0, "time/score": 9.0, "optimizer_steps": 6}
    config = PPOConfig(batch_size=2, ppo=PPOSettings(num_epochs=4, num_minibatches=2))  # 6 of 8 steps: 3 epochs
    told = throughput_metrics(rollout, metrics, policy, reference, config, Compute("highest", 1000.0, ""))
    assert told["throughput/sampled"] == 4 / 2.0
    assert told["throughput/trained"] == 4 * 3 / 5.0
    # 5 + 1 tokens predict something, of 2 rows of 4 + 3 − 1; 4 are responded: 2·(192·6 + 40·4) = 2,624 a pass
    assert told["throughput/padding"] == 1 - 6 / 12
    assert told["throughput/computed_padding"] == 1 - 6 / 64
    assert told["throughput/matmul_share"] == 2624 * (3 + 3 * 3) / (8.0 * 1000.0)
