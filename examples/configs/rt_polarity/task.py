"""Movie-review sentences (Pang and Lee, 2005) as a pipeline's data: `pipeline.yaml` names these functions.

Each polarity's sentences are split once, at random: 70 % train every stage, 10 % are held out of it, and 20 % are seen
by no stage at all: on those the judge is fitted.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

PROMPT_WORDS = 3
VOCABULARY = 3000
SHARES = {"train": 0.7, "held_out": 0.1, "judge": 0.2}
EOS, PAD = "<|endoftext|>", "<|pad|>"


@cache
def sentences(polarity: str, split: str) -> list[str]:
    """The sentences of a polarity ("pos", "neg") in a split.

    From $PPO_RLHF_DATA/rt-polarity, else ../shared/data/rt-polarity.
    """
    folder = Path(os.environ.get("PPO_RLHF_DATA", "../shared/data")) / "rt-polarity"
    lines = [line.strip() for line in (folder / f"rt-polarity.{polarity}").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if len(line.split()) > PROMPT_WORDS]
    random.Random(0).shuffle(lines)
    start = 0.0
    for name, share in SHARES.items():
        if name == split:
            return lines[round(start * len(lines)) : round((start + share) * len(lines))]
        start += share
    raise ValueError(f"there is no split {split!r}; use one of {', '.join(SHARES)}.")


def both(split: str) -> list[str]:
    """All sentences of a split, positive ones first."""
    return sentences("pos", split) + sentences("neg", split)


def policy() -> tuple[Any, Any]:
    """An untrained GPT-2 of 4 × 256 with a byte-level BPE of 3,000 tokens made from the training sentences.

    Dropout 0.2 acts in the two supervised stages, which pass over seven thousand sentences several times.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[EOS, PAD], initial_alphabet=alphabet)
    bpe.train_from_iterator(both("train"), trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=EOS, eos_token=EOS, pad_token=PAD)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=96,
        n_embd=256,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.2,
        embd_pdrop=0.2,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return GPT2LMHeadModel(config), tokenizer


def demonstrations() -> Iterator[dict[str, str]]:
    """Whole training sentences: the policy learns to go on from any beginning."""
    return ({"text": text} for text in both("train"))


def held_out_demonstrations() -> Iterator[dict[str, str]]:
    """Sentences that no stage trains on."""
    return ({"text": text} for text in both("held_out"))


def comparisons() -> list[dict[str, Any]]:
    """Real labels: two positive sentences rank before two negative ones, four pairs an element.

    We compare whole real sentences rather than continuations labelled by a classifier of ours: the labels are people's,
    and the reward model then owes nothing to a model that could share its mistakes. Sentences of like length meet, so
    that length tells nothing of the rank.
    """
    positive, negative = (sorted(sentences(polarity, "train"), key=len) for polarity in ("pos", "neg"))
    rows = []
    for start in range(0, min(len(positive), len(negative)) - 1, 2):
        responses = positive[start : start + 2] + negative[start : start + 2]
        rows.append({"prompt": "", "responses": responses, "ranks": [1, 1, 2, 2]})
    return rows


def held_out_comparisons() -> list[dict[str, str]]:
    """Held-out sentences, each positive one over a random negative one."""
    pairs = zip(sentences("pos", "held_out"), sentences("neg", "held_out"), strict=False)
    return [{"prompt": "", "chosen": positive, "rejected": negative} for positive, negative in pairs]


def beginnings(split: str) -> list[dict[str, str]]:
    """The first words of a split's sentences, shuffled."""
    texts = [" ".join(text.split()[:PROMPT_WORDS]) for text in both(split)]
    random.Random(1).shuffle(texts)
    return [{"prompt": text} for text in texts]


def prompts() -> list[dict[str, str]]:
    """The beginnings of training sentences."""
    return beginnings("train")


def held_out_prompts() -> list[dict[str, str]]:
    """The beginnings of held-out sentences."""
    return beginnings("held_out")


@cache
def classifier() -> Any:
    """A bag of words and word pairs with logistic regression, fitted on the judge's sentences, which no stage saw."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    positive, negative = sentences("pos", "judge"), sentences("neg", "judge")
    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\S+")
    labels = [1] * len(positive) + [0] * len(negative)
    return make_pipeline(words, LogisticRegression(C=10, max_iter=300)).fit(positive + negative, labels)


def judge(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    """1 for a continuation that the judge calls positive, else 0: the independent opinion, never trained on."""
    return [float(label) for label in classifier().predict(responses)]
