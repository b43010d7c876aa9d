"""Measures of responses beside their scores: how varied they are, and what it is worth to choose among several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, islice

import torch
from torch import Tensor

NUM_NGRAMS = 3000  # so that distinct_n compares samples of different lengths at equal counts


def distinct_n(texts: Sequence[str], n: int, *, num_ngrams: int = NUM_NGRAMS) -> float:
    """Different runs of n words ÷ runs of n words (Li et al., 2016), over the first `num_ngrams` runs of the texts.

    At an equal count, since the ratio falls as text grows. No run reaches over two texts; 0 without any.
    """
    lines = (text.split() for text in texts)
    ngrams = (ngram for words in lines for ngram in zip(*(words[i:] for i in range(n)), strict=False))
    found = list(islice(ngrams, num_ngrams))
    return len(set(found)) / max(1, len(found))


def num_reached(texts: Sequence[str], n: int, *, num_ngrams: int = NUM_NGRAMS) -> int:
    """How many of the texts, the first ones, `distinct_n` looks at. At least 1."""
    counts = accumulate(max(0, len(text.split()) + 1 - n) for text in texts)
    return min(len(texts), 1 + sum(count < num_ngrams for count in counts))


def best_of_n(scores: Tensor, values: Tensor, n: int) -> Tensor:
    """What the best of n responses by their scores is worth on average, over all subsets of n of the N sampled.

        Σ_i values_i · [C(l_i + e_i, n) − C(l_i, n)] / (e_i · C(N, n))

    l_i: how many scores are lower than score i, e_i: how many equal it, itself too; each of equal ones is as likely to
    be taken. Unbiased (Gao et al., 2023, whose values are gold scores). scores, values (P, N) → (P,), float64.
    """
    total = scores.shape[1]
    lower = (scores[:, None, :] < scores[:, :, None]).sum(2)
    equal = (scores[:, None, :] == scores[:, :, None]).sum(2)
    # [k]: the chance that n of N all lie among k
    within = torch.tensor([math.comb(k, n) / math.comb(total, n) for k in range(total + 1)], dtype=torch.float64)
    weights = (within[lower + equal] - within[lower]) / equal
    return (weights * values).sum(1)


def best_of_n_kl(n: int) -> float:
    """log n − (n − 1)/n: KL of the best of n to the policy that is sampled, in nats (Stiennon et al., 2020).

    Exact where no two responses score alike and none comes twice, otherwise a bound from above (Beirami et al., 2024).
    """
    return math.log(n) - (n - 1) / n
