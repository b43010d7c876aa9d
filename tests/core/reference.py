"""The mathematics again, slowly: lists, loops and float64, written from the papers' formulas.

Nothing here imports torch or our code. x[b][t] are rows of decisions, mask[b][t] says which of them count. Everything
takes what `tensor.tolist()` gives.
"""

from __future__ import annotations

import math

EPSILON = 1e-8


def decisions(x, mask):
    """The numbers that count, in reading order."""
    return [x[b][t] for b in range(len(mask)) for t in range(len(mask[b])) if mask[b][t]]


def over_the_mask(function, mask):
    """function(b, t) where the mask is True, else 0."""
    return [[function(b, t) if mask[b][t] else 0.0 for t in range(len(mask[b]))] for b in range(len(mask))]


def masked_mean(x, mask, count=None):
    chosen = decisions(x, mask)
    if not chosen:
        return 0.0
    return math.fsum(chosen) / (len(chosen) if count is None else count)


def moments(x, mask):
    """E[x] and E[(x − E[x])²]."""
    chosen = decisions(x, mask)
    if not chosen:
        return 0.0, 0.0
    mean = math.fsum(chosen) / len(chosen)
    return mean, math.fsum((each - mean) ** 2 for each in chosen) / len(chosen)


def whiten(x, mask):
    mean, variance = moments(x, mask)
    return over_the_mask(lambda b, t: (x[b][t] - mean) / math.sqrt(variance + EPSILON), mask)


def unit_variance(x, mask):
    mean, variance = moments(x, mask)
    return over_the_mask(lambda b, t: mean + (x[b][t] - mean) / math.sqrt(variance + EPSILON), mask)


def explained_variance(values, returns, mask):
    errors = [[returns[b][t] - values[b][t] for t in range(len(mask[b]))] for b in range(len(mask))]
    unexplained, total = moments(errors, mask)[1], moments(returns, mask)[1]
    return 1 - unexplained / total if total > 0 else 0.0


def gae_of_row(rewards, values, terminated, ended, gamma, lam):
    """Schulman et al. (2016), eq. 16: A_t = Σ_l (γλ)^l δ_{t+l}, the sum going to the end of the episode."""
    steps = len(rewards)

    def td_error(t):
        beyond = 0.0 if terminated[t] else values[t + 1]
        return rewards[t] + gamma * beyond - values[t]

    advantages = []
    for t in range(steps):
        advantage = 0.0
        for k in range(t, steps):
            advantage += (gamma * lam) ** (k - t) * td_error(k)
            if ended[k]:
                break
        advantages.append(advantage)
    return advantages


def gae(rewards, values, terminated, ended, gamma, lam):
    rows = range(len(rewards))
    return [gae_of_row(rewards[b], values[b], terminated[b], ended[b], gamma, lam) for b in rows]


def discounted_return(rewards, ended, t, gamma):
    """Σ_k γ^k r_{t+k} to the end of the episode."""
    total = 0.0
    for k in range(t, len(rewards)):
        total += gamma ** (k - t) * rewards[k]
        if ended[k]:
            break
    return total


def discounted_returns(rewards, ended, gamma):
    return [
        [discounted_return(row, ends, t, gamma) for t in range(len(row))]
        for row, ends in zip(rewards, ended, strict=True)
    ]


def k1(logprob_p, logprob_q):
    return -math.log(math.exp(logprob_q) / math.exp(logprob_p))


def k2(logprob_p, logprob_q):
    return math.log(math.exp(logprob_q) / math.exp(logprob_p)) ** 2 / 2


def k3(logprob_p, logprob_q):
    ratio = math.exp(logprob_q) / math.exp(logprob_p)
    return (ratio - 1) - math.log(ratio)


def softmax(logits):
    largest = max(logits)
    weights = [math.exp(logit - largest) for logit in logits]
    return [weight / math.fsum(weights) for weight in weights]


def logprob(logits, choice):
    return math.log(softmax(logits)[choice])


def entropy(logits):
    return -math.fsum(p * math.log(p) for p in softmax(logits) if p > 0)


def exact_kl(logits_p, logits_q):
    return math.fsum(p * math.log(p / q) for p, q in zip(softmax(logits_p), softmax(logits_q), strict=True) if p > 0)


def kl_shaped_rewards(scores, kl, mask, kl_coef):
    rewards = over_the_mask(lambda b, t: -kl_coef * kl[b][t], mask)
    for b, row in enumerate(mask):
        made = [t for t, decided in enumerate(row) if decided]
        if made:
            rewards[b][made[-1]] += scores[b]
    return rewards


def clip(x, low, high):
    return low if x < low else high if x > high else x


def policy_objective(ratio, advantage, clip_range, dual_clip=None):
    """What a decision adds to the objective to maximise: Schulman et al. (2017), eq. 7; Ye et al. (2020), eq. 5."""
    objective = ratio * advantage
    if clip_range is not None:
        objective = min(objective, clip(ratio, 1 - clip_range, 1 + clip_range) * advantage)
    if dual_clip is not None and advantage < 0:
        objective = max(objective, dual_clip * advantage)
    return objective


def clipped_policy_loss(logprobs, old_logprobs, advantages, mask, clip_range, dual_clip=None, count=None):
    objective = over_the_mask(
        lambda b, t: policy_objective(
            math.exp(logprobs[b][t]) / math.exp(old_logprobs[b][t]), advantages[b][t], clip_range, dual_clip
        ),
        mask,
    )
    return -masked_mean(objective, mask, count)


def value_loss(values, old_values, returns, mask, clip_range=None, count=None):
    def loss(b, t):
        error = (values[b][t] - returns[b][t]) ** 2
        if clip_range is None:
            return error / 2
        near = clip(values[b][t], old_values[b][t] - clip_range, old_values[b][t] + clip_range)
        return max(error, (near - returns[b][t]) ** 2) / 2

    return masked_mean(over_the_mask(loss, mask), mask, count)


def ppo_loss(
    evaluation,
    experience,
    mask,
    *,
    clip_range,
    dual_clip,
    value_clip_range,
    value_coef,
    entropy_coef,
    kl_penalty_coef,
    count=None,
):
    """Schulman et al. (2017), eq. 9, with the sign of a loss, and the penalty of eq. 8. Dicts of rows by name."""
    new, old = evaluation["logprobs"], experience["logprobs"]
    policy = clipped_policy_loss(new, old, experience["advantages"], mask, clip_range, dual_clip, count)
    value = value_loss(evaluation["values"], experience["values"], experience["returns"], mask, value_clip_range, count)
    penalty = masked_mean(over_the_mask(lambda b, t: k3(old[b][t], new[b][t]), mask), mask, count)
    bonus = masked_mean(evaluation["entropy"], mask, count)
    return policy + value_coef * value - entropy_coef * bonus + kl_penalty_coef * penalty


def bradley_terry_loss(chosen, rejected, margin=None, weight=None, count=None):
    """−log P(chosen beats rejected), P = e^(r_c − m) / (e^(r_c − m) + e^(r_r))."""
    total = 0.0
    for i in range(len(chosen)):
        handicap = 0.0 if margin is None else margin[i]
        strength, other = math.exp(chosen[i] - handicap), math.exp(rejected[i])
        total -= (1.0 if weight is None else weight[i]) * math.log(strength / (strength + other))
    return total / (len(chosen) if count is None else count)


def top_k(logits, k):
    """Indices of the tokens that stay: those with fewer than k strictly larger ones."""
    return {i for i, logit in enumerate(logits) if sum(other > logit for other in logits) < k}


def top_p(logits, p):
    """Indices of the tokens that stay: the likeliest, one after another, until together they have probability p."""
    probabilities = softmax(logits)
    kept: list[int] = []
    while not kept or (len(kept) < len(logits) and math.fsum(probabilities[i] for i in kept) < p):
        kept.append(max((i for i in range(len(logits)) if i not in kept), key=lambda i: probabilities[i]))
    return set(kept)
