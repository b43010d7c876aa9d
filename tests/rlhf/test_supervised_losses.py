"""The two supervised stages' losses: what is learnt of a demonstration, and that padding and splits change nothing."""

from __future__ import annotations

import language_cases as cases
import pytest
import torch

from ppo_rlhf.core import bradley_terry_loss, masked_mean
from ppo_rlhf.data import Example
from ppo_rlhf.models import right_padded, use_quick_kernels
from ppo_rlhf.rewards import ScoringNetwork
from ppo_rlhf.train.rankings import pair_tensors, rankings_of
from ppo_rlhf.train.reward_model import ComparisonModule, classifier_from
from ppo_rlhf.train.sft import CompletionModule, completion_logprobs


def example(ids, *learnt):
    """An example of which the tokens at some places are learnt."""
    return Example(ids, [place in learnt for place in range(len(ids))])


EXAMPLES = [
    example([5, 9, 12, 0], 2, 3),
    example([7, 20, 21, 22, 23, 24, 0], 1, 2, 5, 6),  # between two turns there is another's
    example([3, 3, 40, 41, 8, 33, 0], 6),
    example([4, 0, 1, 17, 0], 3, 4),  # eos and pad among the prompt's tokens
]


@pytest.fixture(params=[use_quick_kernels, lambda model: model], ids=["packed", "padded"])
def completions_of(request):
    """A module of a language model's completions, whose forward is packed or padded."""
    return lambda model: CompletionModule(request.param(model))


def test_the_loss_of_a_batch_is_the_mean_over_its_learnt_tokens(architecture, completions_of):
    model = cases.make_model(architecture)
    expected = [
        cases.plain_logprobs(model, each.ids[:1], each.ids[1:])[torch.tensor(each.learnt[1:])] for each in EXAMPLES
    ]
    logprobs, learnt = completion_logprobs(completions_of(model), EXAMPLES, torch.device("cpu"))
    assert learnt.sum(1).tolist() == [len(line) for line in expected] == [2, 4, 1, 2]
    actual = masked_mean(-logprobs, learnt).double()
    torch.testing.assert_close(actual, -torch.cat(expected).mean(), rtol=0, atol=2e-5)


def gradient_of(module, pieces):
    """That of the mean over all learnt tokens, by a backward pass a piece."""
    count = sum(sum(each.learnt) for piece in pieces for each in piece)
    for piece in pieces:
        logprobs, learnt = completion_logprobs(module, piece, torch.device("cpu"))
        masked_mean(-logprobs, learnt, count=count).backward()
    return torch.cat([p.grad.flatten() for p in module.parameters()])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_sft_gradient_is_the_same_for_every_split(architecture, size, completions_of):
    gradients = [
        gradient_of(completions_of(cases.make_model(architecture).double()), pieces)
        for pieces in ([EXAMPLES], [EXAMPLES[start : start + size] for start in range(0, 4, size)])
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


def test_the_packed_sft_gradient_is_that_of_unpadded_texts(architecture):
    packed = gradient_of(CompletionModule(use_quick_kernels(cases.make_model(architecture).double())), [EXAMPLES])
    plain = cases.make_model(architecture).double()
    total = 0
    for each in EXAMPLES:
        logits = plain(torch.tensor([each.ids]), use_cache=False).logits[0]
        logprobs = logits[:-1].log_softmax(-1).gather(1, torch.tensor(each.ids[1:])[:, None])
        total = total - logprobs[torch.tensor(each.learnt[1:])].sum() / 9
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in plain.parameters()])
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-7)  # rotary angles are float32


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_the_reward_gradient_is_the_same_for_every_split(architecture, coefficient):
    encoded = [
        [[5, 9, 12, 0], [5, 9, 0]],
        [[7, 20, 21, 22, 23, 0], [7, 24, 0], [7, 1, 1, 0]],
        [[3, 0], [3, 3, 40, 8, 0]],
    ]
    rows = [{"prompt": "p", "responses": ["a"] * len(lines), "ranks": list(range(len(lines)))} for lines in encoded]
    rankings = rankings_of(rows, setting="data")
    policy = cases.make_model(architecture)
    torch.manual_seed(0)
    classifier = classifier_from(policy)
    gradients = []
    for pieces in ([[0, 1, 2]], [[0], [1], [2]], [[0, 1], [2]]):
        module = ComparisonModule(ScoringNetwork(classifier), policy if coefficient else None).double()
        module.zero_grad()
        for batch in pieces:
            ids, mask = right_padded([line for row in batch for line in encoded[row]], torch.device("cpu"))
            better, worse, weights, margins = pair_tensors([rankings[row] for row in batch], ids.device)
            scores, nll = module(ids, mask)
            total = bradley_terry_loss(scores[better], scores[worse], margins, weight=weights, count=3)
            shares = torch.tensor([1 / len(encoded[row]) for row in batch for _ in encoded[row]])
            (total + coefficient * (nll * shares).sum() / 3).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=0, atol=2e-7)  # scores are float32 by contract


def test_the_auxiliary_language_loss_is_that_of_the_unpadded_text(architecture):
    policy = cases.make_model(architecture)
    module = ComparisonModule(ScoringNetwork(classifier_from(policy)), policy)
    lines = [[5, 9, 12, 10, 0], [7, 20, 0]]
    _, nll = module(*right_padded(lines, torch.device("cpu")))
    for row, line in enumerate(lines):
        expected = -cases.plain_logprobs(policy, line[:1], line[1:]).mean()
        torch.testing.assert_close(nll[row].double(), expected, rtol=0, atol=2e-5)
