"""The loop: seeds, exact resume, the coefficient β, schedules, callbacks, and what is written."""

from __future__ import annotations

import functools
import json
import random
from dataclasses import replace

import control_cases as cases
import numpy as np
import pytest
import torch
import torch.distributions as td
from gymnasium import spaces
from safetensors.torch import load_file

import classic.ppo
from classic import load, train
from classic.config import PenaltySettings, TrainConfig
from classic.evaluate import Evaluator, Outcome
from classic.policy import Policy
from classic.ppo import device_of, improve, run
from ppo_rlhf.core import whiten
from ppo_rlhf.errors import UserError
from ppo_rlhf.run import LoopState

ROLLOUT = 4 * 16
SOON = {"max_episode_steps": 20}  # so that episodes end in several ways
KINDS = {
    "clip": ("CartPole-v1", {"environment": SOON}),
    "normalized": (
        "Pendulum-v1",
        {"environment": SOON, "normalize_observations": True, "normalize_rewards": True, "clip_schedule": "linear"},
    ),
    "penalty": (
        "CartPole-v1",
        {"environment": SOON, "algorithm": "penalty", "optimizer": {"lr": 1e-2, "schedule": "cosine"}},
    ),
    "trpo": ("CartPole-v1", {"environment": SOON, "algorithm": "trpo"}),
    "recurrent": ("CartPole-v1", {"environment": SOON, "network": {"recurrent": "lstm", "recurrent_size": 8}}),
    "gsde": ("Pendulum-v1", {"environment": SOON, "network": {"gaussian": "gsde"}, "normalize_rewards": True}),
}
GYMNASIUM = {
    "cartpole in gymnasium": ("CartPole-v1", {"environment": {**SOON, "vectorization": "sync"}}),
    "same step": ("CartPole-v1", {"environment": {**SOON, "vectorization": "sync", "autoreset": "same_step"}}),
    "one's own": (cases.Allowed, {}),
}


def without_times(metrics):
    return {name: value for name, value in metrics.items() if name != "steps_per_second"}


def history_of(env, changes, **arguments):
    """The final policy's state, and the metrics of every update."""
    told = []
    policy = train(
        env,
        config=cases.config_of(**changes),
        callbacks=[lambda _, metrics: told.append(without_times(metrics))],
        **arguments,
    )
    return cases.copied(policy), told


def same_metrics(one, other):
    return json.dumps(one) == json.dumps(other)  # NaN, where there is any, is NaN in both


# --- seeds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, *GYMNASIUM])
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(kind):
    env, changes = {**KINDS, **GYMNASIUM}[kind]
    first, told = history_of(env, changes, seed=1, num_steps=3 * ROLLOUT)
    torch.manual_seed(123)  # whatever was drawn elsewhere in the program
    np.random.seed(123)
    random.seed(123)
    torch.rand(1000)
    second, also_told = history_of(env, changes, seed=1, num_steps=3 * ROLLOUT)
    assert cases.same(first, second)
    assert same_metrics(told, also_told)
    other, _ = history_of(env, changes, seed=2, num_steps=3 * ROLLOUT)
    assert not any(torch.equal(first[name], other[name]) for name in first if "weight" in name)


def test_every_update_has_noise_and_an_order_of_its_own(monkeypatch):
    keys, make = [], classic.ppo.keyed_generator
    monkeypatch.setattr(classic.ppo, "keyed_generator", lambda *key, **device: keys.append(key) or make(*key, **device))
    train("CartPole-v1", num_steps=3 * ROLLOUT, config=cases.config_of())
    assert len(set(keys)) == len(keys) == 6


def test_training_leaves_the_program_s_generators_as_they_were():
    torch.manual_seed(5)
    before, numpy_before, python_before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    train("CartPole-v1", num_steps=ROLLOUT, config=cases.config_of(network={"recurrent": "gru"}))
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()
    assert random.getstate() == python_before


# --- how long, and what is told --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_steps", "updates"), [(1, 1), (63, 1), (64, 1), (127, 1), (128, 2), (200, 3)], ids=str)
def test_whole_rollouts_only_at_least_one_and_at_most_what_was_asked_for(num_steps, updates):
    numbers, steps = [], []
    train(
        "CartPole-v1",
        num_steps=num_steps,
        config=cases.config_of(),
        callbacks=[lambda number, metrics: numbers.append(number), lambda _, metrics: steps.append(metrics["steps"])],
    )
    assert numbers == list(range(1, updates + 1))
    assert steps == [64 * number for number in numbers]


def test_callbacks_are_told_the_metrics_of_each_update():
    _, told = history_of("CartPole-v1", {"environment": SOON})
    expected = {"steps", "episodes", "lr", "kl_coef", "loss/policy", "loss/value", "objective/entropy", "grad_norm"}
    expected |= {"policy/approx_kl", "policy/clip_fraction", "policy/ratio", "value/explained_variance"}
    expected |= {"episode/return", "episode/length", "optimizer_steps"}
    for metrics in told:
        assert expected <= metrics.keys()
        assert metrics["episode/return"] == metrics["episode/length"] <= 20  # CartPole pays 1 a step
        assert metrics["optimizer_steps"] == 4  # two passes of two minibatches


def test_no_episode_s_return_is_told_where_none_ended():
    _, told = history_of("Pendulum-v1", {}, num_steps=ROLLOUT)
    assert told[0]["episodes"] == 0
    assert "episode/return" not in told[0]


def test_without_a_folder_nothing_is_written_and_nothing_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(classic.ppo, "Evaluator", None)
    train("CartPole-v1", config=cases.config_of(eval_every=1, save_every=1, log_with=("tensorboard",)), num_steps=128)
    assert list(tmp_path.iterdir()) == []


def test_the_preset_is_used_where_there_is_one_and_the_arguments_come_before_it(monkeypatch):
    preset = cases.config_of(env_id="CartPole-v1", num_steps=3 * ROLLOUT, gamma=0.7)
    monkeypatch.setitem(classic.ppo.preset_for.__globals__["PRESETS"], "CartPole-v1", preset)
    seen = []
    build = classic.ppo.learner_of
    monkeypatch.setattr(classic.ppo, "learner_of", lambda config, *rest: seen.append(config) or build(config, *rest))
    train("CartPole-v1")
    train("CartPole-v1", num_steps=ROLLOUT, seed=3)
    train("CartPole-v1", num_steps=ROLLOUT, config=cases.config_of(gamma=0.6))
    assert seen[:2] == [preset, replace(preset, num_steps=ROLLOUT, seed=3)]
    assert seen[2].gamma == 0.6


def test_a_callable_that_makes_an_environment_is_enough():
    policy = train(lambda: cases.Guess(length=4), num_steps=2 * ROLLOUT, config=cases.config_of())
    assert policy.act(np.eye(4, dtype=np.float32)).shape == (4,)


def test_a_policy_goes_on_where_it_stood():
    config = cases.config_of(normalize_observations=True)
    policy = train("CartPole-v1", num_steps=2 * ROLLOUT, config=config)
    before = cases.copied(policy)
    assert train("CartPole-v1", num_steps=ROLLOUT, config=config, policy=policy) is policy
    after = cases.copied(policy)
    assert not torch.equal(before["networks.weights"], after["networks.weights"])
    assert after["normalizer.moments.count"] > before["normalizer.moments.count"] > 0
    # Near to where it stood, and not made anew.
    assert torch.allclose(before["networks.weights"], after["networks.weights"], atol=0.05)


def test_environments_are_closed_whatever_happens(monkeypatch):
    closed = []
    monkeypatch.setattr(cases.Guess, "close", lambda self: closed.append(self))

    def stop(number, metrics):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cases.Guess, config=cases.config_of(), callbacks=[stop])
    assert len(closed) == 4


def test_environments_are_closed_when_the_policy_does_not_fit_them(monkeypatch):
    closed = []
    monkeypatch.setattr(cases.Guess, "close", lambda self: closed.append(self))
    policy = train("CartPole-v1", num_steps=ROLLOUT, config=cases.config_of())
    with pytest.raises(UserError, match="another environment"):
        train(cases.Guess, config=cases.config_of(), policy=policy)
    assert len(closed) == 4


@pytest.mark.parametrize(("algorithm", "kl_coef"), [("clip", 0.0), ("fixed", 1.0)])
def test_the_coefficient_is_that_of_the_loss(algorithm, kl_coef):
    learner = cases.make_learner(algorithm=algorithm)
    assert improve(learner, LoopState(kl_coef=1.0))[1]["kl_coef"] == kl_coef


def test_a_gpu_is_asked_for_in_vain_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device=cuda"):
        train("CartPole-v1", config=cases.config_of(device="cuda"))
    assert device_of(TrainConfig(), "CartPole-v1") == "cpu"


def test_small_networks_stay_on_the_cpu_unless_thousands_of_environments_are_on_the_gpu_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of(TrainConfig(), "CartPole-v1") == "cpu"
    assert device_of(TrainConfig(num_envs=4096), "CartPole-v1") == "cuda"
    assert device_of(TrainConfig(num_envs=4096), "Acrobot-v1") == "cpu"
    assert device_of(cases.config_of(device="auto", network={"hidden_sizes": (1024,)}), "Acrobot-v1") == "cuda"
    assert device_of(cases.config_of(device="cuda"), "Acrobot-v1") == "cuda"


# --- a run folder, and exact resume ----------------------------------------------------------------------------------


class Crash(Exception):
    """What interrupts a run."""


def crash_after(last):
    def callback(number, metrics):
        if number == last:
            raise Crash

    return callback


def lines_of(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [without_times(json.loads(line)) for line in lines]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(kind, tmp_path):
    env, changes = KINDS[kind]
    config = cases.config_of(env_id=env, save_every=3 * ROLLOUT, eval_every=2 * ROLLOUT, **changes)
    whole, _ = run(replace(config, output_dir=str(tmp_path / "whole")))
    halves = replace(config, output_dir=str(tmp_path / "halves"))
    with pytest.raises(Crash):
        run(halves, callbacks=[crash_after(5)])  # two updates after the checkpoint that it goes on from
    torch.rand(7)
    resumed, summary = run(replace(halves, resume=True))
    assert cases.same(cases.copied(whole), cases.copied(resumed))
    assert cases.same(cases.copied(whole), cases.copied(load(tmp_path / "halves")))
    assert cases.same(*(load_file(tmp_path / name / "best" / "policy.safetensors") for name in ("whole", "halves")))
    assert same_metrics(lines_of(tmp_path / "whole"), lines_of(tmp_path / "halves"))
    assert [line["step"] for line in lines_of(tmp_path / "halves")] == [1, 2, 3, 4, 5, 6]
    # The last checkpoints too: weights, the optimizer's moments, the environments, β.
    last = [tmp_path / name / "checkpoints" / "step_000006" for name in ("whole", "halves")]
    for name in ("model.safetensors", "loop.safetensors"):
        assert cases.same(*(load_file(path / name) for path in last))
    assert len({(path / "loop.json").read_text() for path in last}) == 1
    moments = [torch.load(path / "optimizer.bin", weights_only=True)["state"] for path in last]
    assert cases.same(*moments)
    assert summary["steps"] == 6 * ROLLOUT


def test_a_checkpoint_holds_every_parameter(tmp_path):
    for kind, (env, changes) in KINDS.items():
        config = cases.config_of(env_id=env, num_steps=ROLLOUT, output_dir=str(tmp_path / kind), **changes)
        policy, _ = run(config)
        assert cases.same(
            load_file(tmp_path / kind / "checkpoints" / "step_000001" / "model.safetensors"), cases.copied(policy)
        )


def test_environments_that_cannot_tell_their_state_begin_anew_in_a_resumed_run(tmp_path):
    config = cases.config_of(output_dir=str(tmp_path / "run"), save_every=ROLLOUT, num_steps=3 * ROLLOUT)
    with pytest.raises(Crash):
        run(config, env=cases.Guess, callbacks=[crash_after(1)])
    _, summary = run(replace(config, resume=True), env=cases.Guess)
    assert summary["steps"] == 3 * ROLLOUT
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [1, 2, 3]


def test_a_finished_run_is_not_gone_on_with(tmp_path):
    config = cases.config_of(output_dir=str(tmp_path / "run"), num_steps=ROLLOUT)
    first, _ = run(config)
    again, summary = run(replace(config, resume=True), callbacks=[crash_after(1)])
    assert summary == {"finished": str(tmp_path / "run")}
    assert cases.same(cases.copied(first), cases.copied(again))


def test_the_best_policy_is_kept_and_the_final_one_too(tmp_path, monkeypatch):
    returns, seen = iter([9.0, 1.0, 5.0, 3.0, 5.0]), []  # before the first update, and after each
    lengths = torch.ones(1)
    judged = lambda self, policy: seen.append(cases.copied(policy)) or Outcome(torch.tensor([next(returns)]), lengths)  # noqa: E731
    monkeypatch.setattr(Evaluator, "__call__", judged)
    config = cases.config_of(output_dir=str(tmp_path / "run"), eval_every=ROLLOUT, num_steps=4 * ROLLOUT)
    policy, summary = run(config)
    assert cases.same(load_file(tmp_path / "run" / "best" / "policy.safetensors"), seen[2])
    assert cases.same(cases.copied(load(tmp_path / "run")), seen[4])
    assert cases.same(cases.copied(policy), seen[4])
    assert [summary[name] for name in ("return_before", "return_after", "return_best")] == [9, 5, 5]


def test_evaluations_come_when_they_are_due_and_change_nothing_that_is_learnt(tmp_path):
    settings = {"num_steps": 5 * ROLLOUT, "normalize_observations": True, "environment": SOON}
    outcomes = []
    for name, every in (("often", ROLLOUT), ("sometimes", 2 * ROLLOUT + 1), ("never", 0)):
        policy, _ = run(cases.config_of(output_dir=str(tmp_path / name), eval_every=every, **settings))
        outcomes.append(cases.copied(policy))
        due = [line["step"] for line in lines_of(tmp_path / name) if "eval/return" in line]
        assert due == {"often": [1, 2, 3, 4, 5], "sometimes": [3, 5], "never": [5]}[name]
    assert cases.same(outcomes[0], outcomes[1])
    assert cases.same(outcomes[0], outcomes[2])


def test_a_rollout_is_learnt_from_with_the_statistics_under_which_it_was_decided(watched):
    learner = cases.make_learner("Pendulum-v1", normalize_observations=True)
    drawn, draw = [], learner.policy.distribution.sample
    learner.policy.distribution.sample = lambda parameters, *rest: (
        drawn.append(parameters[0]) or draw(parameters, *rest)
    )
    state = LoopState()
    for _ in range(2):
        drawn.clear()
        state, _ = improve(learner, state)
        means = watched["experience"][-1].distribution[0]
        torch.testing.assert_close(torch.stack(drawn, dim=1), means, rtol=1e-5, atol=1e-6)
    assert learner.policy.normalizer.moments.count == 2 * ROLLOUT


# --- PPO-Penalty's β -------------------------------------------------------------------------------------------------


@pytest.fixture
def watched(monkeypatch):
    """The experience of every update, and the coefficient and settings with which each `ppo_update` was called."""
    seen = {"experience": [], "coefficients": [], "settings": [], "adapted": 0}
    update, ppo_update, adapt = classic.ppo.update, classic.ppo.ppo_update, classic.ppo.adapt_kl_coef_ppo_penalty

    def watched_update(learner, experience, state):
        seen["experience"].append(experience)
        return update(learner, experience, state)

    def watched_ppo_update(policy, optimizer, rows, settings, **arguments):
        seen["coefficients"].append(arguments["kl_penalty_coef"])
        seen["settings"].append(settings)
        return ppo_update(policy, optimizer, rows, settings, **arguments)

    def watched_adapt(*arguments, **named):
        seen["adapted"] += 1
        return adapt(*arguments, **named)

    monkeypatch.setattr(classic.ppo, "update", watched_update)
    monkeypatch.setattr(classic.ppo, "ppo_update", watched_ppo_update)
    monkeypatch.setattr(classic.ppo, "adapt_kl_coef_ppo_penalty", watched_adapt)
    return seen


def exact_kl(experience, policy):
    """KL(old‖new) averaged over the decisions, by torch.distributions."""
    with torch.no_grad():
        new = policy(**experience.inputs).distribution
    if len(new) == 1:
        old, new = (td.Categorical(logits=parameters[0]) for parameters in (experience.distribution, new))
    else:
        old, new = (
            td.Independent(td.Normal(mean, log_std.exp()), 1) for mean, log_std in (experience.distribution, new)
        )
    return td.kl_divergence(old, new)[experience.mask].double().mean().item()


@pytest.mark.parametrize("network", [{}, {"recurrent": "gru"}], ids=str)
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("regime", ["near", "far", "on target"])
def test_the_coefficient_follows_the_paper_s_rule_once_an_update(env, regime, network, watched):
    target = {"near": 1e9, "far": 1e-9, "on target": None}[regime]
    changes = {"algorithm": "penalty", "environment": SOON, "network": network, "ppo": {"num_epochs": 3}}
    if target is None:  # what the first update is going to measure
        learner = cases.make_learner(env, **changes)
        _, told = improve(learner, LoopState(kl_coef=1.0))
        target = told["policy/kl"] * 1.2
        watched.update(experience=[], coefficients=[], adapted=0)
    learner = cases.make_learner(env, **changes, penalty=PenaltySettings(kl_target=target))
    state = LoopState(kl_coef=1.0)
    for index in range(3):
        before = state.kl_coef
        state, told = improve(learner, state)
        kl = exact_kl(watched["experience"][index], learner.policy)
        assert kl > 0
        assert told["policy/kl"] == pytest.approx(kl, rel=1e-3, abs=1e-7)
        assert told["kl_coef"] == watched["coefficients"][index] == before  # the new one serves the next update
        factor = 0.5 if kl < target / 1.5 else 2 if kl > 1.5 * target else 1
        assert state.kl_coef == before * factor
        if index == 0:
            assert factor == {"near": 0.5, "far": 2, "on target": 1}[regime]
    assert watched["adapted"] == 3


def test_the_coefficient_stays_where_the_update_was_skipped(monkeypatch):
    monkeypatch.setattr(cases.Guess, "_reward", lambda self, action: float("nan"))
    learner = cases.make_learner(cases.Guess, algorithm="penalty")
    state, told = improve(learner, LoopState(kl_coef=1.0))
    assert told["policy/kl"] == pytest.approx(0, abs=1e-7)  # of a policy that nothing moved
    assert state.kl_coef == 1


def test_the_coefficient_stays_within_its_bounds():
    for target, expected in ((1e9, 0.3), (1e-9, 2.5)):
        rule = PenaltySettings(kl_target=target, minimum=0.3, maximum=2.5)
        learner, state = cases.make_learner(algorithm="penalty", penalty=rule), LoopState(kl_coef=1.0)
        for _ in range(3):
            state, _ = improve(learner, state)
        assert state.kl_coef == expected


def test_a_penalty_holds_the_policy_back_and_nothing_else_does(watched):
    moved = {}
    for algorithm, kl_coef in (("none", 1.0), ("fixed", 30.0), ("clip", 1.0)):
        changes = {"optimizer": {"lr": 2e-2}, "ppo": {"num_epochs": 10}, "penalty": PenaltySettings(kl_coef=kl_coef)}
        learner = cases.make_learner(algorithm=algorithm, **changes)
        state = LoopState(kl_coef=kl_coef)
        for _ in range(2):
            state, _ = improve(learner, state)
            assert state.kl_coef == kl_coef
        moved[algorithm] = exact_kl(watched["experience"][-1], learner.policy)
        clip_range = watched["settings"][-1].clip_range
        assert clip_range == (0.2 if algorithm == "clip" else None)
        assert watched["coefficients"][-1] == (30.0 if algorithm == "fixed" else 0.0)
    assert watched["adapted"] == 0
    assert moved["fixed"] < 0.2 * moved["none"]
    assert moved["clip"] < moved["none"]


# --- numbers that are not finite --------------------------------------------------------------------------------------


class PaidNaN(cases.Guess):
    """Pays NaN in the fourth step of its second episode, and once only."""

    episodes = 0

    def reset(self, **options):
        self.episodes += 1
        return super().reset(**options)

    def _reward(self, action):
        return float("nan") if (self.episodes, self.count) == (2, 3) else super()._reward(action)


@pytest.mark.parametrize("algorithm", ["clip", "penalty", "trpo"])
def test_a_reward_that_is_no_number_costs_its_own_update_alone(algorithm):
    config = cases.config_of(algorithm=algorithm, normalize_rewards=True, horizon=12)
    told = []
    policy = train(PaidNaN, num_steps=5 * 48, config=config, callbacks=[lambda _, metrics: told.append(metrics)])
    # Episodes of 16 steps and one for the reset: the 21st is paid with NaN, the 33rd ends its episode.
    assert [metrics["optimizer_steps"] == 0 for metrics in told] == [False, True, False, False, False]
    assert [metrics["skipped_steps"] > 0 for metrics in told] == [False, True, False, False, False]
    assert [np.isnan(metrics.get("episode/return", 0)) for metrics in told] == [False, False, True, False, False]
    assert [metrics["episodes"] for metrics in told] == [0, 4, 4, 0, 4]
    assert all(x.isfinite().all() for x in policy.state_dict().values())


@pytest.mark.parametrize("algorithm", ["clip", "penalty", "trpo"])
def test_a_run_whose_rewards_are_no_numbers_ends(algorithm, tmp_path, monkeypatch):
    monkeypatch.setattr(cases.Guess, "_reward", lambda self, action: float("nan"))
    config = cases.config_of(algorithm=algorithm, max_skips=2, output_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match="the 2 updates up to step 2 were skipped"):
        run(config, env=cases.Guess)


# --- schedules and settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [1, 1, 1, 1]), ("linear", [1, 3 / 4, 2 / 4, 1 / 4]), ("cosine", [1, 0.853553, 0.5, 0.146447])],
)
def test_the_learning_rate_follows_its_schedule(schedule, expected):
    _, told = history_of("CartPole-v1", {"optimizer": {"lr": 1e-2, "schedule": schedule}}, num_steps=4 * ROLLOUT)
    assert [metrics["lr"] for metrics in told] == pytest.approx([1e-2 * share for share in expected], rel=1e-5)


@pytest.mark.parametrize(("schedule", "expected"), [("constant", [0.2] * 4), ("linear", [0.2, 0.15, 0.1, 0.05])])
def test_the_clip_range_follows_its_schedule(schedule, expected, watched):
    train("CartPole-v1", config=cases.config_of(clip_schedule=schedule, num_steps=4 * ROLLOUT))
    assert [settings.clip_range for settings in watched["settings"]] == pytest.approx(expected)


def test_an_update_that_goes_too_far_stops_early():
    ppo = {"num_epochs": 10, "target_kl": 1e-4}
    _, told = history_of("CartPole-v1", {"ppo": ppo, "optimizer": {"lr": 3e-2}}, num_steps=2 * ROLLOUT)
    assert all(0 < metrics["stopped_steps"] < 20 for metrics in told)
    assert all(metrics["stopped_steps"] + metrics["optimizer_steps"] == 20 for metrics in told)


def test_rewards_are_scaled_for_learning_and_told_raw(monkeypatch):
    learnt, build = [], classic.ppo.experience_of
    monkeypatch.setattr(
        classic.ppo,
        "experience_of",
        lambda trajectory, *a, **k: learnt.append(trajectory) or build(trajectory, *a, **k),
    )
    _, told = history_of("CartPole-v1", {"reward_scale": 0.125, "environment": SOON}, num_steps=ROLLOUT)
    assert (learnt[0].rewards[learnt[0].mask] == 0.125).all()
    assert told[0]["episode/return"] == told[0]["episode/length"]


def test_normalized_rewards_are_what_is_learnt_from(watched):
    history_of("Pendulum-v1", {"normalize_rewards": True, "gamma": 0.9, "gae_lambda": 0.0}, num_steps=ROLLOUT)
    history_of("Pendulum-v1", {"gamma": 0.9, "gae_lambda": 0.0}, num_steps=ROLLOUT)
    scaled, raw = watched["experience"]
    assert raw.returns.abs().mean() > 2
    assert scaled.returns.abs().mean() < 2
    assert (scaled.returns < 1).all()  # Pendulum's rewards are negative, and stay so


def test_advantages_are_whitened_over_the_rollout_or_else_over_minibatches(watched):
    history_of("CartPole-v1", {"environment": SOON}, num_steps=ROLLOUT)
    history_of("CartPole-v1", {"environment": SOON, "ppo": {"whiten_advantages": "minibatch"}}, num_steps=ROLLOUT)
    whitened, raw = watched["experience"]
    assert whitened.advantages[whitened.mask].mean().abs() < 1e-6
    assert raw.advantages[raw.mask].mean().abs() > 1e-3
    torch.testing.assert_close(whiten(raw.advantages, raw.mask), whitened.advantages)


@pytest.mark.parametrize("network", [{}, {"recurrent": "lstm"}], ids=str)
def test_micro_batches_change_nothing_but_memory(network):
    outcomes = []
    for micro in (None, 8 if not network else 1):
        changes = {"ppo": {"micro_batch_size": micro}, "network": network, "environment": SOON}
        outcomes.append(history_of("CartPole-v1", changes, num_steps=ROLLOUT)[0])
    for one, other in zip(*(outcome.values() for outcome in outcomes), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-4)


def test_memory_that_runs_out_does_so_once_in_a_run(monkeypatch):
    forward = Policy.forward

    def little_memory(self, **inputs):
        if len(inputs["actions"]) > 20:
            raise MemoryError
        return forward(self, **inputs)

    monkeypatch.setattr(Policy, "forward", little_memory)
    with pytest.warns(UserWarning, match="ppo.micro_batch_size is 16 from now on") as told:
        history_of("CartPole-v1", {"algorithm": "penalty"}, num_steps=3 * ROLLOUT)
    assert len(told) == 1


@pytest.mark.parametrize("algorithm", ["clip", "penalty", "trpo"])
@pytest.mark.parametrize(
    "space", [spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2), spaces.Box(-1, 1, (2,), np.float32)], ids=str
)
def test_every_action_space_goes_through_every_algorithm(space, algorithm):
    _, told = history_of(functools.partial(cases.Guess, space), {"algorithm": algorithm}, num_steps=ROLLOUT)
    assert np.isfinite(list(told[0].values())).all()


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@cases.NO_GPU
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_the_gpu_resumes_too(kind, tmp_path):
    env, changes = KINDS[kind]
    config = cases.config_of(
        env_id=env, device="cuda", save_every=3 * ROLLOUT, output_dir=str(tmp_path / "run"), **changes
    )
    with pytest.raises(Crash):
        run(config, callbacks=[crash_after(4)])
    policy, summary = run(replace(config, resume=True))
    assert policy.device.type == "cuda"
    assert summary["steps"] == 6 * ROLLOUT


@pytest.mark.cuda
@cases.NO_GPU
def test_training_on_the_gpu_leaves_its_generator_as_it_was():
    torch.cuda.manual_seed(5)
    before = torch.cuda.get_rng_state()
    train("CartPole-v1", num_steps=ROLLOUT, config=cases.config_of(device="cuda"))
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.cuda
@cases.NO_GPU
def test_many_environments_learn_on_the_gpu():
    told = []
    config = cases.config_of(num_envs=2048, horizon=16, num_steps=20 * 2048 * 16, device="cuda", optimizer={"lr": 1e-3})
    train("CartPole-v1", config=config, callbacks=[lambda _, metrics: told.append(metrics["episode/return"])])
    assert told[-1] > 2 * told[0]
