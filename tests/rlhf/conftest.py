"""Fixtures of the language side: tiny models with random weights and a tokenizer, all made here, nothing downloaded."""

from __future__ import annotations

import datasets
import language_cases as cases
import pytest
import tiny_models


@pytest.fixture(params=sorted(tiny_models.ARCHITECTURES))
def architecture(request):
    """The name of each model family in turn."""
    return request.param


@pytest.fixture
def tokenizer():
    """Byte-level BPE with a pad token of its own."""
    return cases.make_tokenizer()


@pytest.fixture
def tokenizer_without_pad():
    """The tokenizer of a GPT-2 checkpoint: people set pad = eos."""
    return cases.make_tokenizer(pad_is_eos=True)


@pytest.fixture
def data_cache(tmp_path, monkeypatch):
    """`datasets` keeps its copies in a folder of this test alone."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    return tmp_path
