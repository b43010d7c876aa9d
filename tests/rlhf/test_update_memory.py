"""What an update of a language model's policy holds in memory at once, and that its gradient does not depend on it."""

import copy

import pytest
import torch
from language_cases import inputs_of, make_policy

from ppo_rlhf.core import Experience, ppo_loss
from ppo_rlhf.models import use_quick_kernels
from ppo_rlhf.packing import use_packed_attention
from ppo_rlhf.settings import PPOSettings
from ppo_rlhf.update import _gradient, _loss_settings

SETTINGS = PPOSettings(value_coef=0.3, entropy_coef=0.02)


def experience_of(policy, seed=3):
    """A rollout of which the policy has moved on, in float64."""
    inputs = inputs_of()
    with torch.no_grad():
        evaluation = policy(**inputs)
    generator = torch.Generator().manual_seed(seed)

    def noise():
        return torch.randn(evaluation.values.shape, generator=generator, dtype=torch.float64)

    return Experience(
        inputs=inputs,
        logprobs=evaluation.logprobs + 0.2 * noise(),
        values=evaluation.values + 0.2 * noise(),
        advantages=noise(),
        returns=noise(),
        mask=inputs["response_mask"],
    )


def gradients_of(module):
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kl_penalty_coef", [0.0, 0.1])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_policy_and_value_model_in_turn_have_the_gradient_of_both_at_once(micro_batch_size, kl_penalty_coef):
    policy = make_policy(separate=True, differentiable_entropy=True).double()
    experience = experience_of(policy)
    settings = _loss_settings(SETTINGS, kl_penalty_coef, None, torch.device("cpu"))
    count = experience.mask.sum()
    at_once = copy.deepcopy(policy)
    loss, expected = ppo_loss(at_once(**experience.inputs), experience, **settings, count=count)
    loss.backward()
    statistics = _gradient(policy, experience, settings, count, None, micro_batch_size)
    assert statistics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(statistics[name], value, rtol=1e-12, atol=1e-14)
    found, wanted = gradients_of(policy), gradients_of(at_once)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


def test_the_language_model_is_done_before_the_value_model_begins():
    """So that memory holds the activations of one of them."""
    policy = make_policy(separate=True)
    experience = experience_of(policy)
    events = []
    for name, trunk in (("policy", policy.language_model.base_model), ("values", policy.value_model.trunk)):
        trunk.register_forward_pre_hook(lambda *_, name=name: events.append(f"{name} forward"))
        trunk.wpe.weight.register_post_accumulate_grad_hook(lambda _, name=name: events.append(f"{name} backward"))
    settings = _loss_settings(SETTINGS, 0.0, None, torch.device("cpu"))
    _gradient(policy, experience, settings, experience.mask.sum(), None, 3)
    assert events == ["policy forward", "policy backward", "values forward", "values backward"]


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_checkpointing_a_packed_forward_keeps_less_and_changes_no_gradient(architecture, separate):
    """Every layer runs once more in the backward pass, on the same packed tokens."""
    plain = make_policy(architecture, separate=separate).train()
    use_quick_kernels(plain.language_model)
    if separate:
        assert use_packed_attention(plain.value_model.trunk)
    checkpointed = copy.deepcopy(plain)
    checkpointed.checkpoint_activations()
    experience = experience_of(plain)
    settings = _loss_settings(PPOSettings(), 0.0, None, torch.device("cpu"))
    calls, kept = {}, {}
    for name, policy in (("plain", plain), ("checkpointed", checkpointed)):
        trunks = [policy.language_model.base_model] + ([policy.value_model.trunk] if separate else [])
        for trunk in trunks:
            for layer in trunk.h if architecture == "gpt2" else trunk.layers:
                layer.mlp.register_forward_pre_hook(
                    lambda module, arguments, name=name: calls.setdefault(name, []).append(arguments[0].shape[:2])
                )
        kept[name] = _bytes_kept(policy, experience)
        calls[name].clear()
        _gradient(policy, experience, settings, experience.mask.sum(), None, 3)
    assert len(calls["checkpointed"]) == 2 * len(calls["plain"]) == 2 * 2 * (1 + separate)  # two layers each
    assert set(calls["checkpointed"]) == {(1, 64)}  # all tokens in one row
    assert kept["checkpointed"] < 0.6 * kept["plain"]
    found = gradients_of(checkpointed)
    for name, gradient in gradients_of(plain).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-8)


def _bytes_kept(policy, experience):
    """By autograd outside of checkpointed layers, weights aside."""
    weights = {parameter.untyped_storage()._cdata for parameter in policy.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(**experience.inputs)
    return sum(storage.nbytes() for storage in kept.values())
