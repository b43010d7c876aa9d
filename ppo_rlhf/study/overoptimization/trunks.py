"""The policies that the proxies grow from: GPT-2s that read and write alike, of three sizes."""

from typing import TYPE_CHECKING

from ppo_rlhf.toy import model, policy

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

__all__ = ["middle", "narrow", "policy"]


def narrow() -> "tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]":
    """One layer of 32: 49 thousand weights."""
    return model.gpt2(width=32, num_layers=1)


def middle() -> "tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]":
    """Two layers of 80: a quarter of a million weights."""
    return model.gpt2(width=80, num_layers=2)
