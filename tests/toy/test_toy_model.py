"""The tokenizer and the tiny GPT-2 made on the spot."""

import statistics
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ppo_rlhf import toy
from ppo_rlhf.toy import model as toy_model

TOKENIZER = toy_model.tokenizer()


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    return toy.policy()[0]


def test_the_policy_has_a_million_parameters_and_knows_its_special_tokens(policy):
    assert policy.num_parameters() >= 1_000_000
    assert policy.config.vocab_size == len(TOKENIZER)
    assert TOKENIZER.eos_token_id != TOKENIZER.pad_token_id
    assert TOKENIZER.padding_side == "left"
    for config in (policy.config, policy.generation_config):
        assert config.eos_token_id == TOKENIZER.eos_token_id
        assert config.pad_token_id == TOKENIZER.pad_token_id


def test_the_seed_of_torch_decides_the_weights_and_the_tokenizer_needs_none(policy):
    torch.manual_seed(0)
    again, tokenizer = toy.policy()
    assert all(torch.equal(*pair) for pair in zip(policy.parameters(), again.parameters(), strict=True))
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()


def test_completions_are_20_tokens_on_average_and_most_words_are_one_token(demonstrations):
    completions = [row["completion"] for row in demonstrations[:1000]]
    lengths = [len(ids) for ids in TOKENIZER(completions, add_special_tokens=False).input_ids]
    pieces = statistics.mean(map(len, (text.split() for text in completions)))
    assert statistics.mean(lengths) >= 20
    assert max(lengths) < 48
    assert statistics.mean(lengths) < 1.05 * pieces


def test_prompt_and_completion_can_be_tokenized_apart(demonstrations):
    for row in demonstrations[:200]:
        apart = TOKENIZER(row["prompt"]).input_ids + TOKENIZER(row["completion"], add_special_tokens=False).input_ids
        assert TOKENIZER(row["prompt"] + row["completion"]).input_ids == apart


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_tokenizer(text):
    assert TOKENIZER.decode(TOKENIZER(text, add_special_tokens=False).input_ids) == text


def test_every_text_begins_with_eos_so_that_the_model_knows_it_as_an_input():
    ids = TOKENIZER("we saw it .").input_ids
    assert ids[0] == TOKENIZER.eos_token_id
    assert len(ids) == 5


def test_the_tokenizer_is_the_same_when_saved_and_loaded(tmp_path, demonstrations):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [row["prompt"] + row["completion"] for row in demonstrations[:100]] + ["naïve 文字 ."]
    assert loaded(texts).input_ids == TOKENIZER(texts).input_ids
    assert loaded.padding_side == "left"
    assert loaded.decode(loaded(texts[-1]).input_ids, skip_special_tokens=True) == texts[-1]


def test_the_task_itself_imports_nothing_heavy():
    program = "import sys, ppo_rlhf.toy; sys.exit(bool({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
