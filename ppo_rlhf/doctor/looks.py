"""What each check looks at: Record → what it saw, in words with the numbers.

None where all is well or the run is too young to say. Thresholds lie well outside of what the healthy runs of
`examples/benchmarks/README.md` show.
"""

from __future__ import annotations

import math
from statistics import fmean, stdev

from ppo_rlhf.doctor.change import change_of, latest
from ppo_rlhf.records import Record

EXACT = 1e-3  # how far the first ratio may be from 1 in float32, whose observed deviation is 7e-6
ROUNDED = 0.1  # the same in bf16 and fp16: observed 5e-2


# ------------------------------------------------------------------------------------- what the policy samples


def negative_kl(record: Record) -> str | None:
    values = record.series("objective/kl")[-10:]
    if len(values) < 5:
        return None
    mean, error = fmean(values), stdev(values) / math.sqrt(len(values))
    if mean > -0.05 or mean + 3 * error > 0:
        return None
    cut = ", ".join(f"sampling.{name}={record.setting(f'sampling.{name}')}" for name in ("top_k", "top_p"))
    return f"objective/kl is {mean:.2f} ± {error:.2f} nats a response over the last {len(values)} steps ({cut})"


def first_ratio(record: Record) -> str | None:
    deviation = _first_deviation(record)
    if deviation <= _tolerance(record):
        return None
    return f"before an update's first step its ratios deviate from 1 by {deviation:.2g}"


def _first_deviation(record: Record) -> float:
    """Root mean square of log ρ before any step of an update, from its k3 estimate, the largest of the run.

    Of the first update alone where rollouts are sampled ahead: those after it are meant to differ.
    """
    deviations = record.series("policy/first_kl")
    return math.sqrt(2 * max([0.0, *(deviations[:1] if record.setting("sample_ahead") else deviations)]))


def _tolerance(record: Record) -> float:
    return EXACT if record.setting("precision", "no") == "no" else ROUNDED


def dropout(record: Record) -> str | None:
    start = record.series("eval/kl")
    if record.setting("reference") is not None or not start or abs(start[0]) > 1e-4:
        return None  # the reference is another model than the start
    if _first_deviation(record) <= _tolerance(record):
        return None
    differences = [
        abs(logprob - ref_logprob)
        for row in record.samples
        if row.get("kind") == "rollout" and row.get("step") == 1
        for logprob, ref_logprob in zip(row["logprobs"], row["ref_logprobs"], strict=True)
    ]
    if not differences or fmean(differences) <= _tolerance(record):
        return None
    return (
        f"in the first rollout, before any training, the policy in training mode differs from its own start by "
        f"{fmean(differences):.2g} nats a token, in evaluation mode by {abs(start[0]):.1g} a response"
    )


def other_sampler(record: Record) -> str | None:
    values = record.series("sampler/logprob_difference")[-5:]
    if not values or fmean(values) <= ROUNDED:
        return None
    return f"the sampler's log-probabilities differ from the policy's by {fmean(values):.2g} nats a token"


def masked_stop_token(record: Record) -> str | None:
    if record.setting("sampling.stop_token_ids"):
        return None  # a stop token that is shown as text cannot be told from any other
    rows = [row for row in record.samples if row.get("kind") == "rollout" and row.get("finished") and row["tokens"]]
    visible = [row for row in rows if row["tokens"][-1] and row["response"].endswith(row["tokens"][-1])]
    if len(rows) < 4 or len(visible) < len(rows):
        return None
    return f"the last trained token of all {len(rows)} finished responses in samples.jsonl is text, not the stop token"


# ------------------------------------------------------------------------------------------------- the outcome


def reward_hacking(record: Record) -> str | None:
    score = change_of(record.series("objective/score"))
    if score is None or not score.rose:
        return None
    told = [f"the score rose from {score.first:.2f} to {score.last:.2f}"]
    gold = change_of(record.series("objective/gold_score"))
    spread = (record.series("eval/gold_score_std") or [0.0])[0]
    if gold is not None and gold.fell and gold.highest - gold.last > spread / 4:
        told.append(f"the gold score fell from {gold.highest:.2f} to {gold.last:.2f}")
    length = change_of(record.series("response/length"))
    if length is not None and length.rose and length.last > 2 * length.first:
        told.append(f"responses grew from {length.first:.0f} to {length.last:.0f} tokens")
    repeated = change_of(record.series("response/repetition"))
    if repeated is not None and repeated.rose and repeated.last - repeated.first > 0.25:
        told.append(f"the share of repeated token pairs grew from {repeated.first:.0%} to {repeated.last:.0%}")
    return ", while ".join([told[0], " and ".join(told[1:])]) if len(told) > 1 else None


def kl_running_away(record: Record) -> str | None:
    values, lengths = record.series("objective/kl"), record.series("response/length")
    if len(values) < 3:
        return None
    kl, length, target = fmean(latest(values)), fmean(latest(lengths)), record.setting("kl_target")
    if target is not None and kl > 3 * target and len(values) >= 10:
        return f"objective/kl is {kl:.1f} nats a response, over three times kl_target={target}"
    if kl > max(1.0, length):
        return f"objective/kl is {kl:.1f} nats a response of {length:.0f} tokens: over 1 nat a token"
    return None


def entropy_collapse(record: Record) -> str | None:
    values = record.series("objective/entropy")
    if len(values) < 3 or min(values) < 0:  # a density's entropy has no floor, and no scale
        return None
    now = fmean(latest(values))
    if now > values[0] / 10:
        return None
    if record.stage == "classic":
        returns = change_of(record.series("episode/return"))
        if returns is None or returns.rose:
            return None
    return f"objective/entropy fell from {values[0]:.3g} to {now:.2g} nats a decision"


def stop_rate_falling(record: Record) -> str | None:
    before, now = record.series("eval/stop_rate"), record.series("response/stop_rate")
    if not before or len(now) < 3 or before[0] - fmean(latest(now)) < 0.25:
        return None
    return f"the share of responses that stop by themselves fell from {before[0]:.0%} to {fmean(latest(now)):.0%}"


def length_collapse(record: Record) -> str | None:
    before, now = record.series("eval/length"), record.series("response/length")
    if not before or len(now) < 3 or fmean(latest(now)) > before[0] / 3:
        return None
    return f"responses shrank from {before[0]:.1f} to {fmean(latest(now)):.1f} tokens"


def constant_reward(record: Record) -> str | None:
    if record.stage == "classic":
        returns = record.series("episode/return")
        constant = len(returns) >= 8 and len(set(returns)) == 1
        return f"all episodes of {len(returns)} updates returned {returns[0]:g}" if constant else None
    steps = record.step / 2  # what happened long ago is over
    scores = [row["score"] for row in record.samples if row["step"] >= steps and row.get("score") is not None]
    if len(scores) < 8 or len(set(scores)) > 1:
        return None
    return f"all {len(scores)} responses in samples.jsonl since step {math.ceil(steps)} scored {scores[0]:g}"


def reward_vocabulary(record: Record) -> str | None:
    values = record.series("eval/gold_correlation")
    if not values or max(values) > 0.1:
        return None
    return f"over held-out responses the score's rank correlation with the gold score is {max(values):.2f} at best"


# -------------------------------------------------------------------------------------------------- the update


def clip_fraction(record: Record) -> str | None:
    values = record.series("policy/clip_fraction")
    if len(values) < 4 or fmean(values[len(values) // 2 :]) <= 0.3:
        return None
    return f"{fmean(values[len(values) // 2 :]):.0%} of the decisions are clipped, over the second half of the run"


def value_function(record: Record) -> str | None:
    values = record.series("value/explained_variance")
    if len(values) < 8:
        return None
    if all(abs(value) < 1e-6 for value in values):
        return "value/explained_variance is 0 at every step: the values are one constant"
    change = change_of(values)
    if change is None or change.highest > 0.1 or change.last > -0.5:
        return None
    return f"value/explained_variance is {change.last:.2f} by now, and was never above {change.highest:.2f}"


def whitening_batch(record: Record) -> str | None:
    rows, unit = record.setting("batch_size"), "responses"
    if record.stage == "classic":
        rows, unit = record.setting("num_envs", 1) * record.setting("horizon", 1), "steps"
    whitening = record.setting("ppo.whiten_advantages", "rollout")
    if whitening == "none" or (whitening == "rollout" and record.setting("advantage", "gae") != "gae"):
        return None  # over a rollout GAE's alone are whitened
    if whitening == "minibatch":
        rows, unit = rows // record.setting("ppo.num_minibatches", 1), f"{unit} of a minibatch"
    return f"advantages are whitened over {rows} {unit}" if rows < 8 else None


def reference_moved(record: Record) -> str | None:
    norms = record.series("eval/reference_norm")
    if norms and max(norms) - min(norms) > 1e-6 * max(norms):
        return f"the norm of the reference's weights went from {norms[0]:.8g} to {norms[-1]:.8g}"
    kl = record.series("objective/kl")[1:]
    moved = sum(record.series("policy/approx_kl"))
    if len(kl) >= 3 and moved > 1e-4 and max(map(abs, kl)) < 1e-6:
        return f"objective/kl stays 0 although the updates moved the policy by {moved:.2g} nats a token"
    return None


def gradient_clipped(record: Record) -> str | None:
    limit = record.setting("max_grad_norm", record.setting("ppo.max_grad_norm"))
    norms = record.series("grad_norm")
    if limit is None or len(norms) < 10 or min(norms) <= 10 * limit:
        return None
    return f"at every step the gradient's norm, at least {min(norms):.2g}, was over ten times max_grad_norm={limit}"


def bad_numbers(record: Record) -> str | None:
    skipped = sum(record.series("skipped_steps"))
    names = sorted({name for row in record.rows for name, value in row.items() if value is None})
    if not skipped and not names:
        return None
    told = [f"{skipped:.0f} optimizer steps were skipped"] if skipped else []
    return "; ".join([*told, *([f"not finite: {', '.join(names)}"] if names else [])])
