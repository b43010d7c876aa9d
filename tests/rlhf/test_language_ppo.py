"""PPO on language models: gradients whatever the split and the padding, rewards by hand, the parts of a step."""

from __future__ import annotations

import copy
import dataclasses

import language_cases as cases
import pytest
import torch
from accelerate import Accelerator

from ppo_rlhf.config import MissingEOS, PPOConfig
from ppo_rlhf.core import Experience, approx_kl, kl_shaped_rewards
from ppo_rlhf.errors import UserError
from ppo_rlhf.models import frozen_copy
from ppo_rlhf.rewards import RewardModel
from ppo_rlhf.rollout import Rollout
from ppo_rlhf.settings import PPOSettings, SamplingSettings
from ppo_rlhf.train.ppo import experience_of, next_kl_coef
from ppo_rlhf.train.ppo_credit import missing_eos_rule
from ppo_rlhf.train.ppo_evaluation import summary_of
from ppo_rlhf.train.ppo_parts import load_parts, value_model_of
from ppo_rlhf.train.reward_model import classifier_from
from ppo_rlhf.update import ppo_update

NO_CLIPPING = 1e9  # of the gradient's norm
PROMPTS = [*cases.PROMPT_IDS, [44, 2], [6, 6, 6, 6], [30]]
RESPONSES = [*cases.RESPONSE_IDS, [50, 51, 52, 53], [13, 0], [60, 0]]  # 3, 5, 1, 4, 2, 2 tokens


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def noisy(mask, seed):
    """Numbers that belong to (row, token), whatever the padding; NaN beyond the mask."""
    numbers = torch.randn(len(mask), 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    padded = torch.full(mask.shape, torch.nan, dtype=torch.float64)
    width = min(mask.shape[1], 5)
    padded[:, :width] = numbers[:, :width]
    return torch.where(mask, padded, torch.nan)


def experience_with(policy, **padding):
    """Old log-probabilities a little off the policy's, so that ratios differ from 1 and some are clipped."""
    inputs = cases.inputs_of(PROMPTS, RESPONSES, **padding)
    mask = inputs["response_mask"]
    with torch.no_grad():
        old = policy(**inputs)
    return Experience(
        inputs=inputs,
        logprobs=old.logprobs + 0.2 * noisy(mask, 1),
        values=old.values + 0.3 * noisy(mask, 2),
        advantages=noisy(mask, 3),
        returns=noisy(mask, 4),
        mask=mask,
    )


def updated(policy, experience, accelerator, **settings):
    """(parameters after, statistics): one `ppo_update` by plain gradient descent on a copy of the policy."""
    policy = copy.deepcopy(policy)
    settings = {"num_epochs": 1, "max_grad_norm": NO_CLIPPING, "value_coef": 0.5, **settings}
    statistics = ppo_update(
        policy,
        torch.optim.SGD(policy.parameters(), lr=0.05),
        experience,
        PPOSettings(**settings),
        accelerator=accelerator,
        generator=torch.Generator().manual_seed(0),
    )
    return torch.cat([p.detach().flatten() for p in policy.parameters()]), statistics


def assert_same_outcome(one, other, *, atol):
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=atol)
    assert set(one[1]) == set(other[1])
    for name, value in one[1].items():
        assert other[1][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@cases.every_architecture
@pytest.mark.parametrize("separate", [False, True], ids=["shared value head", "separate value model"])
def test_every_split_into_micro_batches_takes_the_same_step(architecture, accelerator, separate):
    policy = cases.make_policy(architecture, separate=separate, differentiable_entropy=True).double()
    experience = experience_with(policy)
    options = {"num_epochs": 2, "num_minibatches": 2, "entropy_coef": 0.01}
    whole = updated(policy, experience, accelerator, **options)
    start = torch.cat([p.detach().flatten() for p in policy.parameters()])
    assert (whole[0] - start).abs().max() > 1e-3
    assert whole[1]["optimizer_steps"] == 4
    for size in (1, 2, 3):
        # values are float32 by contract, so the last digits of float64 do differ
        assert_same_outcome(
            updated(policy, experience, accelerator, micro_batch_size=size, **options), whole, atol=1e-7
        )


@cases.every_architecture
@pytest.mark.parametrize(
    "padding", [{"extra_left": 3, "extra_right": 2}, {"pad": 0}, {"pad": 5_000, "extra_right": 1}], ids=str
)
def test_padding_changes_neither_the_step_nor_its_metrics(architecture, accelerator, padding):
    policy = cases.make_policy(architecture).double()
    plain = updated(policy, experience_with(policy), accelerator, value_clip_range=0.2)
    padded = updated(policy, experience_with(policy, **padding), accelerator, value_clip_range=0.2)
    assert_same_outcome(padded, plain, atol=1e-7)


def test_one_step_is_the_gradient_of_the_loss_of_unpadded_rows(architecture, accelerator):
    policy = cases.make_policy(architecture).double()
    experience = experience_with(policy)
    actual, _ = updated(policy, experience, accelerator, clip_range=0.2, value_clip_range=None, micro_batch_size=2)

    plain, total = copy.deepcopy(policy), 0.0
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        output = plain.language_model(torch.tensor([[*prompt, *response]]), use_cache=False, output_hidden_states=True)
        values = plain.value_head(output.hidden_states[-1]).squeeze(-1)[0]
        logprobs = output.logits[0].log_softmax(-1)
        for t, token in enumerate(response):
            place, advantage = len(prompt) - 1 + t, experience.advantages[row, t]
            ratio = (logprobs[place, token] - experience.logprobs[row, t]).exp()
            total += torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
            total += 0.5 * 0.5 * (values[place] - experience.returns[row, t]) ** 2
    (total / sum(map(len, RESPONSES))).backward()
    expected = torch.cat([(p - 0.05 * p.grad).detach().flatten() for p in plain.parameters()])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-7)


def test_the_statistics_of_the_first_step_are_those_of_an_unchanged_policy(architecture, accelerator):
    policy = cases.make_policy(architecture)
    experience = experience_with(policy)
    with torch.no_grad():
        old = policy(**experience.inputs)
    experience = dataclasses.replace(experience, logprobs=old.logprobs, values=old.values)
    _, statistics = updated(policy, experience, accelerator, micro_batch_size=2)
    assert statistics["policy/ratio"] == pytest.approx(1, abs=1e-5)
    assert statistics["policy/approx_kl"] == pytest.approx(0, abs=1e-6)
    assert statistics["policy/clip_fraction"] == 0
    mean_advantage = experience.advantages[experience.mask].mean()
    assert statistics["loss/policy"] == pytest.approx(-float(mean_advantage), abs=1e-5)
    assert statistics["objective/entropy"] == pytest.approx(float(old.entropy[experience.mask].mean()), rel=1e-5)


def test_an_update_leaves_the_reference_as_it_was(accelerator):
    policy = cases.make_policy()
    reference = frozen_copy(policy.language_model)
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    experience = experience_with(policy)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    ppo_update(policy, optimizer, experience, PPOSettings(), accelerator=accelerator, generator=generator)
    assert all(torch.equal(before[name], tensor) for name, tensor in reference.state_dict().items())
    moved = policy.language_model.state_dict()
    assert any(not torch.equal(before[name], moved[name]) for name in before)


# ---------------------------------------------------------------------------------------------------- rewards by hand

MASK = torch.tensor([[True, True, False], [True, True, True], [True, True, True], [True, False, False]])
FINISHED = torch.tensor([True, True, False, True])  # stopped early, at the last place, cut off, at once
SCORES = torch.tensor([2.0, 3.0, 4.0, 0.0])


def config_of(**changes):
    return PPOConfig(**{"batch_size": 4, **changes})


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (MissingEOS("set", -1.0), [2.0, 3.0, -1.0, 0.0]),
        (MissingEOS("subtract", 1.5), [2.0, 3.0, 2.5, 0.0]),
        (MissingEOS("none"), [2.0, 3.0, 4.0, 0.0]),
    ],
    ids=["set", "subtract", "none"],
)
def test_the_missing_eos_rule_touches_only_responses_that_were_cut_off(rule, expected):
    paid = missing_eos_rule(SCORES, FINISHED, rule)
    assert paid.tolist() == expected
    assert SCORES.tolist() == [2.0, 3.0, 4.0, 0.0]


def test_a_negative_penalty_is_refused():
    with pytest.raises(UserError, match="would reward a missing eos"):
        MissingEOS("subtract", -1.0)


def test_the_score_is_paid_at_the_last_generated_token_stopped_cut_off_or_full():
    logprobs = torch.tensor([[-1.0, -2.0, 9.0], [-1.0, -1.0, -1.0], [-3.0, -1.0, -2.0], [-0.5, 9.0, torch.nan]])
    ref_logprobs = torch.tensor([[-2.0, -1.5, 0.0], [-1.0, -1.0, -3.0], [-1.0, -1.0, -1.0], [-0.5, 0.0, 1.0]])
    paid = missing_eos_rule(SCORES, FINISHED, MissingEOS("set", -1.0))
    rewards = kl_shaped_rewards(paid, approx_kl(logprobs, ref_logprobs, "k1"), MASK, kl_coef=0.1)
    # −0.1·(log π − log π_ref), and the score at the last True
    expected = torch.tensor([[-0.1, 0.05 + 2.0, 0.0], [0.0, 0.0, -0.2 + 3.0], [0.2, 0.0, 0.1 - 1.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)


def rollout_with(values, mask=MASK):
    zeros = torch.zeros(mask.shape)
    return Rollout(
        inputs={"response_ids": zeros.long()},
        logprobs=zeros,
        ref_logprobs=zeros,
        values=torch.cat([values, torch.zeros(len(mask), 1)], dim=1),
        entropy=zeros,
        mask=mask,
    )


def test_advantages_and_returns_by_hand_for_stopped_full_length_and_cut_off_responses(accelerator):
    values = torch.tensor([[0.5, 1.0, 7.0], [0.0, 0.0, 0.0], [1.0, 0.5, 0.25], [0.25, torch.nan, torch.nan]])
    rewards = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 3.0], [0.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    experience = experience_of(
        rollout_with(values), rewards, FINISHED, config_of(gamma=1.0, gae_lambda=0.5), accelerator
    )
    # row 0: A1 = 2 − 1 = 1, A0 = 0 + 1 − 0.5 + 0.5·1 = 1; the 7 behind the end is never read
    # row 1: A2 = 3, A1 = 1.5, A0 = 0.75
    # row 2: A2 = −1 − 0.25 = −1.25, A1 = 0.25 − 0.5 − 0.625 = −0.875, A0 = 0.5 − 1 − 0.4375 = −0.9375
    # row 3: A0 = 0 − 0.25
    advantages = torch.tensor([1.0, 1.0, 0.75, 1.5, 3.0, -0.9375, -0.875, -1.25, -0.25])
    returns = torch.tensor([1.5, 2.0, 0.75, 1.5, 3.0, 0.0625, -0.375, -1.0, 0.0])
    torch.testing.assert_close(experience.returns[MASK], returns)
    whitened = (advantages - advantages.mean()) / advantages.std(correction=0)
    torch.testing.assert_close(experience.advantages[MASK], whitened, rtol=1e-4, atol=1e-5)
    assert (experience.advantages[~MASK] == 0).all()
    assert experience.values.shape == MASK.shape


def test_whitened_rewards_keep_their_mean_and_count_the_mask_alone(accelerator):
    rewards = torch.tensor([[1.0, 3.0, 0.0], [1.0, 3.0, 5.0], [1.0, 1.0, 1.0], [3.0, 0.0, 0.0]])
    rewards[~MASK] = 100.0
    config = config_of(gamma=0.0, gae_lambda=0.0, whiten_rewards=True)
    experience = experience_of(rollout_with(torch.zeros(4, 3)), rewards, FINISHED, config, accelerator)
    kept = rewards[MASK]  # without discounting and values, returns are the rewards themselves
    expected = (kept - kept.mean()) / kept.std(correction=0) + kept.mean()
    torch.testing.assert_close(experience.returns[MASK], expected, rtol=1e-5, atol=1e-5)


def test_more_padding_changes_no_advantage(accelerator):
    values, rewards = torch.randn(4, 3), torch.randn(4, 3)
    plain = experience_of(rollout_with(values), rewards, FINISHED, config_of(), accelerator)
    extra = torch.full((4, 2), torch.nan)
    mask = torch.cat([MASK, torch.zeros(4, 2, dtype=torch.bool)], dim=1)
    padded = experience_of(
        rollout_with(torch.cat([values, extra], 1), mask),
        torch.cat([rewards, extra * 0 + 9], 1),
        FINISHED,
        config_of(),
        accelerator,
    )
    for name in ("advantages", "returns"):
        torch.testing.assert_close(getattr(padded, name)[mask], getattr(plain, name)[MASK])


def test_the_kl_coefficient_stays_without_a_target_and_follows_the_kl_with_one():
    assert next_kl_coef(0.15, 100.0, config_of()) == 0.15
    config = config_of(batch_size=100, kl_target=6.0, kl_horizon=10_000)
    assert next_kl_coef(0.15, 6.0, config) == pytest.approx(0.15)
    assert next_kl_coef(0.15, 6.6, config) == pytest.approx(0.15 * (1 + 0.1 * 0.01))
    assert next_kl_coef(0.15, 60.0, config) == pytest.approx(0.15 * (1 + 0.2 * 0.01))  # the error is clipped
    assert next_kl_coef(0.15, -3.0, config) == pytest.approx(0.15 * (1 - 0.2 * 0.01))


def test_a_summary_sets_before_beside_after():
    before = {"eval/score": 1.0, "eval/kl": 0.0, "eval/length": 5.0, "eval/stop_rate": 0.5, "eval/distinct_2": 0.9}
    after = {"eval/score": 2.0, "eval/kl": 3.0, "eval/length": 6.0, "eval/stop_rate": 0.75, "eval/distinct_2": 0.8}
    summary = summary_of(before, after)
    assert (summary["score_before"], summary["score_after"], summary["kl"], summary["stop_rate"]) == (
        1.0,
        2.0,
        3.0,
        0.75,
    )
    assert "gold_score_before" not in summary
    gold = summary_of({**before, "eval/gold_score": 1.5, "eval/gold_score_std": 0.5}, {**after, "eval/gold_score": 4.0})
    assert (gold["gold_score_before"], gold["gold_score_after"], gold["gold_score_std_before"]) == (1.5, 4.0, 0.5)


# ---------------------------------------------------------------------------------------------------- parts of a run


def by_length(prompts, responses, **columns):
    return [float(len(response)) for response in responses]


def parts_of(accelerator, *, dropout=0.0, reward=by_length, num_prompts=10, pad_is_eos=False, **changes):
    config = PPOConfig(**{"batch_size": 4, "sampling": SamplingSettings(max_new_tokens=6), **changes})
    rows = [{"prompt": f"the cat {letter}"} for letter in "abcdefghijklmnopqrst"[:num_prompts]]
    model, tokenizer = cases.make_model(dropout=dropout), cases.make_tokenizer(pad_is_eos=pad_is_eos)
    return load_parts(config, accelerator, model, tokenizer, None, reward, None, rows)


def test_a_runs_reference_is_the_policy_as_it_starts_on_storage_of_its_own(accelerator):
    parts = parts_of(accelerator, dropout=0.5)
    ours, theirs = parts.model.language_model.state_dict(), parts.reference.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(ours[name].data_ptr() != theirs[name].data_ptr() for name in ours)
    assert not any(p.requires_grad for p in parts.reference.parameters())
    inputs = cases.inputs_of()
    assert torch.equal(parts.model(**inputs).logprobs, parts.model(**inputs).logprobs)  # dropout is off
    assert parts.model.training


@pytest.mark.parametrize("value_model", ["shared", "separate"])
@pytest.mark.filterwarnings("error")  # transformers deprecates one of its two calls for it
def test_gradient_checkpointing_reaches_all_that_is_trained_and_not_the_reference(value_model, accelerator):
    parts = parts_of(accelerator, gradient_checkpointing=True, value_model=value_model)
    trained = [parts.model.language_model]
    if value_model == "separate":
        trained.append(parts.model.value_model.trunk)
    assert all(model.is_activation_checkpointing for model in trained)
    assert not parts.reference.is_activation_checkpointing


def test_a_pad_that_was_eos_is_told_apart_in_policy_and_reference_alike(accelerator):
    parts = parts_of(accelerator, pad_is_eos=True)
    assert parts.tokenizer.pad_token_id != parts.tokenizer.eos_token_id
    rows = parts.model.language_model.get_input_embeddings().num_embeddings
    assert rows == parts.reference.get_input_embeddings().num_embeddings > parts.tokenizer.pad_token_id


def test_a_separate_value_model_starts_from_the_reward_model_and_trains_apart_from_it(accelerator):
    classifier = classifier_from(cases.make_model(dropout=0.5))
    reward = RewardModel(classifier, cases.make_tokenizer())
    reward.set_normalization(0.5, 2.0)
    policy = cases.make_model(seed=3)
    values = value_model_of(config_of(value_model="separate"), policy, cases.make_tokenizer(), reward).train()
    ids, mask = torch.tensor([[5, 9, 12, 0]]), torch.ones(1, 4, dtype=torch.bool)
    expected = (reward.raw_scores([[5, 9, 12, 0]]) - 0.5) / 2.0
    torch.testing.assert_close(values(ids, mask)[:, -1], expected, rtol=0, atol=1e-5)
    assert all(p.requires_grad for p in values.parameters())
    shared = {p.data_ptr() for p in values.parameters()} & {p.data_ptr() for p in classifier.parameters()}
    assert not shared


def test_a_separate_value_model_from_the_policy_starts_at_zero(accelerator):
    policy = cases.make_model()
    values = value_model_of(config_of(value_model="separate"), policy, cases.make_tokenizer(), by_length)
    ids, mask = torch.tensor([[5, 9, 12, 0]]), torch.ones(1, 4, dtype=torch.bool)
    assert (values(ids, mask) == 0).all()
    assert not {p.data_ptr() for p in values.parameters()} & {p.data_ptr() for p in policy.parameters()}
    assert all(p.requires_grad for p in values.parameters())
    assert value_model_of(config_of(), policy, cases.make_tokenizer(), by_length) is None


def test_a_reward_model_of_another_vocabulary_cannot_become_the_value_model():
    policy = cases.make_model()
    tokenizer = cases.make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    reward = RewardModel(classifier_from(cases.make_model()), cases.make_tokenizer())
    with pytest.raises(UserError, match="its vocabulary is not the policy's"):
        value_model_of(config_of(value_model="separate"), policy, tokenizer, reward)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_prompts": 4}, "batch_size=4 is larger than the 3 prompts to train on"),
        ({"sampling": SamplingSettings(max_new_tokens=48)}, "max_new_tokens=48 fills the model's context"),
        ({"sampling": SamplingSettings(max_new_tokens=46)}, r"prompt \d has \d+ tokens; 2 fit"),
        ({"eval_fraction": 0.01}, "eval_fraction=0.01 holds out 0 of 10 prompts"),
    ],
)
def test_a_configuration_that_cannot_run_is_refused_by_name(accelerator, changes, message):
    with pytest.raises(UserError, match=message):
        parts_of(accelerator, **{"eval_fraction": 0.25, **changes})
