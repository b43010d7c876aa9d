"""From rewards and values to advantages and returns."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import reference
import torch
from core_cases import POISONS, assert_close, examples, floats, leaf, masks, rows_of, tensors
from hypothesis import given
from torch.autograd import gradcheck

from ppo_rlhf.core import discounted_returns, gae, group_normalized, kl_shaped_rewards, leave_one_out

NAN = float("nan")


def flags(*lists):
    return torch.tensor(lists, dtype=torch.bool)


@st.composite
def streams(draw):
    """rewards, values, terminated, ended of B rows × T decisions."""
    batch, steps = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    terminated = draw(masks(batch, steps))
    truncated = draw(masks(batch, steps))
    return (
        draw(tensors(batch, steps)),
        draw(tensors(batch, steps + 1)),
        terminated,
        terminated | truncated,
    )


def test_gae_by_hand():
    # γ = 0.5, λ = 0.5, V = 1, 2, 4, the end after two steps.
    # δ_1 = 3 + 0 − 2 = 1              δ_0 = 1 + 0.5·2 − 1 = 1
    # A_1 = 1                          A_0 = 1 + 0.25·1 = 1.25
    end = flags([False, True])
    advantages, returns = gae(rows_of([1, 3]), rows_of([1, 2, 4]), end, end, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[1.25, 1.0]]
    assert returns.tolist() == [[2.25, 3.0]]  # A + V


def test_a_truncated_step_bootstraps_and_a_terminated_one_does_not():
    # One step, r = 1, V = 2, V beyond = 8, γ = 0.5. Truncated: 1 + 4 − 2 = 3. Terminated: 1 − 2 = −1.
    no, yes = flags([False]), flags([True])
    rewards, values = rows_of([1]), rows_of([2, 8])
    assert gae(rewards, values, no, yes, gamma=0.5, lam=0.9)[0].item() == 3
    assert gae(rewards, values, yes, yes, gamma=0.5, lam=0.9)[0].item() == -1


def test_a_stream_still_running_bootstraps_from_the_last_column():
    # γ = 1, λ = 1, no end: A_0 = 1 + 1 + 10 − 2 = 10, A_1 = 1 + 10 − 3 = 8.
    never = flags([False, False])
    advantages, _ = gae(rows_of([1, 1]), rows_of([2, 3, 10]), never, never, gamma=1.0, lam=1.0)
    assert advantages.tolist() == [[10, 8]]


def test_the_trace_stops_at_a_truncation_in_the_middle():
    # Episode one: t = 0, 1, truncated at 1; episode two: t = 2, 3, terminated at 3. γ = λ = 1, V = 0 but V_2 = 5.
    # A_3 = 1; A_2 = 1 − 5 + A_3 + 0 = −3; A_1 = 1 + 5 = 6 (bootstrap, no trace); A_0 = 1 + 6 = 7.
    terminated = flags([False, False, False, True])
    ended = flags([False, True, False, True])
    advantages, _ = gae(rows_of([1, 1, 1, 1]), rows_of([0, 0, 5, 0, 9]), terminated, ended, gamma=1.0, lam=1.0)
    assert advantages.tolist() == [[7, 6, -3, 1]]


@examples
@given(streams(), floats(0, 1), floats(0, 1))
def test_gae_agrees_with_the_sum_of_discounted_td_errors(case, gamma, lam):
    advantages, returns = gae(*case, gamma=gamma, lam=lam)
    expected = torch.tensor(reference.gae(*(x.tolist() for x in case), gamma, lam), dtype=torch.float64)
    assert_close(advantages, expected)
    assert_close(returns, expected + case[1][:, :-1])


@examples
@given(streams(), floats(0, 1))
def test_gae_with_lambda_zero_is_the_td_error(case, gamma):
    rewards, values, terminated, _ = case
    advantages, _ = gae(*case, gamma=gamma, lam=0.0)
    beyond = [
        [0 if end else v for end, v in zip(*row, strict=True)] for row in zip(terminated, values[:, 1:], strict=True)
    ]
    assert_close(advantages, rewards + gamma * torch.tensor(beyond, dtype=torch.float64) - values[:, :-1])


@examples
@given(streams(), floats(0, 1))
def test_gae_with_lambda_one_is_the_monte_carlo_return_minus_the_value(case, gamma):
    rewards, values, terminated, _ = case
    terminated = terminated.clone()
    terminated[:, -1] = True
    advantages, returns = gae(rewards, values, terminated, terminated, gamma=gamma, lam=1.0)
    monte_carlo = reference.discounted_returns(rewards.tolist(), terminated.tolist(), gamma)
    assert_close(returns, monte_carlo)
    assert_close(advantages, torch.tensor(monte_carlo, dtype=torch.float64) - values[:, :-1])


@examples
@given(streams(), floats(0, 1))
def test_values_that_are_right_leave_no_advantage(case, gamma):
    rewards, _, terminated, _ = case
    terminated = terminated.clone()
    terminated[:, -1] = True
    right = discounted_returns(rewards, terminated, gamma=gamma)
    values = torch.cat([right, torch.full((len(right), 1), NAN)], dim=1)
    advantages, _ = gae(rewards, values, terminated, terminated, gamma=gamma, lam=0.7)
    assert_close(advantages, torch.zeros_like(advantages), atol=1e-9)


def test_discounted_returns_by_hand():
    # γ = 0.5: G_2 = 4; the end at 1 cuts: G_1 = 2, G_0 = 1 + 0.5·2 = 2.
    returns = discounted_returns(rows_of([1, 2, 4]), flags([False, True, False]), gamma=0.5)
    assert returns.tolist() == [[2, 2, 4]]


@examples
@given(streams(), floats(0, 1))
def test_discounted_returns_agree_with_the_reference(case, gamma):
    rewards, _, _, ended = case
    expected = reference.discounted_returns(rewards.tolist(), ended.tolist(), gamma)
    assert_close(discounted_returns(rewards, ended, gamma=gamma), expected)


# Language: one response a row, terminated and ended at its last generated token, padding after it.


def language_rows(lengths, *, steps=5, poison=NAN):
    """Rewards, values and ends of responses of the given lengths, with poison after the last token of each."""
    generator = torch.Generator().manual_seed(3)
    at = torch.arange(steps)
    mask = at < torch.tensor(lengths)[:, None]
    last = at == torch.tensor(lengths)[:, None] - 1
    rewards = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    values = torch.randn(len(lengths), steps + 1, generator=generator, dtype=torch.float64)
    real = torch.cat([mask, torch.zeros(len(lengths), 1, dtype=torch.bool)], dim=1)
    return torch.where(mask, rewards, poison), torch.where(real, values, poison), last, mask


@pytest.mark.parametrize("poison", POISONS)
def test_padding_after_the_stop_token_changes_nothing(poison):
    lengths = [5, 1, 3]
    rewards, values, last, _ = language_rows(lengths, poison=poison)
    advantages, returns = gae(rewards, values, last, last, gamma=0.9, lam=0.8)
    for b, length in enumerate(lengths):
        ends = [False] * (length - 1) + [True]
        expected = reference.gae_of_row(
            rewards[b, :length].tolist(), [*values[b, :length].tolist(), 7.0], ends, ends, 0.9, 0.8
        )
        assert_close(advantages[b, :length], expected)
        assert_close(returns[b, :length], torch.tensor(expected, dtype=torch.float64) + values[b, :length])


@pytest.mark.parametrize("poison", POISONS)
def test_padding_after_the_stop_token_leaves_gradients_finite_and_equal(poison):
    gradients = []
    for filling in (0.0, poison):
        rewards, values, last, mask = language_rows([5, 1, 3], poison=filling)
        rewards, values = leaf(rewards), leaf(values)
        advantages, returns = gae(rewards, values, last, last, gamma=0.9, lam=0.8)
        weights = torch.linspace(1, 2, mask.numel(), dtype=torch.float64).reshape(mask.shape)
        loss = torch.where(mask, weights * (advantages + 2 * returns), 0).sum()
        gradients.append(torch.autograd.grad(loss, (rewards, values)))
    for clean, poisoned in zip(*gradients, strict=True):
        assert torch.isfinite(clean).all()
        assert_close(poisoned, clean)


def test_the_score_reaches_every_token_of_a_response():
    # Three tokens, no KL, score 1, V = 0.2, 0.3, 0.4, γ = 1, λ = 0.95. A_2 = 1 − 0.4 = 0.6, not the 0.555 of a score
    # paid one column late; A_1 = 0.4 − 0.3 + 0.95·0.6 = 0.67; A_0 = 0.3 − 0.2 + 0.95·0.67 = 0.7365.
    mask = flags([True, True, True, False])
    rewards = kl_shaped_rewards(rows_of([1])[0], torch.zeros(1, 4, dtype=torch.float64), mask, kl_coef=0.1)
    last = flags([False, False, True, False])
    advantages, _ = gae(rewards, rows_of([0.2, 0.3, 0.4, 0.1, 0.0]), last, last, gamma=1.0, lam=0.95)
    assert_close(advantages[:, :3], [[0.7365, 0.67, 0.6]])


def test_a_cut_off_response_gets_its_score_like_one_that_fills_the_length_by_stopping():
    # Both end in their last column; whether the last token is a stop token is nothing that `gae` could see.
    mask = flags([True, True])
    rewards = kl_shaped_rewards(rows_of([2])[0], torch.zeros(1, 2, dtype=torch.float64), mask, kl_coef=0.1)
    last = flags([False, True])
    advantages, _ = gae(rewards, rows_of([0, 0, NAN]), last, last, gamma=1.0, lam=1.0)
    assert advantages.tolist() == [[2, 2]]


def test_the_length_limit_bootstrap_values_what_would_have_followed():
    # Only `ended` at the limit: A_1 = 2 + 0.5·6 = 5 with γ = 0.5, A_0 = 0 + 0.5·λ·5 = 2.5 with λ = 1.
    last = flags([False, True])
    advantages, _ = gae(rows_of([0, 2]), rows_of([0, 0, 6]), torch.zeros_like(last), last, gamma=0.5, lam=1.0)
    assert advantages.tolist() == [[2.5, 5]]


def test_a_response_is_a_stream_of_one_episode():
    """The language row and the Gymnasium stream of the same numbers give the same advantages."""
    rewards, values, last, _ = language_rows([3])
    language, _ = gae(rewards, values, last, last, gamma=0.9, lam=0.8)
    stream, _ = gae(rewards[:, :3], values[:, :4], last[:, :3], last[:, :3], gamma=0.9, lam=0.8)
    assert_close(language[:, :3], stream)


# Gymnasium, NEXT_STEP: after an end comes a step that only resets, whose value is that of the final observation.


@pytest.mark.parametrize("dummy_reward", [0.0, 5.0, NAN])
def test_next_step_streams_are_their_episodes_one_by_one(dummy_reward):
    generator = torch.Generator().manual_seed(5)
    episodes = [(3, "terminated"), (2, "truncated"), (4, "truncated"), (1, "terminated"), (2, "running")]
    rewards, values, terminated, ended, mask, expected = [], [], [], [], [], []
    for length, how in episodes:
        r = torch.randn(length, generator=generator, dtype=torch.float64).tolist()
        v = torch.randn(length + 1, generator=generator, dtype=torch.float64).tolist()
        goes_on = [False] * (length - 1)
        terminates, ends = [*goes_on, how == "terminated"], [*goes_on, how != "running"]
        expected += reference.gae_of_row(r, v, terminates, ends, 0.9, 0.8)
        # The last value is the reset step's, or the column after all: not to be read after a true end.
        values += [*v[:-1], NAN if how == "terminated" else v[-1]]
        reset = [] if how == "running" else [False]
        rewards += r + [dummy_reward for _ in reset]
        terminated += terminates + reset
        ended += ends + reset
        mask += [True] * length + reset
    advantages, _ = gae(rows_of(rewards), rows_of(values), flags(terminated), flags(ended), gamma=0.9, lam=0.8)
    assert_close(advantages[flags(mask)], expected)


def test_same_step_streams_pay_the_value_beyond_a_truncation_in_the_reward():
    """Truncated with V(final) = 6 in NEXT_STEP, or γ·6 added to the reward and `terminated` set in SAME_STEP."""
    next_step, _ = gae(
        rows_of([1, 2, 0]), rows_of([3, 4, 6, NAN]), flags([False] * 3), flags([False, True, False]), gamma=0.5, lam=0.9
    )
    end = flags([False, True])
    same_step, _ = gae(rows_of([1, 2 + 0.5 * 6]), rows_of([3, 4, NAN]), end, end, gamma=0.5, lam=0.9)
    assert_close(same_step, next_step[:, :2])


def test_rows_do_not_touch_each_other():
    rewards, values, last, _ = language_rows([5, 1, 3], poison=0.0)
    together, _ = gae(rewards, values, last, last, gamma=0.9, lam=0.8)
    for b in range(3):
        alone, _ = gae(rewards[b : b + 1], values[b : b + 1], last[b : b + 1], last[b : b + 1], gamma=0.9, lam=0.8)
        assert_close(together[b : b + 1], alone)


def test_gae_and_discounted_returns_pass_gradcheck():
    rewards, values, last, _ = language_rows([3, 2], steps=3, poison=0.5)
    assert gradcheck(lambda r, v: gae(r, v, last, last, gamma=0.9, lam=0.8), (leaf(rewards), leaf(values)))
    assert gradcheck(lambda r: discounted_returns(r, last, gamma=0.9), leaf(rewards))


def test_gae_keeps_the_precision_it_is_given():
    end = flags([True])
    for dtype in (torch.float32, torch.float64):
        advantages, returns = gae(
            torch.ones(1, 1, dtype=dtype), torch.ones(1, 2, dtype=dtype), end, end, gamma=0.9, lam=0.9
        )
        assert advantages.dtype == returns.dtype == dtype


# ---------------------------------------------------------------------------------------------------- groups


def test_leave_one_out_compares_a_return_with_the_mean_of_the_others_of_its_group():
    returns = torch.tensor([1.0, 2.0, 6.0, 10.0, 10.0, 10.0])
    # 1 − (2 + 6)/2, 2 − (1 + 6)/2, 6 − (1 + 2)/2; and a group without a difference
    expected = torch.tensor([-3.0, -1.5, 4.5, 0.0, 0.0, 0.0])
    torch.testing.assert_close(leave_one_out(returns, group_size=3), expected)


def test_group_normalized_returns_are_deviations_over_the_standard_deviation_of_the_group():
    returns = torch.tensor([1.0, 3.0, 5.0, 5.0, -1.0, 0.0])
    expected = torch.tensor([-1.0, 1.0, 0.0, 0.0, -1.0, 1.0])
    torch.testing.assert_close(group_normalized(returns, group_size=2), expected)


def test_of_four_returns_the_normalized_ones_by_hand():
    # mean 3, biased variance (9 + 1 + 1 + 9) / 4 = 5
    expected = torch.tensor([-3.0, -1.0, 1.0, 3.0]) / 5**0.5
    torch.testing.assert_close(group_normalized(torch.tensor([0.0, 2.0, 4.0, 6.0]), group_size=4), expected)


@given(tensors(6))
@examples
def test_a_group_of_leave_one_out_advantages_adds_up_to_nothing(returns):
    sums = leave_one_out(returns, group_size=3).reshape(2, 3).sum(1)
    assert_close(sums, torch.zeros_like(sums), atol=1e-3)


@pytest.mark.parametrize("relative", [leave_one_out, group_normalized])
@pytest.mark.parametrize("group_size", [1, 4])
def test_returns_that_do_not_fall_into_groups_are_refused(relative, group_size):
    with pytest.raises(ValueError, match=f"6 returns do not fall into groups of {group_size}, of two at least"):
        relative(torch.zeros(6), group_size=group_size)
