"""A saved policy: plain transformers alone loads it and samples as the run did."""

from __future__ import annotations

import copy
import json
import sys

import language_cases as cases
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_rlhf.errors import UserError
from ppo_rlhf.models import load_policy, load_tokenizer, save_policy, tokenizer_with_pad


@pytest.fixture
def saved(architecture, tokenizer_without_pad, tmp_path):
    """(model, folder) of a checkpoint with pad = eos, prepared and saved by us."""
    model = cases.make_model(architecture)
    tokenizer = tokenizer_with_pad(model, tokenizer_without_pad, setting="policy")
    save_policy(model, tokenizer, tmp_path / "policy", temperature=0.7, stop_ids=[0, 9])
    return model, tmp_path / "policy"


@cases.every_architecture
def test_plain_transformers_loads_the_folder_and_its_weights_are_the_same(saved):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}
    assert (folder / "model.safetensors").is_file()


def test_the_saved_tokenizer_pads_on_the_left_with_a_token_that_is_not_eos(saved):
    model, folder = saved
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert tokenizer.pad_token_id < model.get_input_embeddings().num_embeddings
    batch = tokenizer(cases.TEXTS, padding=True, return_tensors="pt")
    ours = cases.prompt_batch(tokenizer)
    assert torch.equal(batch["input_ids"], ours.ids)
    assert torch.equal(batch["attention_mask"].bool(), ours.mask)
    assert AutoModelForCausalLM.from_pretrained(folder).config.pad_token_id == tokenizer.pad_token_id


def test_the_generation_settings_are_the_runs(saved):
    model, folder = saved
    written = json.loads((folder / "generation_config.json").read_text())
    assert written["temperature"] == 0.7
    assert written["eos_token_id"] == [0, 9]
    assert written["do_sample"] is True
    assert not written.get("top_k")
    assert written.get("top_p") in (None, 1.0)
    assert written["pad_token_id"] == model.config.pad_token_id


def test_plain_generate_samples_from_the_logits_over_the_temperature_and_nothing_else(saved):
    _, folder = saved
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(cases.TEXTS, padding=True, return_tensors="pt")
    output = model.generate(
        **batch,
        do_sample=True,
        top_k=0,
        max_new_tokens=6,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    for scores, logits in zip(output.scores, output.logits, strict=True):
        torch.testing.assert_close(scores, logits / 0.7)
    new = output.sequences[:, batch["input_ids"].shape[1] :]
    for line in new.tolist():
        stops = [t for t, token in enumerate(line) if token in (0, 9)]
        if stops:
            assert set(line[stops[0] + 1 :]) <= {tokenizer.pad_token_id}


def test_a_policy_saved_loaded_and_saved_again_stays_the_same(saved, tmp_path):
    model, folder = saved
    loaded, tokenizer = load_policy(str(folder), setting="policy")
    assert loaded.dtype == torch.float32
    ids = torch.tensor([[5, 9, 12, 10]])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)  # by another form of attention
    save_policy(loaded, tokenizer, tmp_path / "again", temperature=0.7, stop_ids=[0, 9])
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "again")) == len(tokenizer)


def test_a_checkpoint_whose_pad_is_eos_gets_a_pad_of_its_own_and_keeps_its_logits(architecture, tokenizer_without_pad):
    model = cases.make_model(architecture)
    vocabulary = len(tokenizer_without_pad)
    model.resize_token_embeddings(vocabulary)  # as GPT-2: no row to spare
    original = copy.deepcopy(model)
    tokenizer = tokenizer_with_pad(model, tokenizer_without_pad, setting="policy")
    assert tokenizer.pad_token_id == vocabulary
    assert tokenizer.eos_token_id == 0
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == vocabulary + 1
    ids = torch.tensor([[5, 9, 12, 10]])
    torch.testing.assert_close(model(ids).logits[..., :vocabulary], original(ids).logits, rtol=0, atol=0)


def test_a_pad_token_of_its_own_is_kept_and_nothing_is_resized(architecture, tokenizer):
    model = cases.make_model(architecture)
    tokenizer.padding_side = "right"
    kept = tokenizer_with_pad(model, tokenizer, setting="policy")
    assert kept.pad_token_id == 1
    assert kept.padding_side == "left"
    assert model.get_input_embeddings().num_embeddings == cases.VOCABULARY


def test_a_tokenizer_without_eos_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="policy: the tokenizer has no eos token"):
        tokenizer_with_pad(cases.make_model(), tokenizer, setting="policy")


def test_a_missing_folder_an_empty_one_and_an_unknown_name_are_named(tmp_path):
    with pytest.raises(UserError, match=f"policy: there is no folder {tmp_path}/nowhere"):
        load_policy(f"{tmp_path}/nowhere", setting="policy")
    with pytest.raises(UserError, match=f"policy: {tmp_path} cannot be loaded"):
        load_policy(str(tmp_path), setting="policy")
    with pytest.raises(UserError, match="policy: no_such_model cannot be loaded"):
        load_policy("no_such_model", setting="policy")


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    cases.make_model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"policy: .*tokenizer"):
        load_tokenizer(str(tmp_path), setting="policy")


def test_a_policy_comes_from_a_function_too(monkeypatch):
    monkeypatch.setattr(
        sys.modules["language_cases"], "made", lambda: (cases.make_model(), cases.make_tokenizer()), raising=False
    )
    model, tokenizer = load_policy("language_cases:made", setting="policy")
    assert tokenizer.padding_side == "left"
    assert model.config.pad_token_id == 1
