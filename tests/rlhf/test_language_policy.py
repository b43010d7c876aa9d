"""The policy evaluates responses: ratios, indices, padding, values. Numbers come from plain unpadded forwards."""

from __future__ import annotations

import copy

import language_cases as cases
import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ppo_rlhf.models import disable_dropout, frozen_copy
from ppo_rlhf.policy import PolicyWithValue, TokenValues, response_logprobs
from ppo_rlhf.prompts import PromptBatch
from ppo_rlhf.rollout import evaluate
from ppo_rlhf.sampling import SamplingSettings, sample
from ppo_rlhf.seeding import uniform_rows

ROWS = range(len(cases.PROMPT_IDS))


def rolled_out(policy, tokenizer, *, temperature, reference=None, batch_size=3):
    """Sample, then evaluate: what a PPO step does before it scores."""
    reference = reference or frozen_copy(policy.language_model)
    prompts = cases.prompt_batch(tokenizer)
    settings = SamplingSettings(max_new_tokens=9, temperature=temperature)
    noise = uniform_rows(list(range(len(prompts))), 9, 0)
    responses = sample(policy.language_model, tokenizer, prompts, settings, noise)
    return evaluate(policy, reference, prompts, responses, temperature=temperature, batch_size=batch_size)


@cases.every_architecture
@pytest.mark.parametrize("separate", [False, True], ids=["shared value head", "separate value model"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_ratio_is_one_and_the_kl_to_the_reference_is_zero(architecture, tokenizer, temperature, separate):
    policy = cases.make_policy(architecture, temperature=temperature, separate=separate)
    policy.train()
    disable_dropout(policy)
    rollout = rolled_out(policy, tokenizer, temperature=temperature)
    assert rollout.mask.sum() > len(rollout.mask)  # more than one token a response
    assert (rollout.logprobs - rollout.ref_logprobs)[rollout.mask].abs().max() <= 1e-6
    for rows in ([0, 1, 2, 3], [3, 1], [2]):  # any minibatch, any micro-batch
        again = policy(**{name: tensor[rows] for name, tensor in rollout.inputs.items()})
        ratio = (again.logprobs - rollout.logprobs[rows]).exp()[rollout.mask[rows]]
        assert (ratio - 1).abs().max() < 1e-5


@cases.every_architecture
def test_the_log_probability_of_token_t_is_read_at_the_position_that_predicts_it(architecture):
    policy = cases.make_policy(architecture, temperature=0.7)
    evaluation = policy(**cases.inputs_of(extra_left=2, extra_right=1))
    for row in ROWS:
        prompt, response = cases.PROMPT_IDS[row], cases.RESPONSE_IDS[row]
        expected = cases.plain_logprobs(policy.language_model, prompt, response, temperature=0.7)
        actual = evaluation.logprobs[row, : len(response)].double()
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


def test_the_entropy_of_token_t_is_that_of_the_distribution_it_was_drawn_from(architecture):
    policy = cases.make_policy(architecture, temperature=0.7)
    evaluation = policy(**cases.inputs_of())
    for row in ROWS:
        prompt, response = cases.PROMPT_IDS[row], cases.RESPONSE_IDS[row]
        logprobs = (cases.plain_logits(policy.language_model, [*prompt, *response]) / 0.7).log_softmax(-1)
        expected = -(logprobs.exp() * logprobs).sum(-1)[len(prompt) - 1 : -1]
        actual = evaluation.entropy[row, : len(response)].double()
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("separate", [False, True], ids=["shared value head", "separate value model"])
def test_the_value_at_t_is_read_at_the_position_that_predicts_token_t(architecture, separate):
    policy = cases.make_policy(architecture, separate=separate).double()
    evaluation = policy(**cases.inputs_of(extra_left=1, extra_right=2))
    trunk = policy.value_model.trunk if separate else policy.language_model.base_model
    head = policy.value_model.head if separate else policy.value_head
    for row in ROWS:
        prompt, response = cases.PROMPT_IDS[row], cases.RESPONSE_IDS[row]
        hidden = trunk(torch.tensor([[*prompt, *response]]), use_cache=False).last_hidden_state[0]
        expected = head(hidden).squeeze(-1)[len(prompt) - 1 : -1]
        actual = evaluation.values[row, : len(response)].double()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@cases.every_architecture
@pytest.mark.parametrize("separate", [False, True], ids=["shared value head", "separate value model"])
@pytest.mark.parametrize(
    "padding",
    [
        {"extra_left": 4, "extra_right": 3},
        {"pad": 0},  # eos
        {"pad": 10_000, "extra_left": 1, "extra_right": 1},  # outside the vocabulary
        {"pad": -100, "extra_right": 5},
    ],
    ids=str,
)
def test_the_amount_and_the_id_of_padding_change_nothing(architecture, separate, padding):
    policy = cases.make_policy(architecture, separate=separate)
    plain, padded = cases.inputs_of(), cases.inputs_of(**padding)
    expected, actual = policy(**plain), policy(**padded)
    for one, other in zip(expected[:3], actual[:3], strict=True):
        width = one.shape[1]
        assert other.isfinite().all()
        cases.assert_close_on(plain["response_mask"], other[:, :width], one, atol=2e-5)


def test_an_eos_inside_the_prompt_is_a_token_like_any_other(architecture):
    policy = cases.make_policy(architecture)
    prompts = [[5, 0, 12], [0], [3, 3, 0, 0, 8]]
    evaluation = policy(**cases.inputs_of(prompts, pad=0, extra_left=2))
    for row in ROWS:
        expected = cases.plain_logprobs(policy.language_model, prompts[row], cases.RESPONSE_IDS[row])
        actual = evaluation.logprobs[row, : len(expected)].double()
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


def test_what_follows_a_response_cannot_reach_its_gradient(architecture):
    policy = cases.make_policy(architecture)
    gradients = []
    for padding in ({}, {"extra_left": 3, "extra_right": 2, "pad": 99}):
        inputs = cases.inputs_of(**padding)
        policy.zero_grad()
        evaluation = policy(**inputs)
        loss = torch.where(inputs["response_mask"], evaluation.logprobs + evaluation.values, 0).sum()
        loss.backward()
        gradients.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        scale = 1 + float(one.abs().max())
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6 * scale)


def test_the_rollout_keeps_the_inputs_and_appends_a_zero_value_after_the_response(architecture):
    policy = cases.make_policy(architecture)
    reference = cases.make_model(architecture, seed=5)
    inputs = cases.inputs_of()
    prompts = PromptBatch(inputs["prompt_ids"], inputs["prompt_mask"], [""] * 3, [0, 1, 2])
    responses = cases.responses_of(inputs)
    pieces = [evaluate(policy, reference, prompts, responses, temperature=0.7, batch_size=size) for size in (1, 2, 3)]
    mask = inputs["response_mask"]
    for rollout in pieces:
        assert set(rollout.inputs) == set(inputs)
        assert rollout.values.shape == (3, mask.shape[1] + 1)
        assert (rollout.values[:, -1] == 0).all()
        assert not rollout.logprobs.requires_grad
        for name in ("logprobs", "ref_logprobs", "entropy"):
            cases.assert_close_on(mask, getattr(rollout, name), getattr(pieces[0], name))
    for row in ROWS:
        prompt, response = cases.PROMPT_IDS[row], cases.RESPONSE_IDS[row]
        expected = cases.plain_logprobs(reference, prompt, response, temperature=0.7)
        actual = pieces[0].ref_logprobs[row, : len(response)].double()
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


def test_a_zero_initialised_value_head_says_zero_everywhere(architecture):
    policy = PolicyWithValue(cases.make_model(architecture))
    assert (policy(**cases.inputs_of()).values == 0).all()


def test_only_an_entropy_bonus_makes_the_entropy_differentiable():
    inputs = cases.inputs_of()
    assert not cases.make_policy()(**inputs).entropy.requires_grad
    assert cases.make_policy(differentiable_entropy=True)(**inputs).entropy.requires_grad
    with torch.no_grad():
        assert not cases.make_policy(differentiable_entropy=True)(**inputs).entropy.requires_grad


def test_log_probabilities_of_bf16_logits_are_computed_in_float32_temperature_included():
    model = cases.make_model().bfloat16()
    inputs = cases.inputs_of([[5, 9, 12]], [[10, 11, 0]])
    with torch.no_grad():
        logits = model(torch.tensor([[5, 9, 12, 10, 11, 0]]), use_cache=False).logits[0]
        actual = response_logprobs(model, inputs, temperature=0.7)
    expected = (logits.float() / 0.7).log_softmax(-1)[torch.arange(2, 5), torch.tensor([10, 11, 0])]
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual[0], expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- dropout, copies


def test_without_dropout_two_forwards_in_train_mode_are_equal(architecture):
    model = cases.make_model(architecture, dropout=0.5).train()
    ids = torch.tensor([[5, 9, 12, 10, 11]])
    assert not torch.equal(model(ids).logits, model(ids).logits)  # the configuration's dropout does act
    disable_dropout(model)
    assert model.training
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(model(ids).logits, copy.deepcopy(model).eval()(ids).logits)


def test_a_frozen_copy_shares_no_storage_and_takes_no_gradient(architecture):
    model = cases.make_model(architecture)
    reference = frozen_copy(model)
    mine = {p.data_ptr() for p in model.parameters()}
    assert not mine & {p.data_ptr() for p in reference.parameters()}
    assert not any(p.requires_grad for p in reference.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert not reference.training
    before = copy.deepcopy(reference.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in reference.state_dict().items())


# ---------------------------------------------------------------------------------------------------- value models


def test_a_value_model_from_a_reward_model_starts_as_its_normalised_score(architecture):
    from ppo_rlhf.rewards import ScoringNetwork
    from ppo_rlhf.train.reward_model import classifier_from

    classifier = classifier_from(cases.make_model(architecture)).eval()
    ids = torch.tensor([[5, 9, 12, 10, 11, 0], [7, 20, 0, 1, 1, 1]])
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    raw, _ = ScoringNetwork(classifier)(ids, mask)
    values = TokenValues.from_reward_model(classifier, mean=0.25, scale=4.0)(ids, mask)
    last = torch.stack([values[0, 5], values[1, 2]])
    torch.testing.assert_close(last, (raw - 0.25) / 4.0, rtol=1e-5, atol=1e-6)
    assert values.shape == (2, 6)


def test_a_value_model_with_a_zero_head_says_zero(architecture):
    head = nn.Linear(16, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    values = TokenValues(cases.make_model(architecture).base_model, head)
    ids, mask = torch.tensor([[5, 9, 12]]), torch.ones(1, 3, dtype=torch.bool)
    assert (values(ids, mask) == 0).all()


@pytest.mark.parametrize("separate", [False, True], ids=["shared value head", "separate value model"])
def test_checkpointed_activations_are_computed_twice_and_give_the_same_gradients(architecture, separate):
    inputs = cases.inputs_of()
    gradients, forwards = [], []
    for checkpointed in (False, True):
        policy = cases.make_policy(architecture, separate=separate).train()
        if checkpointed:
            policy.checkpoint_activations()
        trunks = [policy.language_model, *([policy.value_model.trunk] if separate else [])]
        counts = [[] for _ in trunks]
        for trunk, count in zip(trunks, counts, strict=True):
            layer = next(module for module in trunk.modules() if isinstance(module, GradientCheckpointingLayer))
            first = next(module for module in layer.modules() if not list(module.children()))
            first.register_forward_hook(lambda *_, count=count: count.append(1))
        evaluation = policy(**inputs)
        torch.where(inputs["response_mask"], evaluation.logprobs + evaluation.values, 0).sum().backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
        forwards.append([len(count) for count in counts])
    without, with_checkpoints = gradients
    assert without.keys() == with_checkpoints.keys()
    assert any(name.startswith("value_") for name in without)
    for name, gradient in without.items():
        torch.testing.assert_close(with_checkpoints[name], gradient, rtol=0, atol=1e-6)
    assert forwards == [[1] * len(trunks), [2] * len(trunks)]
