"""Adapters: what they share, what they train, and that every fast path is the plain forward with them too."""

from __future__ import annotations

import copy
import sys
from itertools import product

import language_cases as cases
import pytest
import torch
from transformers import AutoModelForCausalLM

from ppo_rlhf.adapters import has_adapter, merged, on_same_base, rank_of, share_weights, train_adapter
from ppo_rlhf.errors import UserError
from ppo_rlhf.models import disable_dropout, frozen_copy, load_policy, save_policy, use_quick_kernels
from ppo_rlhf.policy import PolicyWithValue
from ppo_rlhf.rewards import RewardModel
from ppo_rlhf.rollout import evaluate
from ppo_rlhf.sampling import SamplingSettings, sample
from ppo_rlhf.seeding import uniform_rows
from ppo_rlhf.settings import LoRASettings
from ppo_rlhf.train.reward_model import classifier_from

LORA = LoRASettings(rank=2, alpha=4.0)


def perturbed(model, *, seed=1):
    """The model with an adapter that says something."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.copy_(0.3 * torch.randn_like(weight))
    return model


def adapted(architecture="gpt2", settings=LORA, **options):
    model = cases.make_model(architecture, **options)
    train_adapter(model, settings)
    return perturbed(use_quick_kernels(model))


def memory_of(model):
    return {weight.data_ptr() for weight in model.parameters()}


def test_a_new_adapter_changes_no_output_and_is_all_that_is_trained(architecture):
    model = cases.make_model(architecture)
    ids = torch.tensor([[5, 9, 12, 10]])
    before = model(ids).logits
    train_adapter(model, LORA)
    assert torch.equal(model(ids).logits, before)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    assert rank_of(model) == 2


def test_without_a_rank_nothing_changes():
    model = cases.make_model()
    train_adapter(model, LoRASettings())
    assert not has_adapter(model)
    assert merged(model) is model
    assert rank_of(model) == 0
    assert all(weight.requires_grad for weight in model.parameters())


def test_the_reference_of_an_adapted_policy_shares_its_base_and_owns_its_adapter(architecture):
    model = adapted(architecture)
    reference = frozen_copy(model)
    trained = {weight.data_ptr() for weight in model.parameters() if weight.requires_grad}
    assert memory_of(model) & memory_of(reference) == memory_of(model) - trained
    ids = torch.tensor([[5, 9, 12, 10]])
    before = model(ids).logits
    perturbed(model, seed=2)
    assert torch.equal(reference(ids).logits, before)
    assert not torch.equal(model(ids).logits, before)
    assert not any(weight.requires_grad for weight in reference.parameters())


def test_an_adapter_on_the_same_base_is_trained_apart_and_leaves_the_flags_of_the_first(architecture):
    first = cases.make_model(architecture)
    other = on_same_base(first)
    train_adapter(other, LORA)
    assert memory_of(first) <= memory_of(other)
    assert all(weight.requires_grad for weight in first.parameters())
    ids = torch.tensor([[5, 9, 12, 10]])
    before = first(ids).logits
    perturbed(other)
    assert torch.equal(first(ids).logits, before)
    assert not torch.equal(other.eval()(ids).logits, before)


def test_two_copies_of_one_base_become_one_and_what_differs_stays(architecture):
    policy, reward = adapted(architecture), adapted(architecture)
    with torch.no_grad():
        reward.get_output_embeddings().weight.add_(1)  # tied to the input embeddings in GPT-2
    before = [model(torch.tensor([[5, 9, 12, 10]])).logits for model in (policy, reward)]
    apart = len(memory_of(policy) | memory_of(reward))
    saved = share_weights(reward, policy)
    assert saved > 0
    assert len(memory_of(policy) | memory_of(reward)) < apart
    assert policy.get_output_embeddings().weight is not reward.get_output_embeddings().weight
    for model, logits in zip((policy, reward), before, strict=True):
        assert torch.equal(model(torch.tensor([[5, 9, 12, 10]])).logits, logits)
        assert all(weight.requires_grad == (".lora_" in name) for name, weight in model.named_parameters())


@cases.every_architecture
def test_merging_gives_the_plain_model_of_the_sum_and_leaves_the_adapted_one_alone(architecture, tmp_path):
    model = adapted(architecture)
    ids = torch.tensor([[5, 9, 12, 10]])
    before = model(ids).logits
    plain = merged(model)
    assert set(plain.state_dict()) == set(cases.make_model(architecture).state_dict())
    torch.testing.assert_close(plain(ids).logits, before, rtol=0, atol=1e-4)
    assert torch.equal(model(ids).logits, before)
    assert has_adapter(model)
    save_policy(model, cases.make_tokenizer(), tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert not has_adapter(loaded)
    torch.testing.assert_close(loaded(ids).logits, before, rtol=0, atol=1e-4)


def test_the_merged_weight_is_the_sum_of_the_base_and_the_scaled_product():
    model = adapted("llama")
    layer = model.model.layers[0].self_attn.q_proj
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = layer.base_layer.weight + 4.0 / 2 * product
    torch.testing.assert_close(merged(model).model.layers[0].self_attn.q_proj.weight, expected)


def test_an_adapter_s_folder_holds_the_adapter_alone_and_loads_with_its_base(tmp_path):
    base, tokenizer = cases.make_model("llama"), cases.make_tokenizer()
    save_policy(base, tokenizer, tmp_path / "base")
    model, tokenizer = load_policy(str(tmp_path / "base"), setting="policy")
    train_adapter(model, LoRASettings(rank=2, merge=False))
    perturbed(model)
    save_policy(model, tokenizer, tmp_path / "adapter", merge=False)
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded, _ = load_policy(str(tmp_path / "adapter"), setting="policy")
    ids = torch.tensor([[5, 9, 12, 10]])
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    save_policy(loaded, tokenizer, tmp_path / "again", merge=False)
    again, _ = load_policy(str(tmp_path / "again"), setting="policy")
    assert torch.equal(again(ids).logits, loaded(ids).logits)
    save_policy(loaded, tokenizer, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(plain(ids).logits, loaded(ids).logits, rtol=0, atol=1e-4)
    train_adapter(loaded, LoRASettings())
    assert {n for n, w in loaded.named_parameters() if w.requires_grad} == {
        n for n, w in model.named_parameters() if w.requires_grad
    }


@cases.every_architecture
def test_a_reward_model_s_adapter_scores_the_same_when_it_is_loaded(architecture, tmp_path):
    tokenizer = cases.make_tokenizer()
    save_policy(cases.make_model(architecture), tokenizer, tmp_path / "base")
    policy, tokenizer = load_policy(str(tmp_path / "base"), setting="policy")
    classifier = classifier_from(policy)
    train_adapter(classifier, LoRASettings(rank=2, merge=False), heads=["score"])
    reward_model = RewardModel(use_quick_kernels(perturbed(classifier)), tokenizer)
    reward_model.set_normalization(0.25, 3.0)
    reward_model.save(tmp_path / "reward")
    loaded = RewardModel.load(tmp_path / "reward", setting="reward")
    texts = cases.TEXTS, ["go!", " the park", "a cat", "sea"]
    torch.testing.assert_close(loaded(*texts), reward_model(*texts), rtol=0, atol=1e-6)


SETTINGS = {
    "all matrices": LORA,
    "some": LoRASettings(rank=3, target_modules=("c_attn", "q_proj", "v_proj", "query_key_value")),
    "the head as well": LoRASettings(rank=2, target_modules=("lm_head", "embed_out", "q_proj")),
}
SEPARATE_HEADS = ["llama", "qwen2", "gpt_neox"]  # GPT-2's is its embeddings


@pytest.mark.parametrize(
    ("family", "which"), [("gpt2", name) for name in list(SETTINGS)[:2]] + list(product(SEPARATE_HEADS, SETTINGS))
)
def test_sampler_and_packed_forwards_are_the_plain_forward_with_the_adapter(family, which, tokenizer):
    model = adapted(family, SETTINGS[which], dropout=0.1)
    disable_dropout(model)
    policy, prompts = PolicyWithValue(model, temperature=0.7).train(), cases.prompt_batch(tokenizer)
    noise = uniform_rows(list(range(len(prompts))), 9, 0)
    responses = sample(model, tokenizer, prompts, SamplingSettings(max_new_tokens=9, temperature=0.7), noise)
    rollout = evaluate(policy, frozen_copy(model), prompts, responses, temperature=0.7, batch_size=3)
    cases.assert_close_on(responses.mask, rollout.ref_logprobs, rollout.logprobs)
    cases.assert_close_on(responses.mask, responses.logprobs, rollout.logprobs, atol=3e-5)
    for row, ids in enumerate(responses.ids):
        response = ids[responses.mask[row]].tolist()
        prompt = prompts.ids[row][prompts.mask[row]].tolist()
        expected = cases.plain_logprobs(copy.deepcopy(model), prompt, response, temperature=0.7)
        actual = rollout.logprobs[row, : len(response)].double()
        torch.testing.assert_close(actual, expected, rtol=0, atol=3e-5)


# ------------------------------------------------------------------------------------------------------- mistakes


def test_another_rank_than_that_of_the_adapter_is_refused():
    with pytest.raises(UserError, match=r"lora\.rank=8, but the model has an adapter of rank 2.*ppo-rlhf export"):
        train_adapter(adapted(), LoRASettings(rank=8))


def test_a_module_that_the_model_has_not_is_named():
    with pytest.raises(UserError, match=r"lora\.target_modules=\['q_prog'\]"):
        train_adapter(cases.make_model(), LoRASettings(rank=2, target_modules=("q_prog",)))


def test_an_adapter_on_a_head_that_is_the_embeddings_is_refused():
    with pytest.raises(UserError, match=r"lora\.target_modules=\['lm_head'\]: this model's head is its embeddings"):
        train_adapter(cases.make_model("gpt2"), LoRASettings(rank=2, target_modules=("lm_head",)))


def test_a_missing_peft_is_told_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"install 'ppo-rlhf\[lora\]'"):
        train_adapter(cases.make_model(), LORA)


def test_an_adapter_to_be_saved_alone_needs_a_base_that_can_be_loaded():
    with pytest.raises(UserError, match=r"lora\.merge=false: the base must be a folder"):
        train_adapter(merged(adapted()), LoRASettings(rank=2, merge=False))


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_weights_need_bitsandbytes(bits, tmp_path, monkeypatch):
    monkeypatch.setattr("ppo_rlhf.models.is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError, match=rf"lora\.base_bits={bits} needs bitsandbytes"):
        load_policy(str(tmp_path), setting="policy", base_bits=bits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "lora.rank=-1"),
        ({"rank": 2, "alpha": 0}, "lora.alpha=0"),
        ({"rank": 2, "dropout": 1.0}, "lora.dropout=1.0"),
        ({"base_bits": 4, "merge": False}, "lora.base_bits=4: such weights cannot be trained"),
        ({"rank": 2, "base_bits": 8}, "lora.base_bits=8: an adapter cannot be merged"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError) as error:
        LoRASettings(**settings)
    assert str(error.value).startswith(message)
