"""Packed forwards say what padded ones say, gradients included; and the quick kernels are numerically the slow ones."""

from __future__ import annotations

import copy
import itertools
import math

import language_cases as cases
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, PreTrainedModel
from transformers.activations import NewGELUActivation

from ppo_rlhf import packing as packing_module
from ppo_rlhf.core import Evaluation
from ppo_rlhf.models import PLAIN_HEAD, disable_dropout, frozen_copy, has_plain_head, use_quick_kernels
from ppo_rlhf.packing import ATTENTION, Packing, bucketed, can_pack, last_hidden_states, use_packed_attention
from ppo_rlhf.policy import PolicyWithValue, ResponseTokens, response_logprobs

PROMPTS = [[5, 9, 12], [7], [3, 3, 40, 41, 8], [9, 9], [60]]
RESPONSES = [[10, 11, 0], [20, 21, 22, 23, 24], [], [33], []]  # rows without any token that was decided, too
TOLERANCE = {"gpt2": 1e-10}  # the others compute rotations or norms in float32


def quick(policy: PolicyWithValue) -> PolicyWithValue:
    policy = copy.deepcopy(policy)
    use_quick_kernels(policy.language_model)
    if policy.value_model is not None:
        use_packed_attention(policy.value_model.trunk)
    return policy


def says(policy: PolicyWithValue, inputs) -> tuple[Evaluation, dict[str, torch.Tensor]]:
    """The evaluation, and the gradients of a sum in which each number has a weight of its own."""
    evaluation = policy(**inputs)
    mask = inputs["response_mask"]
    weights = torch.linspace(-1, 2, mask.numel(), dtype=torch.float64).view(mask.shape)
    total = sum(torch.where(mask, weights * k * x, 0).sum() for k, x in enumerate(evaluation[:3], start=1))
    policy.zero_grad()
    total.backward()
    return evaluation, {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def assert_same(one, other, mask, *, atol):
    for x, y in zip(one[0][:3], other[0][:3], strict=True):
        torch.testing.assert_close(x[mask], y[mask], rtol=0, atol=atol)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        scale = 1 + float(gradient.abs().max())
        torch.testing.assert_close(other[1][name], gradient, rtol=0, atol=atol * scale, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("separate", [False, True], ids=["shared value head", "separate value model"])
def test_a_packed_forward_says_what_the_models_own_padded_one_says(architecture, separate, temperature):
    policy = cases.make_policy(
        architecture, separate=separate, temperature=temperature, differentiable_entropy=True
    ).double()
    packed = quick(policy)
    assert has_plain_head(packed.language_model)
    assert not has_plain_head(policy.language_model)
    assert packed.language_model.config._attn_implementation == ATTENTION
    inputs = cases.inputs_of(PROMPTS, RESPONSES, extra_left=2, extra_right=1, pad=99)
    expected = says(policy, inputs)
    assert expected[0].logprobs[0, 0] != 0
    assert_same(expected, says(packed, inputs), inputs["response_mask"], atol=TOLERANCE.get(architecture, 3e-6))


def test_a_packed_reference_says_what_its_own_padded_forward_says(architecture):
    reference = cases.make_model(architecture).double()
    inputs = cases.inputs_of(PROMPTS, RESPONSES)
    expected = response_logprobs(reference, inputs, temperature=0.7)
    actual = response_logprobs(use_quick_kernels(reference), inputs, temperature=0.7)
    mask = inputs["response_mask"]
    torch.testing.assert_close(actual[mask], expected[mask], rtol=0, atol=TOLERANCE.get(architecture, 3e-6))
    assert (actual[~mask] == 0).all()


def test_a_batch_without_any_decision_has_gradients_that_are_zero(architecture):
    policy = quick(cases.make_policy(architecture))
    inputs = cases.inputs_of([[5, 9], [7]], [[10], [11]])
    inputs["response_mask"] = torch.zeros_like(inputs["response_mask"])
    evaluation = policy(**inputs)
    assert evaluation.logprobs.shape == (2, 1)
    (evaluation.logprobs.sum() + evaluation.values.sum()).backward()
    assert all((p.grad == 0).all() for p in policy.parameters() if p.grad is not None)
    assert policy.value_head.weight.grad is not None  # every process takes part in every all-reduce


@pytest.mark.parametrize("buckets", [(1, 1), (64, 8), (7, 5)], ids=str)
def test_rounding_the_number_of_tokens_up_adds_nothing(architecture, buckets, monkeypatch):
    policy = quick(cases.make_policy(architecture, differentiable_entropy=True)).double()
    inputs = cases.inputs_of(PROMPTS, RESPONSES)
    expected = says(policy, inputs)
    monkeypatch.setattr(packing_module, "TOKEN_BUCKET", buckets[0])
    monkeypatch.setattr(packing_module, "ROW_BUCKET", buckets[1])
    assert_same(expected, says(policy, inputs), inputs["response_mask"], atol=1e-6)


@pytest.mark.parametrize("fused_width", [1, 16, 10**6], ids="attention fused from {}".format)
def test_attention_in_blocks_says_what_it_says_in_one(architecture, fused_width, monkeypatch):
    policy = quick(cases.make_policy(architecture, differentiable_entropy=True)).double()
    inputs = cases.inputs_of([[5, 9, 12] * 5, *PROMPTS, [7, 8] * 12], [[9], *RESPONSES, [10, 11]])
    monkeypatch.setattr(packing_module, "BLOCK_COST", 10**9)
    expected = says(policy, inputs)
    monkeypatch.setattr(packing_module, "fused_width", lambda dtype: fused_width)
    monkeypatch.setattr(packing_module, "BLOCK_COST", 0)
    blocks = ResponseTokens.of(inputs).packing.blocks
    assert [tuple(block) for block in blocks] == [(n, w, w >= fused_width) for n, w in ((1, 32), (1, 16), (5, 8))]
    assert_same(expected, says(policy, inputs), inputs["response_mask"], atol=1e-6)


@pytest.mark.parametrize("lengths", [[300, 120, 96, 90, 90, 17, 3], [500, 480, 460, 30], [40, 38, 12, 9], [8], [1, 1]])
@pytest.mark.parametrize("cost", [0, 500, 4096, 10**9])
@pytest.mark.parametrize("fused_from", [1, 100, 10**6])
def test_no_other_blocks_of_one_kernel_each_are_cheaper(lengths, cost, fused_from, monkeypatch):
    monkeypatch.setattr(packing_module, "BLOCK_COST", cost)
    monkeypatch.setattr(packing_module, "fused_width", lambda dtype: fused_from)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    packing = Packing.of(torch.zeros(mask.shape, dtype=torch.int64), mask)

    def price(parts):
        return sum(cost + len(part) * (8 * math.ceil(max(part) / 8)) ** 2 for part in parts)

    everything = []
    for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
        ends = [0, *(i for i, cut in enumerate(cuts, start=1) if cut), len(lengths)]
        parts = [lengths[a:b] for a, b in itertools.pairwise(ends)]
        if all(len({8 * math.ceil(length / 8) >= fused_from for length in part}) == 1 for part in parts):
            everything.append(price(parts))
    assert sum(block.rows for block in packing.blocks) == len(lengths)
    assert sum(cost + block.rows * block.width**2 for block in packing.blocks) == min(everything)
    assert [block.width for block in packing.blocks] == sorted({block.width for block in packing.blocks})[::-1]


def test_only_tokens_that_something_is_predicted_from_are_computed(monkeypatch):
    """3 + 3 − 1, 1 + 5 − 1, and 2 + 1 − 1 tokens; nothing of the two rows without a response."""
    monkeypatch.setattr(packing_module, "TOKEN_BUCKET", 1)
    policy, seen = quick(cases.make_policy()), []
    policy.language_model.base_model.ln_f.register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape)))
    policy(**cases.inputs_of(PROMPTS, RESPONSES, extra_left=3, extra_right=4))
    assert seen == [(1, 12, 16)]
    tokens = ResponseTokens.of(cases.inputs_of(PROMPTS, RESPONSES))
    assert (len(tokens.packing), len(tokens.cells)) == (12, 9)


def test_no_rows_are_no_tokens():
    packing = Packing.of(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.bool))
    assert (len(packing), len(packing.order)) == (0, 0)


def test_a_packing_knows_its_cells_wherever_the_padding_is():
    ids = torch.tensor([[1, 5, 6], [7, 1, 1], [1, 1, 1], [1, 8, 1]])
    mask = torch.tensor([[False, True, True], [True, False, False], [False] * 3, [False, True, False]])
    packing = Packing.of(ids, mask)
    assert packing.ids[0, :4].tolist() == [5, 6, 7, 8]
    assert packing.position_ids[0, :4].tolist() == [0, 1, 0, 0]
    assert packing.places_of(torch.tensor([2, 3, 10])).tolist() == [1, 2, 3]
    assert packing.padded(packing.ids[0]).tolist() == [[0, 5, 6], [7, 0, 0], [0, 0, 0], [0, 8, 0]]
    assert packing.ids.shape[1] == bucketed(4)


def test_a_token_sees_its_own_sequence_alone(architecture):
    model = use_quick_kernels(cases.make_model(architecture))
    ids, mask = torch.tensor([[5, 9, 12], [7, 20, 3]]), torch.ones(2, 3, dtype=torch.bool)
    other = ids.clone()
    other[0] = torch.tensor([40, 41, 42])
    one, two = (last_hidden_states(model.base_model, Packing.of(each, mask)) for each in (ids, other))
    assert torch.equal(one[3:6], two[3:6])
    assert not torch.equal(one[:3], two[:3])


def test_padded_batches_and_caches_go_through_the_same_attention(architecture):
    """What the sampler and supervised training do with the model is as it was."""
    model = cases.make_model(architecture)
    ids, mask = torch.tensor([[1, 5, 9, 12], [7, 20, 3, 4]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    expected = model(**inputs).logits
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=1)
    use_quick_kernels(model)
    torch.testing.assert_close(model(**inputs).logits[mask.bool()], expected[mask.bool()], rtol=0, atol=2e-5)
    again = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=1)
    assert torch.equal(again, generated)


# --------------------------------------------------------------------------------------------- what cannot be packed


def small_mistral(window):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=window, initializer_range=0.3, max_position_embeddings=48,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def test_sequences_longer_than_a_sliding_window_are_padded():
    model = small_mistral(8)
    reference = frozen_copy(model)
    use_quick_kernels(model)
    assert can_pack(model.base_model, 8)
    assert not can_pack(model.base_model, 16)
    inputs = cases.inputs_of([[5, 9, 12, 8, 3, 2], [7, 6]], [[10, 11, 12, 13, 14, 15, 0], [20, 21]])
    expected = response_logprobs(reference, inputs, temperature=1.0)
    actual = response_logprobs(model, inputs, temperature=1.0)
    cases.assert_close_on(inputs["response_mask"], actual, expected)


class ScaledGPT2(GPT2LMHeadModel):
    """A head that is more than one linear map, as Granite's and Cohere's."""

    def forward(self, input_ids, position_ids=None, **others):
        output = super().forward(input_ids, position_ids=position_ids, **others)
        output.logits = output.logits / 3
        return output


def test_a_head_that_scales_its_logits_goes_through_the_models_own_forward():
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=48, initializer_range=0.3, bos_token_id=0
    )
    config.eos_token_id = 0
    model = ScaledGPT2(config)
    use_quick_kernels(model)
    disable_dropout(model)
    assert not has_plain_head(model)
    evaluation = PolicyWithValue(model)(**cases.inputs_of())
    for row, (prompt, response) in enumerate(zip(cases.PROMPT_IDS, cases.RESPONSE_IDS, strict=True)):
        expected = cases.plain_logprobs(model, prompt, response)
        actual = evaluation.logprobs[row, : len(response)].double()
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


def test_a_model_that_does_otherwise_when_packed_keeps_its_own_attention(monkeypatch):
    monkeypatch.setattr(packing_module, "_packed_attention", lambda module, q, k, v, *_: 2 * q.transpose(1, 2))
    model = cases.make_model()
    before = model.config._attn_implementation
    assert not use_packed_attention(model)
    assert model.config._attn_implementation == before
    assert not model.training


def test_an_attention_that_bends_its_scores_is_left_alone():
    model = cases.make_model("llama")
    model.config.attn_logit_softcapping = 50.0
    assert not use_packed_attention(model)


# ------------------------------------------------------------------------------------------------------- kernels


def test_the_fused_gelu_is_the_plain_one():
    x = torch.linspace(-8, 8, 2001, dtype=torch.float64, requires_grad=True)
    plain, fused = NewGELUActivation()(x), nn.GELU(approximate="tanh")(x)
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-14)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (plain, fused)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)


def test_quick_kernels_replace_every_gelu_of_gpt2_and_change_no_prediction_nor_configuration(architecture):
    model = cases.make_model(architecture)
    config, ids = model.config.to_dict(), torch.tensor([[5, 9, 12, 10]])
    expected = model(ids).logits
    assert use_quick_kernels(model) is model
    assert not any(isinstance(module, NewGELUActivation) for module in model.modules())
    assert model.config.to_dict() == config
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=2e-5)
    assert getattr(copy.deepcopy(model), PLAIN_HEAD)
    assert isinstance(model, PreTrainedModel)


# ------------------------------------------------------------------------------------------------------- bf16


@pytest.mark.parametrize("separate", [False, True], ids=["shared value head", "separate value model"])
def test_the_first_ratio_is_one_in_bf16_in_any_minibatch(architecture, separate):
    policy = quick(cases.make_policy(architecture, separate=separate))
    inputs = cases.inputs_of(PROMPTS, RESPONSES, extra_left=2)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            old = policy(**inputs)
        for rows in ([0, 1], [3, 1], [2, 0, 4], [1]):
            new = policy(**{name: tensor[rows] for name, tensor in inputs.items()})
            ratio = (new.logprobs - old.logprobs[rows]).exp()[inputs["response_mask"][rows]]
            assert (ratio - 1).abs().max() < 1e-3
            assert new.logprobs.dtype == new.values.dtype == new.entropy.dtype == torch.float32


def test_gradients_of_a_bf16_forward_reach_the_float32_weights(architecture):
    policy = quick(cases.make_policy(architecture))
    inputs = cases.inputs_of()
    expected = says(policy, inputs)[1]
    with torch.autocast("cpu", torch.bfloat16):
        evaluation = policy(**inputs)
    mask = inputs["response_mask"]
    weights = torch.linspace(-1, 2, mask.numel()).view(mask.shape)
    policy.zero_grad()
    torch.where(mask, weights * (evaluation.logprobs + 3 * evaluation.values), 0).sum().backward()
    for name, p in policy.named_parameters():
        if p.grad is not None:
            assert p.grad.dtype == torch.float32
            error = (p.grad - expected[name]).norm() / (1e-2 + expected[name].norm())
            assert error < 0.15, name
