"""What stands beside PPO and shares its update: PPO-ptx, group baselines, averaged weights, bootstrap at the limit."""

from __future__ import annotations

import copy
import dataclasses

import language_cases as cases
import pytest
import torch
from accelerate import Accelerator
from test_language_ppo import MASK, config_of, experience_with, rollout_with

from ppo_rlhf.config import MissingEOS, PretrainingSettings
from ppo_rlhf.core import ppo_loss
from ppo_rlhf.data import Example
from ppo_rlhf.errors import UserError
from ppo_rlhf.policy import PolicyWithValue
from ppo_rlhf.prompts import PromptBatch
from ppo_rlhf.rollout import evaluate
from ppo_rlhf.settings import PPOSettings
from ppo_rlhf.train.averaging import averaged, moving_average
from ppo_rlhf.train.ppo import experience_of
from ppo_rlhf.train.ppo_credit import missing_eos_rule
from ppo_rlhf.train.pretraining import pretraining_of
from ppo_rlhf.update import ppo_update

STOPPED = torch.tensor([True, True, False, True])  # of MASK, the third response was cut off


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


# ---------------------------------------------------------------------------------------------------- PPO-ptx

TEXTS = [
    Example([5, 9, 12, 40, 0], [False, False, True, True, True]),
    Example([7, 3], [False, True]),
    Example([8, 30, 31, 0], [False, False, False, True]),
]


def ptx_config(**changes):
    settings = {"data": "texts.jsonl", "coef": 3.0, "batch_size": 3, **changes}
    return config_of(pretraining=PretrainingSettings(**settings), ppo=PPOSettings(num_epochs=1))


def negative_loglikelihood(policy):
    """Mean over the learnt tokens of all texts, each text on its own, unpadded."""
    losses = []
    for text in TEXTS:
        logprobs = policy.language_model(torch.tensor([text.ids]), use_cache=False).logits[0].log_softmax(-1)
        losses += [-logprobs[place - 1, text.ids[place]] for place in range(text.start, len(text.ids))]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("micro_batch_size", [None, 1, 2])
def test_a_step_of_ppo_ptx_descends_the_sum_of_both_gradients(accelerator, micro_batch_size):
    policy = cases.make_policy().double()
    experience = experience_with(policy)
    config = ptx_config(micro_batch_size=micro_batch_size)
    taken = copy.deepcopy(policy)
    statistics = ppo_update(
        taken,
        torch.optim.SGD(taken.parameters(), lr=0.05),
        experience,
        PPOSettings(num_epochs=1, max_grad_norm=1e9, micro_batch_size=micro_batch_size),
        accelerator=accelerator,
        generator=torch.Generator().manual_seed(0),
        auxiliary_losses=pretraining_of(taken, TEXTS, 0, config, accelerator),
    )
    loss, _ = ppo_loss(policy(**experience.inputs), experience, clip_range=0.2, value_clip_range=0.2, value_coef=0.1)
    cross_entropy = negative_loglikelihood(policy)
    assert statistics["loss/auxiliary"] == pytest.approx(3.0 * float(cross_entropy.detach()), rel=1e-6)
    (loss + 3.0 * cross_entropy).backward()
    for one, other in zip(taken.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(one, other - 0.05 * other.grad, rtol=0, atol=1e-7)


def test_ppo_ptx_reads_on_where_it_was(accelerator):
    policy = cases.make_policy()
    config = config_of(
        pretraining=PretrainingSettings(data="texts.jsonl", batch_size=2),
        ppo=PPOSettings(num_epochs=2, num_minibatches=2),
    )
    whole = pretraining_of(policy, TEXTS, 0, config, accelerator)
    resumed = pretraining_of(policy, TEXTS, 1, config, accelerator)
    for number in (0, 1):
        assert torch.equal(sum(whole(4 + number)), sum(resumed(number)))
    assert pretraining_of(policy, [], 0, config, accelerator) is None


# ---------------------------------------------------------------------------------------------------- group baselines

REWARDS = torch.tensor([[1.0, 2.0, 0.0], [0.5, 0.0, 0.5], [0.0, 0.0, 6.0], [4.0, 0.0, 0.0]])  # 3, 1, 6, 4 in sum


@pytest.mark.parametrize(
    ("advantage", "expected"), [("rloo", [2.0, -2.0, 2.0, -2.0]), ("grpo", [1.0, -1.0, 1.0, -1.0])]
)
def test_against_the_other_responses_to_its_prompt_every_token_has_the_responses_advantage(
    advantage, expected, accelerator
):
    config = config_of(advantage=advantage, responses_per_prompt=2)
    experience = experience_of(rollout_with(torch.zeros(4, 3)), REWARDS, STOPPED, config, accelerator)
    torch.testing.assert_close(experience.advantages, torch.tensor(expected)[:, None].expand(4, 3))
    assert torch.equal(experience.returns, experience.values)  # nothing for a value function to learn


def test_a_policy_without_values_has_no_head_and_says_the_same_of_tokens():
    torch.manual_seed(0)
    with_values = cases.make_policy()
    plain = PolicyWithValue(with_values.language_model, with_values=False)
    inputs = cases.inputs_of()
    one, other = plain(**inputs), with_values(**inputs)
    assert torch.equal(one.logprobs, other.logprobs)
    assert (one.values == 0).all()
    assert {name for name, _ in plain.named_parameters()} == {
        name for name, _ in with_values.named_parameters() if name.startswith("language_model")
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantage": "rloo"}, "advantage=rloo needs responses_per_prompt of 2 or more, not 1"),
        ({"responses_per_prompt": 3}, "batch_size=4 does not divide into responses_per_prompt=3"),
        ({"responses_per_prompt": 0}, "responses_per_prompt=0 must be at least 1"),
        (
            {"advantage": "grpo", "responses_per_prompt": 2, "value_model": "separate"},
            "value_model=separate needs values",
        ),
        (
            {"advantage": "rloo", "responses_per_prompt": 2, "missing_eos": MissingEOS("bootstrap")},
            "missing_eos.rule=bootstrap needs values, which advantage=rloo has none of",
        ),
        ({"ema_decay": 1.0}, "ema_decay=1.0 must lie between 0 and 1"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        config_of(**changes)


@pytest.mark.parametrize(
    "changes", [{"coef": 0.0}, {"batch_size": 0}, {"micro_batch_size": 0}, {"max_length": 1}], ids=str
)
def test_pretraining_that_makes_no_sense_is_refused_by_name(changes):
    (name,) = changes
    with pytest.raises(UserError, match=f"pretraining.{name}="):
        PretrainingSettings(**changes)


# ---------------------------------------------------------------------------------------------------- bootstrap


def test_a_response_that_was_cut_off_goes_on_by_its_value(accelerator):
    values = torch.tensor([[0.5, 1.0, 7.0], [0.0, 0.0, 0.0], [1.0, 0.5, 0.25], [0.25, 0.0, 0.0]])
    rollout = rollout_with(values)
    rollout = dataclasses.replace(
        rollout, values=torch.cat([values, torch.tensor([[9.0], [9.0], [2.0], [9.0]])], dim=1)
    )
    rewards = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 3.0], [0.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    config = config_of(gamma=1.0, gae_lambda=1.0, missing_eos=MissingEOS("bootstrap"))
    experience = experience_of(rollout, rewards, STOPPED, config, accelerator)
    # the third was cut off: −1 and V = 2 of what would follow; the others end, and the 9 is never read
    assert experience.returns[MASK].tolist() == [2.0, 2.0, 3.0, 3.0, 3.0, 1.0, 1.0, 1.0, 0.0]


def test_a_response_that_was_cut_off_is_not_scored_but_keeps_what_it_was_paid_before():
    scores, dense = torch.tensor([2.0, 3.0, 4.0, 1.0]), torch.full((4, 3), 0.5)
    rule = MissingEOS("bootstrap")
    assert missing_eos_rule(scores, STOPPED, rule).tolist() == [2.0, 3.0, 0.0, 1.0]
    assert missing_eos_rule(scores, STOPPED, rule, dense).tolist() == [2.0, 3.0, 1.5, 1.0]


def test_the_value_after_the_last_token_is_that_of_the_whole_response_read(architecture):
    policy = cases.make_policy(architecture).double()
    inputs = cases.inputs_of()  # the second response fills its five places: it was cut off
    responses = dataclasses.replace(cases.responses_of(inputs), finished=torch.tensor([True, False, True]))
    prompts = PromptBatch(inputs["prompt_ids"], inputs["prompt_mask"], [""] * 3, [0, 1, 2])
    plain, reaching = (
        evaluate(policy, policy.language_model, prompts, responses, temperature=1.0, batch_size=2, bootstrap=bootstrap)
        for bootstrap in (False, True)
    )
    for name in ("logprobs", "entropy", "ref_logprobs"):
        cases.assert_close_on(plain.mask, getattr(reaching, name), getattr(plain, name))
    cases.assert_close_on(plain.mask, reaching.values[:, :-1], plain.values[:, :-1])
    assert (plain.values[:, -1] == 0).all()
    ids = torch.tensor([[*cases.PROMPT_IDS[1], *cases.RESPONSE_IDS[1]]])
    hidden = policy.language_model(ids, use_cache=False, output_hidden_states=True).hidden_states[-1][0, -1]
    expected = float(policy.value_head(hidden).detach())
    assert reaching.values[:, -1].tolist() == pytest.approx([0.0, expected, 0.0], abs=1e-5)


# ---------------------------------------------------------------------------------------------------- averaged weights


def test_the_moving_average_starts_at_the_weights_and_follows_them_slowly():
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(1.0)
    average = moving_average({}, module, 0.75)
    module.weight.data.fill_(5.0)
    average = moving_average(average, module, 0.75)
    assert average["average/weight"].tolist() == [[2.0]]  # ¾·1 + ¼·5
    with averaged(module, average):
        assert module.weight.tolist() == [[2.0]]
    assert module.weight.tolist() == [[5.0]]
    with averaged(module, {}):
        assert module.weight.tolist() == [[5.0]]


def test_weights_that_are_not_trained_have_no_average():
    module = torch.nn.Linear(1, 1)
    rounded = torch.nn.Parameter(
        torch.tensor([[200]], dtype=torch.uint8), requires_grad=False
    )  # as bitsandbytes has it
    module.weight = rounded
    average = moving_average(moving_average({}, module, 0.75), module, 0.75)
    assert average.keys() == {"average/bias"}
    with averaged(module, average):
        assert module.weight.tolist() == [[200]]


def test_a_checkpoint_that_has_averages_of_frozen_weights_too_goes_on():
    module = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(module.bias, 5.0)
    module.weight.requires_grad_(False)
    before = {"average/weight": module.weight.detach().clone(), "average/bias": torch.tensor([1.0])}
    assert moving_average(before, module, 0.75)["average/bias"].tolist() == [2.0]  # ¾·1 + ¼·5
