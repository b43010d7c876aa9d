"""Tiny language models of several architectures with random weights, and byte-level tokenizers, made on the spot."""

from __future__ import annotations

from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

EOS, PAD = "<|endoftext|>", "<|pad|>"  # EOS: the name that Qwen2Tokenizer adds where it is missing
ALL_BYTES = "".join(sorted(pre_tokenizers.ByteLevel.alphabet()))


def _gpt2(dropout, **shared):
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, **dropouts, **shared))


def _llama_like(config_class, model_class, dropout, **options):
    return model_class(
        config_class(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_dropout=dropout,
            **{"pad_token_id": None, "tie_word_embeddings": False, **options},
        )
    )


def _gpt_neox(dropout, **shared):
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            attention_dropout=dropout,
            hidden_dropout=dropout,
            **shared,
        )
    )


def _opt(dropout, *, initializer_range, **shared):
    options = {"init_std": initializer_range, "dropout": dropout, "attention_dropout": dropout, "pad_token_id": 1}
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(num_attention_heads=2, **sizes, **options, **shared))


def _phi(dropout, **shared):
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop"), dropout)
    return _llama_like(PhiConfig, PhiForCausalLM, dropout, **dropouts, **shared)


ARCHITECTURES = {
    "gpt2": _gpt2,
    "llama": lambda dropout, **shared: _llama_like(LlamaConfig, LlamaForCausalLM, dropout, **shared),
    "qwen2": lambda dropout, **shared: _llama_like(Qwen2Config, Qwen2ForCausalLM, dropout, **shared),
    "gpt_neox": _gpt_neox,
}
MORE_ARCHITECTURES = {  # of which the invariants alone are asked
    "qwen3": lambda dropout, **shared: _llama_like(Qwen3Config, Qwen3ForCausalLM, dropout, head_dim=4, **shared),
    "mistral": lambda dropout, **shared: _llama_like(
        MistralConfig, MistralForCausalLM, dropout, sliding_window=8, **shared
    ),
    "gemma": lambda dropout, **shared: _llama_like(
        GemmaConfig, GemmaForCausalLM, dropout, head_dim=4, **{**shared, "tie_word_embeddings": True}
    ),
    "opt": _opt,
    "phi": _phi,
}


def make_model(architecture="gpt2", *, vocabulary, context, spread, dropout=0.0, seed=0):
    """A causal language model of some thousand random weights; spread: how far from uniform its predictions are."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = {**ARCHITECTURES, **MORE_ARCHITECTURES}[architecture](
            dropout,
            vocab_size=vocabulary,
            max_position_embeddings=context,
            initializer_range=spread,
            bos_token_id=0,
            eos_token_id=0,
        )
    return model.eval()


@cache
def _trained(texts, size, alphabet, specials):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(specials), initial_alphabet=list(alphabet), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe.to_str()


def make_tokenizer(texts, *, size, alphabet=ALL_BYTES, eos=EOS, pad=PAD):
    """Byte-level BPE: the special tokens first, then the alphabet, then merges learnt from the texts."""
    specials = tuple(dict.fromkeys(token for token in (eos, pad) if token is not None))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(tuple(texts), size, alphabet, specials)),
        bos_token=eos,
        eos_token=eos,
        pad_token=pad,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


CHAT = (  # ChatML; a turn ends with its end token and a new line
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_CHAT = (  # the same, with marks around what an assistant writes
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_chat_tokenizer(texts, *, size, template=CHAT):
    """A tokenizer with a chat template, whose turns end with eos."""
    tokenizer = make_tokenizer(texts, size=size, eos="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = template
    return tokenizer
