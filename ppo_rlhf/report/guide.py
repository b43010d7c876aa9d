"""The study guide in short, as the report embeds it; docs/ppo-in-chatgpt.md has the same anchors at length."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One quantity."""

    anchor: str
    name: str
    formula: str
    meaning: str
    file: str
    line: str  # of the file, as it stands there


GUIDE = (
    Entry(
        "logprob",
        "Log-probability",
        "log π(aₜ | sₜ)",
        "How likely the policy was to write this token after all before it. Each token is an action, the text so far "
        "is the state. 0 is certainty; −2.3 is one in ten.",
        "ppo_rlhf/policy.py",
        "logprobs, entropy = tokens.logprobs(",
    ),
    Entry(
        "reference",
        "Reference log-probability",
        "log π_ref(aₜ | sₜ)",
        "The same token under the frozen model from which training started. It stands for fluent language.",
        "ppo_rlhf/rollout.py",
        "ref_logprobs.append(response_logprobs(reference, piece, temperature=temperature))",
    ),
    Entry(
        "kl",
        "KL",
        "KLₜ = log π(aₜ) − log π_ref(aₜ)",
        "How far the policy has moved from the reference at this token: positive where it now likes the token more. "
        "Its sum over a response estimates the KL divergence of the two models.",
        "ppo_rlhf/core/kl.py",
        "log_ratio = logprobs_p - logprobs_q",
    ),
    Entry(
        "reward",
        "Reward",
        "rₜ = −β·KLₜ, and at the last token + score",
        "The reward model reads whole responses, so its score is paid once, at the end; every token pays for its KL. "
        "Without the penalty the policy would find texts that fool the reward model.",
        "ppo_rlhf/core/kl.py",
        "rewards = torch.where(mask, -kl_coef * kl, 0)",
    ),
    Entry(
        "value",
        "Value",
        "V(sₜ)",
        "What the value head expects the response to earn from here on, before it sees this token.",
        "ppo_rlhf/policy.py",
        "values = tokens.padded(linear_values(self.value_head, hidden))",
    ),
    Entry(
        "advantage",
        "Advantage",
        "δₜ = rₜ + γ·Vₜ₊₁ − Vₜ,  Aₜ = δₜ + γλ·Aₜ₊₁",
        "How much better this token turned out than the value head expected (generalised advantage estimation). Before "
        "training, a rollout’s advantages are shifted and scaled to mean 0 and variance 1.",
        "ppo_rlhf/core/advantages.py",
        "deltas = rewards + gamma * next_values - values[:, :-1]",
    ),
    Entry(
        "return",
        "Return",
        "Rₜ = Aₜ + Vₜ",
        "What the value head should have expected: the target that it is trained towards.",
        "ppo_rlhf/core/losses.py",
        "error = torch.where(mask, values - returns, zero)",
    ),
    Entry(
        "ratio",
        "Ratio",
        "ρₜ = exp(log π_new(aₜ) − log π_old(aₜ))",
        "How much likelier the token has become since it was sampled. It is 1 before the first step, and moves with "
        "each epoch over the same rollout.",
        "ppo_rlhf/core/losses.py",
        "change = torch.expm1(log_ratio.clamp(max=MAX_LOG_RATIO))",
    ),
    Entry(
        "clip",
        "Clipping",
        "Lₜ = max(−A·ρ, −A·clip(ρ, 1−ε, 1+ε))",
        "PPO’s safety catch: once a token has moved by ε in the direction that its advantage asks for, it has no "
        "gradient any more. Moving back is always allowed.",
        "ppo_rlhf/core/losses.py",
        "loss = torch.maximum(loss, gains * ratio.clamp(1 - clip_range, 1 + clip_range))",
    ),
    Entry(
        "entropy",
        "Entropy",
        "H = −Σ π(a)·log π(a)",
        "How undecided the policy was here, over all tokens it could have written, in nats. 0: it saw no choice.",
        "ppo_rlhf/policy.py",
        "logprobs, entropy = tokens.logprobs(",
    ),
)
