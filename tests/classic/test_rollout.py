"""Rollouts: advantages worked out by hand, the three ways of resetting, episodes, memories, masks, the first ratio."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import control_cases as cases
import gymnasium
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from classic.envs.gymnasium import GymnasiumEnvironments
from classic.normalizers import ObservationNormalizer, RewardNormalizer
from classic.ppo import improve
from classic.rollout import Collector, _sums_at_ends, experience_of
from ppo_rlhf.run import LoopState
from ppo_rlhf.settings import PPOSettings
from ppo_rlhf.update import ppo_update

NAN = float("nan")
MODES = ["next_step", "same_step", "disabled"]
examples = settings(deadline=None, max_examples=50, derandomize=True, database=None)


def rollout(envs, policy=None, horizon=None, **changes):
    """A trajectory of scripted environments and its advantages, not whitened, with γ = λ = ½."""
    policy = policy or cases.Plain()
    collector = Collector(envs, policy)
    trajectory = collector.collect(policy, horizon or envs.rewards.shape[1], cases.generator())
    given = {"gamma": 0.5, "lam": 0.5, "whiten_advantages": False, **changes}
    return trajectory, experience_of(trajectory, policy, **given)


# --- advantages by hand ----------------------------------------------------------------------------------------------
# V is what is shown: 1, 2, 3, 4 and 5 after the last decision; every reward is 1 but that of the reset step, γ = λ = ½.
#
#   row 0  runs on         δ = 1 + ½V' − V = 1, ½, 0, −½        A = 143/128, 15/32, −1/8, −1/2
#   row 1  truncated at 1  t = 2 is the reset step               A_1 = 1 + ½·3 − 2 = ½        A_0 = 1 + ¼·½ = 9/8
#   row 2  terminated at 1                                       A_1 = 1 − 2 = −1             A_0 = 1 − ¼ = 3/4
#   row 3  truncated at 3, the last decision: V = 5 beyond       as row 0
#   row 4  terminated at 3                                       A_3 = 1 − 4 = −3  A_2 = −3/4  A_1 = 5/16  A_0 = 69/64

SHOWN = [[1, 2, 3, 4, 5]] * 5
PAID = [[1, 1, 1, 1], [1, 1, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
ENDS: dict[str, Any] = {"truncated": [(1, 1), (3, 3)], "terminated": [(2, 1), (4, 3)]}
RESETS = [(1, 2), (2, 2)]
ADVANTAGES = [
    [143 / 128, 15 / 32, -1 / 8, -1 / 2],
    [9 / 8, 1 / 2, None, -1 / 2],
    [3 / 4, -1, None, -1 / 2],
    [143 / 128, 15 / 32, -1 / 8, -1 / 2],
    [69 / 64, 5 / 16, -3 / 4, -3],
]


def test_advantages_are_those_worked_out_by_hand():
    _, experience = rollout(cases.Tape(SHOWN, PAID, **ENDS, resets=RESETS))
    for row, expected in enumerate(ADVANTAGES):
        for t, advantage in enumerate(expected):
            assert bool(experience.mask[row, t]) == (advantage is not None)
            if advantage is not None:
                assert experience.advantages[row, t].item() == pytest.approx(advantage, abs=1e-12)
                assert experience.returns[row, t].item() == pytest.approx(advantage + t + 1, abs=1e-12)


def test_a_truncated_and_a_terminated_episode_differ_by_the_bootstrap_alone():
    _, experience = rollout(cases.Tape(SHOWN, PAID, **ENDS, resets=RESETS))
    truncated, terminated = experience.advantages[1], experience.advantages[2]
    bootstrap = 0.5 * 3  # γ·V(final observation)
    assert truncated[1] - terminated[1] == bootstrap
    assert truncated[0] - terminated[0] == 0.25 * bootstrap
    assert truncated[3] == terminated[3]


def test_without_a_bootstrap_a_truncated_episode_is_a_terminated_one():
    """Whether its last observation comes in the next row of the rollout or apart."""
    for layout in ({"resets": [(0, 2), (1, 2)]}, {"final": {(0, 1): 3, (1, 1): NAN}}):
        tape = cases.Tape(SHOWN[:2], PAID[1:3], truncated=[(0, 1), (0, 3)], terminated=[(1, 1), (1, 3)], **layout)
        policy = cases.Plain()
        trajectory = Collector(tape, policy).collect(policy, 4, cases.generator())
        experience = experience_of(
            trajectory, policy, gamma=0.5, lam=0.5, whiten_advantages=False, bootstrap_truncations=False
        )
        assert torch.equal(experience.advantages[0], experience.advantages[1])
        assert experience.advantages[0, :2].tolist() == [3 / 4, -1]
        assert experience.advantages[0, 3] == 1 - 4


def test_an_end_in_both_ways_is_a_true_end():
    both = {"truncated": [(0, 1)], "terminated": [(0, 1)]}
    for layout in ({"resets": [(0, 2)]}, {"final": {(0, 1): 3}}):
        _, experience = rollout(cases.Tape(SHOWN[:1], PAID[1:2], **both, **layout))
        assert experience.advantages[0, 1] == -1


def test_a_final_observation_shown_apart_is_what_a_cut_off_episode_bootstraps_from():
    # The next observation, 9, is another episode's; the last one of the old episode is worth 3.
    tape = cases.Tape(
        [[1, 2, 9, 4, 5]] * 2,
        [[1, 1, 1, 1]] * 2,
        truncated=[(0, 1)],
        terminated=[(1, 1)],
        final={(0, 1): 3, (1, 1): NAN},
    )
    trajectory, experience = rollout(tape)
    assert trajectory.mask.all()
    third = 1 + 0.5 * 4 - 9 + 0.25 * -0.5  # δ_2 + ¼ A_3
    torch.testing.assert_close(experience.advantages[0].tolist(), [9 / 8, 1 / 2, third, -1 / 2])
    torch.testing.assert_close(experience.advantages[1].tolist(), [3 / 4, -1.0, third, -1 / 2])
    assert trajectory.rewards[0, 1] == 1  # what is told of it stays raw


def test_a_final_observation_in_the_last_decision_counts_too():
    _, experience = rollout(cases.Tape([[1, 2, 9]], [[1, 1]], truncated=[(0, 1)], final={(0, 1): 3}))
    assert experience.advantages[0].tolist() == [9 / 8, 1 / 2]


def test_without_a_cut_off_episode_there_is_nothing_to_bootstrap():
    _, apart = rollout(cases.Tape(SHOWN[:1], PAID[:1], final={}))
    assert apart.advantages[0].tolist() == pytest.approx(ADVANTAGES[0])


# --- NEXT_STEP, SAME_STEP, DISABLED ----------------------------------------------------------------------------------


class Plan(gymnasium.Env):
    """Episodes of 3 steps (terminated), 5 (truncated) and 2 (both) in turn; shows who, which episode and which step.

    The first of them has begun before it is first shown, a few steps ago as the seed says. Pays by what was shown last
    and by the action.
    """

    observation_space = spaces.Box(0, 100, (3,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self) -> None:
        self.episode = -1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.episode += 1
        self.count = 0
        if seed is not None:
            self.who = seed % 50
            self.count = int(self.np_random.integers(3))
        return self._show(), {}

    def step(self, action):
        reward = float((5 * self.episode + 3 * self.count + self.who) % 7 - 2 * action)
        self.count += 1
        kind = self.episode % 3
        over = self.count >= (3, 5, 2)[kind]
        return self._show(), reward, over and kind != 1, over and kind != 0, {}

    def _show(self) -> np.ndarray:
        return np.array([self.who, self.episode, self.count], np.float32)


PERIOD = 10  # decisions in three episodes; NEXT_STEP resets three times in them


def learning_data(mode, lam, num_rollouts=4):
    """(observation, action, advantage, return) of every decision, rollout by rollout, sorted; and the collector."""
    envs = GymnasiumEnvironments(Plan, 5, seed=3, autoreset=mode)
    weights = torch.tensor([0.1, 0.7, -0.3], dtype=torch.float64)
    policy = cases.Plain(lambda shown: (shown @ weights).sin(), lambda shown: (shown.sum(-1).long() % 3 == 0).long())
    collector = Collector(envs, policy)
    found, told = [], []
    for _ in range(num_rollouts):
        trajectory = collector.collect(policy, PERIOD + 3 * (mode == "next_step"), cases.generator())
        experience = experience_of(trajectory, policy, gamma=0.9, lam=lam, whiten_advantages=False)
        columns = [*experience.inputs["observations"].double().unbind(-1), experience.inputs["actions"].double()]
        columns += [experience.advantages, experience.returns]
        rows = torch.stack(columns, -1)[experience.mask]
        assert rows.dtype == torch.float64
        found.append(sorted(rows.tolist()))
        told.append(torch.stack([*trajectory.episodes.values()]).tolist())
    envs.close()
    return found, told


@pytest.mark.parametrize("lam", [0.0, 0.8, 1.0])
def test_every_way_of_resetting_gives_the_same_learning_data(lam):
    # Any stretch of as many steps holds as many decisions, so that rollouts begin and end in the same places.
    expected, episodes = learning_data("next_step", lam)
    assert all(len(rows) == 5 * PERIOD for rows in expected)
    for mode in MODES[1:]:
        found, told = learning_data(mode, lam)
        assert told == episodes
        for rows, others in zip(expected, found, strict=True):
            np.testing.assert_allclose(np.array(others), np.array(rows), rtol=1e-12, atol=1e-12)


def test_returns_of_whole_episodes_are_those_of_the_definition():
    # λ = 1: the return is Σ γ^k r to a true end, and to a cut off one with γ^n V beyond it.
    rows = {tuple(map(int, row[:3])): row[3:] for row in learning_data("next_step", 1.0)[0][1]}
    checked = 0
    for (who, episode, count), (_, _, found) in rows.items():
        kind = episode % 3
        length = (3, 5, 2)[kind]
        if any((who, episode, step) not in rows for step in range(count, length)):
            continue  # its end belongs to the next rollout
        expected = 0.0 if kind != 1 else 0.9 ** (length - count) * math.sin(0.1 * who + 0.7 * episode - 0.3 * length)
        for step in range(count, length):
            expected += 0.9 ** (step - count) * ((5 * episode + 3 * step + who) % 7 - 2 * rows[who, episode, step][0])
        assert found == pytest.approx(expected, abs=1e-9)
        checked += 1
    assert checked > 20


# --- the reset step --------------------------------------------------------------------------------------------------


def poisoned_tape(poison, dtype=torch.float32):
    """Row 0 terminates at 1 and is reset in step 2, of which the reward and what was shown are poison."""
    shown = [[1, 2, poison, 4, 5], [2, 1, 2, 3, 1]]
    return cases.Tape(shown, [[1, 2, poison, 1], [1, 0, 1, 1]], terminated=[(0, 1)], resets=[(0, 2)], dtype=dtype)


@pytest.mark.parametrize("poison", [NAN, float("inf"), 1e30])
@pytest.mark.parametrize("network", [{}, {"recurrent": "gru"}], ids=["plain", "recurrent"])
def test_whatever_a_reset_step_shows_and_pays_changes_nothing_that_is_learnt(poison, network, monkeypatch):
    outcomes = []
    for value in (0.0, poison):
        monkeypatch.setattr("classic.ppo.make_environments", lambda *_, value=value, **__: poisoned_tape(value))
        learner = cases.make_learner(
            None, num_envs=2, horizon=4, network=network, normalize_observations=True, normalize_rewards=True
        )
        _, metrics = improve(learner, LoopState())
        outcomes.append((cases.copied(learner.policy), learner.collector, metrics))
    (expected, first, told), (found, second, also_told) = outcomes
    assert cases.same(expected, found)
    assert torch.equal(first.returns, second.returns)
    assert torch.equal(first.running, second.running)
    names = set(told) - {"steps_per_second"}
    assert {name: told[name] for name in names} == pytest.approx({name: also_told[name] for name in names})
    assert told["episode/return"] == 3
    assert told["episode/length"] == 2


def test_the_advantage_of_a_reset_step_is_left_out_of_the_whitening():
    tape = cases.Tape(SHOWN, PAID, **ENDS, resets=RESETS)
    _, experience = rollout(tape, whiten_advantages=True)
    chosen = np.array([a for row in ADVANTAGES for a in row if a is not None])
    whitened = (chosen - chosen.mean()) / np.sqrt(chosen.var() + 1e-8)
    np.testing.assert_allclose(experience.advantages[experience.mask], whitened, rtol=1e-9)
    assert not experience.advantages[~experience.mask].any()


def test_the_normalizer_sees_decisions_alone():
    learner = cases.make_learner("CartPole-v1", normalize_observations=True, environment={"max_episode_steps": 5})
    trajectory, _ = cases.collected(learner)
    assert not trajectory.mask.all()
    learner.policy.observe(trajectory.inputs, trajectory.mask)
    chosen = trajectory.inputs["observations"][trajectory.mask].double()
    moments = learner.policy.normalizer.moments
    assert moments.count == trajectory.mask.sum()
    torch.testing.assert_close(moments.mean, chosen.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.variance, chosen.var(0, correction=0), rtol=1e-10, atol=1e-12)


def test_a_reward_normalizer_scales_the_bootstrap_s_units_too():
    # V is learnt from scaled rewards: γ·V is added to the scaled reward, and not scaled once more.
    normalizer = RewardNormalizer(0.5)
    normalizer.moments.variance.fill_(4.0)
    tape = cases.Tape([[1, 2, 9]], [[1, 1]], truncated=[(0, 1)], final={(0, 1): 3})
    policy = cases.Plain()
    trajectory = Collector(tape, policy).collect(policy, 2, cases.generator())
    scaled = dataclasses.replace(trajectory, rewards=normalizer(trajectory.rewards))
    experience = experience_of(scaled, policy, gamma=0.5, lam=0.5, whiten_advantages=False)
    assert experience.advantages[0, 1].item() == pytest.approx(0.5 + 0.5 * 3 - 2, abs=1e-8)


# --- the first ratio -------------------------------------------------------------------------------------------------

BOX = spaces.Box(np.array([-1, -3], np.float32), np.array([1, 1], np.float32))
RATIO_CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "one of four": (cases.Guess, {}),
    "several choices": (functools.partial(cases.Guess, spaces.MultiDiscrete([3, 2])), {}),
    "switches": (functools.partial(cases.Guess, spaces.MultiBinary(3)), {}),
    **{
        gaussian: (functools.partial(cases.Guess, BOX), {"network": {"gaussian": gaussian}})
        for gaussian in ("independent", "state_dependent", "squashed", "gsde")
    },
    "gsde, held for four": (
        functools.partial(cases.Guess, BOX),
        {"network": {"gaussian": "gsde", "sde_sample_freq": 4}},
    ),
    "normalized": (lambda: cases.far_and_dear(cases.Guess(BOX)), {"normalize_observations": True}),
    "lstm": (cases.Remember, {"network": {"recurrent": "lstm"}}),
    "gru, gaussian": (functools.partial(cases.Guess, BOX, length=5), {"network": {"recurrent": "gru"}}),
    "gru, same step": (cases.Remember, {"network": {"recurrent": "gru"}, "environment": {"autoreset": "same_step"}}),
    "masked": (cases.Allowed, {}),
    "masked, recurrent": (cases.Allowed, {"network": {"recurrent": "lstm"}}),
    "image": (functools.partial(cases.Guess, None, "image"), {}),
    "image and vector": (
        functools.partial(cases.Guess, None, "image and vector"),
        {"normalize_observations": True, "network": {"recurrent": "gru"}},
    ),
    "cartpole": ("CartPole-v1", {"horizon": 64}),
}


@pytest.fixture
def second_rollout(request):
    """A learner that has been through one update, with large steps, and its next rollout."""
    env, changes = RATIO_CASES[request.param]
    learner = cases.make_learner(env, **{"optimizer": {"lr": 1e-2}, **changes})
    improve(learner, LoopState())
    learner.told = []  # the parameters of the distributions that were drawn from
    draw = learner.policy.distribution.sample
    learner.policy.distribution.sample = lambda parameters, *rest: (
        learner.told.append(parameters) or draw(parameters, *rest)
    )
    yield learner, *cases.collected(learner, seed=1)
    learner.collector.envs.close()


each_case = pytest.mark.parametrize("second_rollout", RATIO_CASES, indirect=True)


@each_case
def test_the_first_ratio_is_one(second_rollout):
    learner, _, experience = second_rollout
    rows = experience if learner.policy.core is not None else experience.by_step()
    told = ppo_update(
        learner.policy,
        learner.optimizer,
        rows,
        PPOSettings(num_epochs=1, num_minibatches=1, value_clip_range=None),
        accelerator=learner.accelerator,
        generator=cases.generator(),
    )
    assert told["policy/ratio"] == pytest.approx(1, abs=1e-6)
    assert abs(told["policy/approx_kl"]) < 1e-7
    assert told["policy/clip_fraction"] == 0


@each_case
def test_every_decision_of_any_minibatch_has_ratio_one(second_rollout):
    learner, _, experience = second_rollout
    rows = experience if learner.policy.core is not None else experience.by_step()
    for minibatch in rows.shuffled(len(rows) // 2, cases.generator()):
        difference = (learner.policy(**minibatch.inputs).logprobs - minibatch.logprobs)[minibatch.mask]
        assert difference.abs().max() < 2e-5


@each_case
def test_what_was_drawn_from_is_what_is_learnt_of(second_rollout):
    # The rollout goes step by step and evaluates the policy alone; the update goes through whole streams at once.
    learner, trajectory, experience = second_rollout
    for index, parameters in enumerate(experience.distribution):
        drawn_from = torch.stack([parts[index] for parts in learner.told], dim=1)
        torch.testing.assert_close(drawn_from[trajectory.mask], parameters[trajectory.mask], rtol=1e-4, atol=1e-4)


# --- episodes --------------------------------------------------------------------------------------------------------


@examples
@given(
    arrays("float64", (3, 12), elements=st.floats(-50, 50)),
    arrays("bool", (3, 12)),
    st.lists(st.integers(1, 11), max_size=3),
)
def test_sums_since_the_last_end_are_those_of_a_slow_loop_whatever_the_rollouts(x, ended, cuts):
    expected, running = np.zeros((3, 12)), np.zeros(3)
    for t in range(12):
        running += x[:, t]
        expected[:, t] = np.where(ended[:, t], running, 0)
        running = np.where(ended[:, t], 0, running)
    carried, found = torch.zeros(3, dtype=torch.float64), []
    bounds = [0, *sorted(set(cuts)), 12]
    for start, stop in itertools.pairwise(bounds):
        sums, carried = _sums_at_ends(
            torch.from_numpy(x[:, start:stop]), carried, torch.from_numpy(ended[:, start:stop])
        )
        found.append(sums)
    np.testing.assert_allclose(torch.cat(found, 1), expected, atol=1e-9)
    np.testing.assert_allclose(carried, running, atol=1e-9)


@pytest.mark.parametrize("horizon", [1, 3, 7, 40])
def test_episodes_are_counted_whole_across_rollouts(horizon):
    # Every cart is cut off after 9 steps if it has not fallen; all that ends pays its length.
    learner = cases.make_learner(
        "CartPole-v1", horizon=horizon, environment={"max_episode_steps": 9}, ppo={"num_minibatches": 1}
    )
    told, lengths = [], []
    counts = np.zeros(4)
    for index in range(120 // horizon):
        trajectory, _ = cases.collected(learner, seed=index)
        told.append([x.item() for x in trajectory.episodes.values()])
        for t in range(horizon):
            counts += trajectory.mask[:, t].numpy()
            ended = trajectory.ended[:, t].numpy()
            lengths.extend(counts[ended])
            counts[ended] = 0
    count, total, length = np.array(told).sum(0)
    assert count == len(lengths) > 20
    assert total == length == sum(lengths)


def test_a_huge_reward_leaves_no_trace_in_later_episodes():
    tape = cases.Tape([[0] * 5], [[1e10, 0.25, 0.5, 0.125]], terminated=[(0, 0), (0, 2)], final={}, dtype=torch.float32)
    trajectory, _ = rollout(tape)
    assert trajectory.episodes["return"].item() == 1e10 + 0.75


@pytest.mark.parametrize(
    ("horizon", "expected"), [(6, [NAN]), (3, [3, NAN]), (2, [3, NAN, 48]), (1, [0, 3, 0, NAN, 0, 48])]
)
def test_a_reward_that_is_no_number_leaves_no_trace_in_later_episodes(horizon, expected):
    rewards = [[1.0, 2.0, 4.0, NAN, 8.0, 16.0], [1.0, 2.0, math.inf, 4.0, 8.0, 16.0]]
    tape = cases.Tape(torch.zeros(2, 7), rewards, terminated=[(0, 1), (0, 3), (0, 5), (1, 3), (1, 5)], final={})
    collector = Collector(tape, cases.Plain())
    rollouts = [collector.collect(cases.Plain(), horizon, cases.generator()) for _ in expected]
    assert [rollout.episodes["return"].item() for rollout in rollouts] == pytest.approx(expected, nan_ok=True)
    assert collector.returns.tolist() == [0, 0]


# --- recurrent memories ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("recurrent", ["lstm", "gru"])
def test_memories_last_across_rollouts_and_end_with_their_episode(mode, recurrent):
    env = functools.partial(cases.Guess, length=5)
    learner = cases.make_learner(
        env, horizon=7, network={"recurrent": recurrent}, environment={"autoreset": mode}, ppo={"num_minibatches": 1}
    )
    policy, pieces = learner.policy, []
    for index in range(4):
        trajectory, experience = cases.collected(learner, seed=index)
        pieces.append((trajectory, experience))
        assert torch.equal(trajectory.inputs["state"], pieces[0][0].inputs["state"]) == (index == 0)
    learner.collector.envs.close()
    observations = torch.cat([t.inputs["observations"] for t, _ in pieces], 1)
    values = torch.cat([e.values for _, e in pieces], 1)
    ended = torch.cat([t.ended for t, _ in pieces], 1)
    for row in range(4):
        begin = 0
        for t in range(28):
            if ended[row, t] or t == 27:
                # The episode alone, from an empty memory.
                alone = policy(
                    observations=observations[row : row + 1, begin : t + 1],
                    actions=torch.zeros(1, t + 1 - begin, dtype=torch.long),
                    starts=torch.zeros(1, t + 1 - begin, dtype=torch.bool),
                    state=torch.zeros(1, policy.core.state_size),
                )
                torch.testing.assert_close(alone.values[0], values[row, begin : t + 1], rtol=1e-4, atol=1e-5)
                begin = t + 1 if mode != "next_step" else t + 2
    assert ended.sum() >= 12


@pytest.mark.parametrize("mode", MODES)
def test_a_cut_off_episode_bootstraps_with_its_memory(mode):
    env = functools.partial(cases.Guess, length=5)
    learner = cases.make_learner(
        env, horizon=5, network={"recurrent": "gru"}, environment={"autoreset": mode}, ppo={"num_minibatches": 1}
    )
    trajectory, _ = cases.collected(learner)
    assert trajectory.truncated[:, 4].all()
    policy, memory = learner.policy, learner.policy.memory(4)
    for t in range(5):
        policy.decide(trajectory.inputs["observations"][:, t], None, memory, None)
    if mode == "next_step":  # the next observation is the last one of the old episode
        expected, found = policy.value(learner.collector.observations, memory), trajectory.last_values
    else:
        found = trajectory.bootstraps[:, 4]
        assert not trajectory.bootstraps[:, :4].any()
        expected = policy.value(last_shown(learner, env, trajectory), memory)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def last_shown(learner, env, trajectory):
    """What the same episodes show last, played once more with the same actions."""
    again = cases.make_learner(env, horizon=5, network={"recurrent": "gru"}, ppo={"num_minibatches": 1})
    for t in range(5):
        step = again.collector.envs.step(trajectory.inputs["actions"][:, t])
    again.collector.envs.close()
    return step.observations


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_masks_are_kept_and_no_forbidden_choice_is_taken(mode):
    learner = cases.make_learner(cases.Allowed, horizon=40, environment={"autoreset": mode})
    trajectory, experience = cases.collected(learner)
    learner.collector.envs.close()
    allowed, actions = trajectory.inputs["action_mask"], trajectory.inputs["actions"]
    assert allowed.shape == (4, 40, 4)
    decided = trajectory.mask
    assert (allowed.sum(-1)[decided] == 2).all()
    assert allowed.gather(-1, actions[..., None])[decided].all()  # the environment checks it too
    probabilities = experience.distribution[0].exp()
    assert (probabilities[~allowed] == 0).all()
    torch.testing.assert_close(
        experience.logprobs[decided], torch.full((int(decided.sum()),), math.log(0.5)), atol=0.05, rtol=0
    )


# --- settings --------------------------------------------------------------------------------------------------------


def test_how_many_environments_are_evaluated_at_once_changes_nothing():
    for network in ({}, {"recurrent": "lstm"}):
        learner = cases.make_learner("CartPole-v1", network=network)
        trajectory, together = cases.collected(learner)
        apart = experience_of(trajectory, learner.policy, gamma=0.9, lam=0.8, rows=1)
        for name in ("logprobs", "values", "advantages", "returns"):
            torch.testing.assert_close(getattr(apart, name), getattr(together, name), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(apart.distribution[0], together.distribution[0], rtol=1e-5, atol=1e-5)


@pytest.mark.cuda
@cases.NO_GPU
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", cases.Allowed], ids=str)
@pytest.mark.parametrize("network", [{}, {"recurrent": "gru"}], ids=["plain", "recurrent"])
def test_a_rollout_on_the_gpu_stays_there(env, network):
    learner = cases.make_learner(env, device="cuda", network=network, normalize_observations=True)
    trajectory, experience = cases.collected(learner)
    tensors = [*trajectory.inputs.values(), trajectory.rewards, trajectory.mask, *trajectory.episodes.values()]
    tensors += [experience.logprobs, experience.advantages, experience.returns, *experience.distribution]
    assert all(tensor.is_cuda for tensor in tensors)
    assert learner.policy(**experience.inputs).logprobs.sub(experience.logprobs).abs().max() < 1e-4


def test_a_normalizer_of_images_leaves_them_alone():
    learner = cases.make_learner(functools.partial(cases.Guess, None, "image and vector"), normalize_observations=True)
    trajectory, _ = cases.collected(learner)
    learner.policy.observe(trajectory.inputs, trajectory.mask)
    assert isinstance(learner.policy.normalizer, ObservationNormalizer)
    assert learner.policy.normalizer.moments.mean.shape == (1,)
    learner.collector.envs.close()
