"""Scoring beside sampling and updates: the same scores, errors that travel, ratios to the policy that sampled."""

import functools
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import STOPS, metrics_of, without_times

from ppo_rlhf.config import PPOConfig
from ppo_rlhf.errors import UserError
from ppo_rlhf.models import frozen_copy, load_policy
from ppo_rlhf.policy import response_logprobs
from ppo_rlhf.prompts import Prompts
from ppo_rlhf.rewards import Scores
from ppo_rlhf.rollout import Rollout
from ppo_rlhf.run import LoopState
from ppo_rlhf.sampling import Responses, decoding, sample
from ppo_rlhf.settings import OptimizerSettings, PPOSettings, SamplingSettings
from ppo_rlhf.train import ppo, ppo_batch
from ppo_rlhf.train.ppo_batch import Batch, joined, restored_batch, tensors_of
from ppo_rlhf.train.ppo_parts import Parts
from ppo_rlhf.train.ppo_records import Clock

PATIENCE = 60  # seconds until a test that would wait for ever gives up


def config_of(models, data, folder="out", **changes):
    settings = {
        "policy": models["gpt2"],
        "prompts": data["prompts"],
        "reward": "user.py:vowels",
        "gold": "user.py:length",
        "output_dir": folder,
        "num_steps": 3,
        "batch_size": 8,
        "eval_every": 0,
        "save_every": 0,
        "max_eval_prompts": 4,
        "matmul_precision": "highest",
        "log_with": (),
        "sampling": SamplingSettings(max_new_tokens=6, stop_token_ids=STOPS),
        "ppo": PPOSettings(num_epochs=2, num_minibatches=2),
        "optimizer": OptimizerSettings(lr=1e-2, schedule="constant"),
    }
    return PPOConfig(**settings | changes)


def vowels(prompts, responses, **columns):
    return [sum(letter in "aeiou" for letter in response) for response in responses]


# --------------------------------------------------------------------------------------------- beside the sampling


@pytest.mark.parametrize("group_size", [1, 3, 8, 100])
def test_scores_do_not_depend_on_overlap(group_size, models, data):
    ppo.train(config_of(models, data, "after"))
    ppo.train(config_of(models, data, "beside", overlap_scoring=group_size))
    assert without_times(metrics_of("beside")) == without_times(metrics_of("after"))


def test_scoring_begins_while_others_are_still_sampled(models, data, monkeypatch):
    began, events = threading.Event(), []
    draw = decoding.draw

    def reward(prompts, responses, **columns):
        if len(prompts) == 1:  # one response of a rollout, not an evaluation
            events.append("scored")
            began.set()
        return vowels(prompts, responses)

    def noted_draw(*arguments):
        events.append("token")
        return draw(*arguments)

    def patient_sample(*arguments, on_finished, **options):
        def handed_out(rows, responses):
            on_finished(rows, responses)
            assert began.wait(PATIENCE)

        events.clear()
        return sample(*arguments, on_finished=handed_out, **options)

    monkeypatch.setattr(decoding, "draw", noted_draw)
    ppo.train(config_of(models, data, num_steps=1, overlap_scoring=1), reward=reward, sampler=patient_sample)
    assert events.count("scored") == 8
    assert "token" in events[events.index("scored") :]


@pytest.mark.parametrize("changes", [{"overlap_scoring": 2}, {"sample_ahead": True}], ids=str)
def test_what_a_reward_raises_in_its_thread_ends_the_run_in_one_line(changes, models, data):
    calls = []

    def failing(prompts, responses, **columns):
        calls.append(len(responses))
        if len(calls) > 2:  # not in the evaluation before the first step
            raise RuntimeError("the judge sleeps")
        return vowels(prompts, responses)

    with pytest.raises(UserError, match="reward function failing raised RuntimeError: the judge sleeps"):
        ppo.train(config_of(models, data, num_steps=6, **changes), reward=failing)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("scoring")]


def test_groups_are_joined_in_the_order_of_the_batch():
    pieces = [
        Scores(torch.tensor([30.0, 10.0]), {"length": torch.tensor([3.0, 1.0])}),
        Scores(torch.tensor([0.0, 20.0]), {"length": torch.tensor([0.0, 2.0])}),
    ]
    found = joined(pieces, torch.tensor([3, 1, 0, 2]).argsort())
    assert found.total.tolist() == [0.0, 10.0, 20.0, 30.0]
    assert found.parts["length"].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_negative_group_size_is_refused_by_name():
    with pytest.raises(UserError, match="overlap_scoring=-1 must not be negative"):
        PPOConfig(overlap_scoring=-1)


# ----------------------------------------------------------------------------------------------- beside the update


def test_a_rollout_sampled_ahead_is_scored_during_the_update_before_it(models, data, monkeypatch):
    updating, waited = threading.Event(), []
    update = ppo.ppo_update

    def reward(prompts, responses, **columns):
        if len(prompts) == 8:  # a rollout, not an evaluation
            waited.append(updating.wait(PATIENCE) if waited else True)
            updating.clear()
        return vowels(prompts, responses)

    def noted_update(*arguments, **options):
        updating.set()
        return update(*arguments, **options)

    monkeypatch.setattr(ppo, "ppo_update", noted_update)
    ppo.train(config_of(models, data, sample_ahead=True, gold=None), reward=reward)
    assert waited == [True, True, True]


@pytest.mark.parametrize("ahead", [False, True])
def test_old_logprobs_are_those_of_the_policy_that_sampled(ahead, models, data, monkeypatch):
    policy, tokenizer = load_policy(models["gpt2"], setting="test")
    policies, experiences, update = [frozen_copy(policy)], [], ppo.ppo_update

    def noted_update(model, optimizer, experience, *arguments, **options):
        experiences.append(experience)
        return update(model, optimizer, experience, *arguments, **options)

    monkeypatch.setattr(ppo, "ppo_update", noted_update)
    config = config_of(models, data, sample_ahead=ahead, num_steps=4)
    keep = [lambda *_: policies.append(frozen_copy(policy))]
    ppo.train(config, policy=policy, tokenizer=tokenizer, callbacks=keep)
    for step, experience in enumerate(experiences):
        sampler = policies[max(0, step - ahead)]
        logprobs = response_logprobs(sampler, experience.inputs, temperature=1.0)
        torch.testing.assert_close(experience.logprobs, logprobs, rtol=0, atol=1e-6)


def test_only_the_first_ratios_of_rollouts_sampled_ahead_may_differ_from_one(models, data):
    ppo.train(config_of(models, data, "now"))
    ppo.train(config_of(models, data, "ahead", sample_ahead=True))
    now, ahead = ([row["policy/first_kl"] for row in metrics_of(name)[1:]] for name in ("now", "ahead"))
    assert max(now) < 1e-9
    assert ahead[0] < 1e-9
    assert min(ahead[1:]) > 1e-6


# ------------------------------------------------------------------------------------------------- the checkpoint


def saved_batch(prompts, widths, generator):
    """A batch of these prompts, whose responses have these lengths."""
    mask = torch.arange(max(widths)) < torch.tensor(widths)[:, None]

    def numbers(*shape):
        return torch.rand(*shape, generator=generator)

    responses = Responses(
        ids=torch.where(mask, torch.randint(70, 90, mask.shape, generator=generator), 1),
        mask=mask,
        finished=torch.tensor([True, False]),
        texts=[],
        logprobs=numbers(*mask.shape),
    )
    values = torch.cat([numbers(*mask.shape), torch.zeros(len(mask), 1)], 1)
    rollout = Rollout({}, *(numbers(*mask.shape) for _ in range(2)), values, numbers(*mask.shape), mask)
    scores = [Scores(numbers(2), {"a/b": numbers(2)}), Scores(numbers(2), {"gold": numbers(2)})]
    return Batch(prompts, responses, rollout, lambda: scores, Clock({"sample": 2.0, "evaluate": 0.5}))


def test_each_process_gets_its_own_rollout_back(monkeypatch, models):
    _, tokenizer = load_policy(models["gpt2"], setting="test")
    generator = torch.Generator().manual_seed(0)
    accelerators = [
        SimpleNamespace(num_processes=2, process_index=index, device=torch.device("cpu")) for index in range(2)
    ]
    rows = [{"prompt": f"red {letter}"} for letter in "abcd"]
    parts = SimpleNamespace(tokenizer=tokenizer, prompts=Prompts(rows, tokenizer, longest=20, setting="prompts"))
    parts.rows_of = functools.partial(Parts.rows_of, parts)
    config = PPOConfig(batch_size=4)
    batches = [
        saved_batch(ppo_batch.prompts_of(1, parts, config, accelerator), widths, generator)
        for accelerator, widths in zip(accelerators, ([2, 3], [5, 1]), strict=True)
    ]
    pieces = []
    monkeypatch.setattr(ppo_batch, "gathered", lambda own: pieces.append(own[0]) or own)
    for batch in batches:
        tensors_of(batch)
    monkeypatch.setattr(ppo_batch, "gathered", lambda _: pieces)
    tensors = tensors_of(batches[0])
    assert {len(tensor) for tensor in tensors.values()} == {4}

    saved = LoopState(step=1, tensors={"average/weight": torch.ones(1), **tensors})
    for batch, accelerator in zip(batches, accelerators, strict=True):
        state, found = restored_batch(saved, parts, config, accelerator)
        assert state == replace(saved, tensors={"average/weight": saved.tensors["average/weight"]})
        assert found.prompts.texts == batch.prompts.texts
        for name in ("ids", "mask", "finished", "logprobs"):
            assert torch.equal(getattr(found.responses, name), getattr(batch.responses, name)), name
        for name in ("logprobs", "ref_logprobs", "values", "entropy", "mask"):
            assert torch.equal(getattr(found.rollout, name), getattr(batch.rollout, name)), name
        for one, other in zip(found.scores(), batch.scores(), strict=True):
            assert torch.equal(one.total, other.total)
            assert {name: x.tolist() for name, x in one.parts.items()} == {
                name: x.tolist() for name, x in other.parts.items()
            }
        assert found.clock.laps == batch.clock.laps


def test_without_a_rollout_ahead_nothing_is_saved_or_restored():
    assert tensors_of(None) == {}
    assert restored_batch(LoopState(), None, None, None) == (LoopState(), None)


def test_a_rollout_ahead_is_gathered_for_a_checkpoint_alone(models, data, monkeypatch):
    saved, made = [], ppo.tensors_of
    monkeypatch.setattr(ppo, "tensors_of", lambda batch: saved.append(batch is not None) or made(batch))
    ppo.train(config_of(models, data, sample_ahead=True, num_steps=5, save_every=2))
    assert saved == [True, True, False]  # after 2, 4 and 5 steps


def test_an_evaluation_does_not_call_a_reward_that_a_rollout_ahead_is_scored_by(models, data):
    called = threading.Lock()

    def reward(prompts, responses, **columns):
        assert called.acquire(blocking=False)
        time.sleep(0.1)
        called.release()
        return vowels(prompts, responses)

    ppo.train(config_of(models, data, sample_ahead=True, gold=None, eval_every=1), reward=reward)
