"""Models and tokenizers of the language side, and slow plain computations that the tests compare with."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from torch import nn

from ppo_rlhf.policy import PolicyWithValue, TokenValues
from ppo_rlhf.prompts import Prompts
from ppo_rlhf.sampling import Responses

every_architecture = pytest.mark.parametrize(
    "architecture", sorted({**tiny_models.ARCHITECTURES, **tiny_models.MORE_ARCHITECTURES})
)
VOCABULARY = 64
CONTEXT = 48
SENTENCES = [
    "the cat sat on the mat. ",
    "a dog ran to the park, and the cat did not. ",
    "why is the sea so blue? ",
    "go!",
]
LETTERS = "abcdefghijklmnopqrstuvwxyz.,?!Ġ"
TEXTS = ["the cat", "a dog ran to the park", "why", "the sea is so blue, and"]


def make_model(architecture="gpt2", **options):
    """A model far enough from uniform to tell tokens apart."""
    return tiny_models.make_model(architecture, vocabulary=VOCABULARY, context=CONTEXT, spread=0.3, **options)


def make_tokenizer(*, pad_is_eos=False):
    """Byte-level BPE over lower-case text: eos is id 0; pad is eos as well, or id 1."""
    pad = tiny_models.EOS if pad_is_eos else tiny_models.PAD
    return tiny_models.make_tokenizer(SENTENCES, size=VOCABULARY, alphabet=LETTERS, pad=pad)


def prompt_batch(tokenizer, texts=TEXTS):
    """The texts as the toolkit reads prompts: tokenised, padded on the left."""
    rows = [{"prompt": text} for text in texts]
    prompts = Prompts(rows, tokenizer, longest=CONTEXT, setting="prompts")
    return prompts.batch(range(len(texts)), torch.device("cpu"))


def value_model(architecture="gpt2", *, seed=7):
    """A value model of its own, with a head that is not zero."""
    model = make_model(architecture, seed=seed)
    head = nn.Linear(16, 1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        nn.init.normal_(head.weight)
        nn.init.normal_(head.bias)
    return TokenValues(model.base_model, head)


def make_policy(architecture="gpt2", *, separate=False, temperature=1.0, seed=0, **options):
    """A policy whose value function says something: a random head on its trunk, or a model of its own."""
    policy = PolicyWithValue(
        make_model(architecture, seed=seed),
        value_model=value_model(architecture) if separate else None,
        temperature=temperature,
        **options,
    )
    if policy.value_head is not None:
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1)
            nn.init.normal_(policy.value_head.weight)
            nn.init.normal_(policy.value_head.bias)
    return policy


PROMPT_IDS = [[5, 9, 12], [7], [3, 3, 40, 41, 8]]  # of unequal lengths
RESPONSE_IDS = [[10, 11, 0], [20, 21, 22, 23, 24], [33]]  # stopped; cut off at the limit; one token long


def inputs_of(prompt_ids=PROMPT_IDS, response_ids=RESPONSE_IDS, *, extra_left=0, extra_right=0, pad=1):
    """Left-padded prompts and right-padded responses: what `policy(**inputs)` takes."""
    return {
        **_padded(prompt_ids, "prompt", extra_left, pad, left=True),
        **_padded(response_ids, "response", extra_right, pad, left=False),
    }


def _padded(lines, name, extra, pad, *, left):
    width = max(map(len, lines)) + extra
    ids, mask = torch.full((len(lines), width), pad), torch.zeros(len(lines), width, dtype=torch.bool)
    for row, line in enumerate(lines):
        place = slice(width - len(line), width) if left else slice(0, len(line))
        ids[row, place], mask[row, place] = torch.tensor(line), True
    return {f"{name}_ids": ids, f"{name}_mask": mask}


def responses_of(inputs, tokenizer=None):
    """The responses of `inputs_of` as the sampler returns them."""
    ids, mask = inputs["response_ids"], inputs["response_mask"]
    return Responses(ids, mask, torch.zeros(len(ids), dtype=torch.bool), [""] * len(ids), torch.zeros(mask.shape))


def plain_logits(model, ids):
    """(S, V) float64: the whole unpadded sequence through a float64 copy of the model, nothing else given."""
    wide = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        return wide(torch.tensor([ids]), use_cache=False).logits[0]


def plain_logprobs(model, prompt, response, *, temperature=1.0):
    """(T,) float64: log π(token t of the response), read at index P − 1 + t of an unpadded sequence."""
    logprobs = (plain_logits(model, [*prompt, *response]) / temperature).log_softmax(-1)
    return torch.stack([logprobs[len(prompt) - 1 + t, token] for t, token in enumerate(response)])


def assert_close_on(mask, actual, expected, *, atol=1e-5):
    torch.testing.assert_close(actual[mask], expected[mask], rtol=1e-5, atol=atol, check_dtype=False)
