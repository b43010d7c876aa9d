"""From logits to log-probabilities and entropies, and the truncating filters."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import reference
import torch
from core_cases import assert_close, examples, floats, leaf, tensors
from hypothesis import given
from torch.autograd import gradcheck

from ppo_rlhf.core import entropy_of, head_logprobs, logits, logprobs_of, top_k_filter, top_p_filter

INFINITY = float("inf")


def random_logits(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(shape[-1], shape[:-1], generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64), ids


def kept(filtered):
    """The indices a filter left possible."""
    return {i for i, logit in enumerate(filtered.tolist()) if logit > -INFINITY}


def test_logprobs_by_hand():
    # Weights 1, 2, 5 of 8.
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).log()[None, None].expand(1, 3, 3)
    assert_close(logprobs_of(weights, torch.tensor([[0, 1, 2]])), [[math.log(1 / 8), math.log(2 / 8), math.log(5 / 8)]])


def test_entropy_by_hand():
    # Uniform over 4: log 4. ½, ¼, ¼: ½ log 2 + ½ log 4 = 1.5 log 2.
    uniform, uneven = torch.zeros(1, 1, 4), torch.tensor([[[2.0, 1.0, 1.0]]], dtype=torch.float64).log()
    assert entropy_of(uniform).item() == pytest.approx(math.log(4))
    assert_close(entropy_of(uneven), [[1.5 * math.log(2)]])


@examples
@given(tensors(2, 3, 4), st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_logprobs_and_entropy_agree_with_the_reference(x, ids):
    ids = torch.tensor(ids).reshape(2, 3)
    lists = x.tolist()
    expected = [[reference.logprob(lists[b][t], ids[b, t].item()) for t in range(3)] for b in range(2)]
    assert_close(logprobs_of(x, ids), expected)
    assert_close(entropy_of(x), [[reference.entropy(row) for row in rows] for rows in lists])


def test_logprobs_pass_gradcheck():
    x, ids = random_logits(2, 3, 4)
    assert gradcheck(lambda x: logprobs_of(x, ids), leaf(x))


def test_entropy_passes_gradcheck():
    assert gradcheck(entropy_of, leaf(random_logits(2, 3, 4)[0]))


def test_entropy_with_impossible_tokens_is_that_of_the_others():
    x = leaf(torch.tensor([[[0.3, -INFINITY, 1.0, -INFINITY]]], dtype=torch.float64))
    entropy = entropy_of(x)
    entropy.sum().backward()
    assert_close(entropy, [[reference.entropy([0.3, 1.0])]])
    others = leaf(torch.tensor([[[0.3, 1.0]]], dtype=torch.float64))
    entropy_of(others).sum().backward()
    assert_close(x.grad[0, 0, [0, 2]], others.grad[0, 0])
    assert x.grad[0, 0, [1, 3]].tolist() == [0, 0]


def test_logprobs_with_impossible_tokens_are_those_of_the_others():
    x = leaf(torch.tensor([[[0.3, -INFINITY, 1.0]]], dtype=torch.float64))
    logprobs = logprobs_of(x, torch.tensor([[2]]))
    logprobs.sum().backward()
    assert_close(logprobs, [[reference.logprob([0.3, 1.0], 1)]])
    assert torch.isfinite(x.grad).all()
    assert x.grad[0, 0, 1] == 0


def test_a_certain_token_has_no_entropy():
    assert entropy_of(torch.tensor([[[-INFINITY, 5.0]]])).item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_widened_to_float32(dtype):
    """The result is the float32 one of the same rounded logits, to the bit, not one rounded on the way."""
    x, ids = random_logits(2, 3, 50)
    x = x.to(dtype)
    for half, wide in ((logprobs_of(x, ids), logprobs_of(x.float(), ids)), (entropy_of(x), entropy_of(x.float()))):
        assert half.dtype == torch.float32
        assert torch.equal(half, wide)


def test_float64_stays():
    x, ids = random_logits(1, 2, 3)
    assert logprobs_of(x, ids).dtype == entropy_of(x).dtype == torch.float64


def test_the_gradient_has_the_precision_of_the_logits():
    x, ids = random_logits(1, 2, 3)
    x = leaf(x.bfloat16())
    (logprobs_of(x, ids) + entropy_of(x)).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("elements", [1, 12, 13, 24, 25, 36, 1000])
def test_slices_change_nothing(monkeypatch, elements):
    """Rows of 3 × 4 logits, in slices of one row (also where a row is larger than a slice), two, three, and all."""
    x, ids = random_logits(5, 3, 4)
    results = []
    for size in (2**22, elements):
        monkeypatch.setattr(logits, "SLICE_ELEMENTS", size)
        each = leaf(x)
        logprobs, entropy = logprobs_of(each, ids), entropy_of(each)
        (logprobs.sum() + 2 * entropy.sum()).backward()
        results.append((logprobs, entropy, each.grad))
    for whole, sliced in zip(*results, strict=True):
        assert torch.equal(whole, sliced)


def test_a_slice_is_as_small_as_asked(monkeypatch):
    """12 logits a row, 24 a slice: five rows go through in pieces of 2, 2 and 1."""
    monkeypatch.setattr(logits, "SLICE_ELEMENTS", 24)
    widened, seen = logits._widened, []
    monkeypatch.setattr(logits, "_widened", lambda piece: seen.append(len(piece)) or widened(piece))
    entropy_of(random_logits(5, 3, 4)[0])
    assert seen == [2, 2, 1]


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_no_decisions_have_no_logprobs(shape):
    x = torch.zeros(shape)
    assert logprobs_of(x, torch.zeros(shape[:2], dtype=torch.long)).shape == shape[:2]
    assert entropy_of(x).shape == shape[:2]


@examples
@given(tensors(1, 2, 5, low=-30, high=30), floats(-50, 50))
def test_a_common_shift_of_the_logits_changes_nothing(x, shift):
    ids = torch.tensor([[0, 3]])
    assert_close(logprobs_of(x + shift, ids), logprobs_of(x, ids), atol=1e-9)
    assert_close(entropy_of(x + shift), entropy_of(x), atol=1e-9)


def test_the_logprobs_of_all_tokens_are_a_distribution():
    x, _ = random_logits(1, 4, 6)
    each = [logprobs_of(x, torch.full((1, 4), token)).exp() for token in range(6)]
    assert_close(sum(each), torch.ones(1, 4))


# The head.

SMALL = {"slices": (16, 2), "one slice": (2**22, 128)}  # elements and rows of a slice: of 6 tokens pieces of 2, or all
BUDGETS = {"kept": 2**28, "computed again": 0}


@pytest.fixture(params=SMALL)
def slices(request, monkeypatch):
    """The same whether the tokens go through in pieces or at once."""
    monkeypatch.setattr(logits, "SLICE_ELEMENTS", SMALL[request.param][0])
    monkeypatch.setattr(logits, "HEAD_ROWS", SMALL[request.param][1])


@pytest.fixture(params=BUDGETS)
def budget(request, monkeypatch):
    """The same whether probabilities wait for the backward pass or are computed again."""
    monkeypatch.setattr(logits, "KEPT_BYTES", BUDGETS[request.param])


def random_head(tokens=6, width=3, vocabulary=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((tokens, width), (vocabulary, width), (vocabulary,))
    )
    return hidden, weight, bias, torch.randint(vocabulary, (tokens,), generator=generator)


@pytest.mark.usefixtures("slices", "budget")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_head_in_slices_says_what_whole_logits_say_gradients_included(temperature):
    *parts, ids = random_head()
    outcomes = []
    for sliced in (True, False):
        hidden, weight, bias = map(leaf, parts)
        if sliced:
            logprobs, entropy = head_logprobs(hidden, weight, ids, bias=bias, temperature=temperature)
        else:
            whole = (hidden @ weight.t() + bias)[None]
            logprobs = logprobs_of(whole, ids[None], temperature=temperature)[0]
            entropy = entropy_of(whole, temperature=temperature)[0]
        weights = torch.arange(1.0, 7.0)
        ((weights * logprobs).sum() + (weights.flip(0) * entropy).sum()).backward()
        outcomes.append((logprobs, entropy, hidden.grad, weight.grad, bias.grad))
    for one, other in zip(*outcomes, strict=True):
        assert_close(one, other, atol=1e-10)


@pytest.mark.usefixtures("slices", "budget")
def test_the_head_passes_gradcheck_also_for_each_input_alone():
    *parts, ids = random_head()

    def of(hidden, weight, bias):
        return head_logprobs(hidden, weight, ids, bias=bias, temperature=0.7)

    assert gradcheck(of, tuple(map(leaf, parts)))
    for place in range(3):
        assert gradcheck(of, tuple(leaf(x) if index == place else x for index, x in enumerate(parts)))


@pytest.mark.usefixtures("budget")
def test_a_second_backward_pass_through_the_head_gives_the_same_gradient():
    hidden, weight, _, ids = random_head()
    hidden = leaf(hidden)
    logprobs, _ = head_logprobs(hidden, weight, ids)
    first, second = (torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True)[0] for _ in range(2))
    assert_close(first, second, atol=1e-12)


def test_the_heads_entropy_is_differentiable_only_where_asked():
    hidden, weight, _, ids = random_head()
    logprobs, entropy = head_logprobs(leaf(hidden), weight, ids, differentiable_entropy=False)
    assert logprobs.requires_grad
    assert not entropy.requires_grad
    hidden = leaf(hidden)
    head_logprobs(hidden, weight, ids)[1].sum().backward()  # the entropy's gradient alone
    assert hidden.grad.abs().max() > 0


@pytest.mark.usefixtures("slices", "budget")
@pytest.mark.parametrize("autocast", [False, True])
def test_a_bf16_head_reduces_in_float32_and_keeps_what_is_left_of_a_sure_token(autocast):
    hidden, weight, _, ids = random_head(dtype=torch.bfloat16)
    weight, hidden = weight.float(), leaf(hidden)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logprobs, entropy = head_logprobs(hidden, leaf(weight), ids, temperature=0.7)
    whole = (hidden @ weight.bfloat16().t()).float()[None]
    assert_close(logprobs, logprobs_of(whole, ids[None], temperature=0.7)[0], atol=1e-6)
    assert_close(entropy, entropy_of(whole, temperature=0.7)[0], atol=1e-6)
    assert logprobs.dtype == entropy.dtype == torch.float32
    # Logits 8 and 0: 1 − p = 3.35e-4, which rounds to 0 beside 1 in bf16. ∂ log p[0] = (1 − p)·(w0 − w1).
    sure = leaf(torch.tensor([[8.0, 0.0]], dtype=torch.bfloat16))
    head_logprobs(sure, torch.eye(2), torch.tensor([0]))[0].sum().backward()
    assert sure.grad[0].tolist() == pytest.approx([3.35e-4, -3.35e-4], rel=0.01)


@pytest.mark.usefixtures("slices", "budget")
@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (0.5, 1.0), (1.0, 2.0), (0.01, 1e6)])
def test_the_heads_gradient_is_finite_where_a_probability_underflows(temperature, scale):
    logits = torch.tensor([[2.0, -1.0, -150.0, 1.5], [-300.0, 0.0, -1.0, -600.0]], dtype=torch.float64) * temperature
    ids = torch.tensor([3, 0])
    gradients = []
    for whole in (leaf(logits), leaf(logits.float())):
        if whole.dtype == torch.float64:
            logprobs = (whole / temperature).log_softmax(-1)
            entropy, chosen = -(logprobs.exp() * logprobs).sum(-1), logprobs[range(2), ids]
        else:
            chosen, entropy = head_logprobs(whole, torch.eye(4), ids, temperature=temperature)
        (scale * (3 * entropy - chosen)).sum().backward()
        gradients.append(whole.grad.double())
    assert_close(gradients[1], gradients[0], atol=3e-6 * float(gradients[0].abs().max()))


@pytest.mark.parametrize("scale", [1.0, 2.0, 1e6])
def test_the_gradient_of_the_entropy_is_finite_beside_impossible_tokens(scale):
    possible = leaf(torch.tensor([2.0, -1.0, 1.5]))
    everything = leaf(torch.tensor([2.0, -INFINITY, -1.0, -500.0, 1.5]))
    for x in (possible, everything):
        (scale * entropy_of(x[None, None])).sum().backward()
    assert_close(everything.grad[[0, 2, 4]], possible.grad, atol=1e-6 * scale)
    assert everything.grad[[1, 3]].tolist() == [0, 0]


def test_a_head_whose_chosen_token_is_impossible_in_float32_says_how_impossible():
    logprobs, entropy = head_logprobs(torch.tensor([[200.0]]), torch.tensor([[1.0], [-1.0]]), torch.tensor([1]))
    assert logprobs.item() == -400
    assert entropy.item() == 0


# Filters.


def test_top_k_keeps_the_largest_as_they_are():
    x = torch.tensor([1.0, 4.0, 3.0, 2.0])
    assert top_k_filter(x, 2).tolist() == [-INFINITY, 4, 3, -INFINITY]


def test_top_k_keeps_ties_with_the_kth():
    assert kept(top_k_filter(torch.tensor([1.0, 3.0, 2.0, 2.0]), 2)) == {1, 2, 3}


def test_top_k_beyond_the_vocabulary_keeps_all():
    assert kept(top_k_filter(torch.tensor([1.0, 2.0]), 50)) == {0, 1}


@examples
@given(tensors(2, 6), st.integers(1, 7))
def test_top_k_agrees_with_the_reference(x, k):
    for row, filtered in zip(x, top_k_filter(x, k), strict=True):
        assert kept(filtered) == reference.top_k(row.tolist(), k)
        assert_close(filtered[filtered > -INFINITY], row[filtered > -INFINITY])


def test_top_p_by_hand():
    # Probabilities 0.1, 0.5, 0.3, 0.1: 0.5 reaches 0.4; 0.5 + 0.3 reaches 0.7.
    x = torch.tensor([0.1, 0.5, 0.3, 0.1], dtype=torch.float64).log()
    assert kept(top_p_filter(x, 0.4)) == {1}
    assert kept(top_p_filter(x, 0.7)) == {1, 2}
    assert len(kept(top_p_filter(x, 0.85))) == 3
    assert_close(top_p_filter(x, 0.7)[[1, 2]], x[[1, 2]])


def test_top_p_always_keeps_the_most_likely():
    assert kept(top_p_filter(torch.tensor([0.0, 1.0, 0.5]), 1e-9)) == {1}
    assert kept(top_p_filter(torch.tensor([0.0, 1.0, 0.5]), 0.0)) == {1}


def test_top_p_of_one_keeps_all_also_where_the_tail_is_too_small_for_float32():
    """Beside e^20 the rest is lost in the running sum, which reaches 1 too early."""
    x = torch.cat([torch.tensor([20.0]), torch.zeros(50), torch.full((20,), -10.0)])
    assert len(kept(top_p_filter(x, 1.0))) == 71


@examples
@given(st.permutations(range(1, 9)), st.sampled_from([0.05, 0.33, 0.61, 0.93]))
def test_top_p_agrees_with_the_reference(weights, p):
    """Weights 1 … 8 of 36, in any order; none of the limits is a multiple of 1/36."""
    x = torch.tensor(weights, dtype=torch.float64).log()
    assert kept(top_p_filter(x, p)) == reference.top_p(x.tolist(), p)


def test_filters_work_row_by_row():
    x, _ = random_logits(2, 3, 6)
    for whole, single in (
        (top_k_filter(x, 2), lambda row: top_k_filter(row, 2)),
        (top_p_filter(x, 0.6), lambda row: top_p_filter(row, 0.6)),
    ):
        for b in range(2):
            for t in range(3):
                assert torch.equal(whole[b, t], single(x[b, t]))


def test_filters_never_bring_an_impossible_token_back():
    x = torch.tensor([0.0, -INFINITY, 1.0])
    assert kept(top_p_filter(x, 0.999)) == {0, 2}
    assert kept(top_k_filter(x, 3)) == {0, 2}
