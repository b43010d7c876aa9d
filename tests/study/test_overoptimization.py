"""The study of overoptimisation: fits of known curves, curves and claims by hand, and the whole of it in small."""

import math

import numpy as np
import pytest
import torch
from study_cases import in_process
from tiny_runs import in_tmp_path, jsonl, strict, write_rows

from ppo_rlhf import cli
from ppo_rlhf.records import read_lines
from ppo_rlhf.study.overoptimization import Plan
from ppo_rlhf.study.overoptimization.curves import Curve, Point, best_of_n_curve, fit, ppo_curve
from ppo_rlhf.study.overoptimization.page import ensembles_lose_less, grows_with, penalty_stops_early, turns_over

__all__ = ["in_process", "in_tmp_path"]

DISTANCES = [0.0, 0.5, 1.0, 2.0, 3.5, 6.0]


def curve(golds, distances=DISTANCES, *, target="narrow-100", method="PPO", kl_coef=0.0, proxies=None):
    proxies = range(len(golds)) if proxies is None else proxies
    return Curve(target, method, kl_coef, tuple(map(Point, range(len(golds)), distances, proxies, golds)))


@pytest.mark.parametrize(
    ("method", "gold", "peak"),
    [
        ("best of n", lambda d: d * (0.8 - 0.1 * d), 0.8 / 0.2),
        ("PPO", lambda d: d * (0.8 - 0.4 * math.log(d)) if d else 0.0, math.exp(0.8 / 0.4 - 1)),
    ],
)
def test_a_fit_finds_the_coefficients_of_a_curve_of_its_form(method, gold, peak):
    found = fit(curve([gold(d) for d in DISTANCES], method=method))
    assert (found.alpha, found.beta) == pytest.approx((0.8, 0.1 if method == "best of n" else 0.4))
    assert (found.alpha_error, found.beta_error) == pytest.approx((0, 0), abs=1e-6)
    assert found.r_squared == pytest.approx(1)
    assert found.peak_distance == pytest.approx(peak)
    assert found.gold_at(2.0) == pytest.approx(gold(2.0))
    assert found.gold_at(peak) > max(found.gold_at(0.9 * peak), found.gold_at(1.1 * peak))
    assert found.gold_at(0.0) == 0


def test_the_errors_of_a_fit_are_those_of_linear_regression():
    """Both forms are linear in α and β: the covariance is s²·(XᵀX)⁻¹ with s² = Σr²/(N − 2)."""
    golds = np.array([0.4, 0.5, 1.1, 0.9, -0.3])
    found = fit(curve([0.0, *golds], method="best of n"))
    d = np.array(DISTANCES[1:])
    design = np.stack([d, -(d**2)], axis=1)
    solution, (squares,), *_ = np.linalg.lstsq(design, golds)
    errors = np.sqrt(np.diag(squares / 3 * np.linalg.inv(design.T @ design)))
    assert (found.alpha, found.beta) == pytest.approx(tuple(solution))
    assert (found.alpha_error, found.beta_error) == pytest.approx(tuple(errors))
    assert found.r_squared == pytest.approx(1 - squares / ((golds - golds.mean()) ** 2).sum())


def test_gold_that_only_rises_has_no_peak_within_its_form():
    assert fit(curve([d + d**2 for d in DISTANCES], method="best of n")).peak_distance is None


def test_two_points_are_too_few_for_two_coefficients_and_their_errors():
    with pytest.raises(ValueError, match="need three points, not 2"):
        fit(curve([0.0, 1.0, 1.5], [0.0, 0.5, 1.0]))


def test_best_of_n_starts_at_zero_and_takes_the_gold_of_the_highest_score():
    """Two prompts of two responses; gold 1, 3, 5, 7 has mean 4 and standard deviation √5."""
    scores, gold = torch.tensor([[0.0, 1.0], [3.0, 2.0]]), torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    one, two = best_of_n_curve("x", scores.double(), gold.double()).points
    assert (one.effort, one.distance) == (1, 0)
    assert (one.proxy, one.gold) == pytest.approx((0, 0), abs=1e-12)
    assert two.distance == pytest.approx(math.sqrt(math.log(2) - 1 / 2))
    assert two.gold == pytest.approx((3 + 5) / 2 / math.sqrt(5) - 4 / math.sqrt(5))  # not 7, whose score is lower
    assert two.proxy == pytest.approx((2 - 1.5) / math.sqrt(1.25))


def test_a_run_s_curve_is_measured_from_its_first_evaluation(tmp_path):
    start = {"step": 0, "eval/kl": 0.0, "eval/score": 1.0, "eval/gold_score": -1.0}
    start |= {"eval/score_std": 2.0, "eval/gold_score_std": 0.5}
    later = [
        {"step": 1, "objective/kl": 7.0},  # no evaluation
        {"step": 2, "eval/kl": -0.01, "eval/score": 2.0, "eval/gold_score": -1.0},
        {"step": 4, "eval/kl": 9.0, "eval/score": 5.0, "eval/gold_score": -2.0},
    ]
    later = [row | {"eval/score_std": 9.0, "eval/gold_score_std": 9.0} for row in later]
    write_rows(tmp_path / "metrics.jsonl", [start, *later])
    (tmp_path / "config.yaml").write_text("kl_coef: 0.1")
    found = ppo_curve("x", 0.1, tmp_path)
    assert found.points == (Point(0, 0, 0, 0), Point(2, 0, 0.5, 0), Point(4, 3, 2, -2))


def test_gold_between_two_points_is_on_the_line_between_them():
    bent = curve([0.0, 1.0, 0.0], [0.0, 2.0, 1.0])  # it came back
    assert [bent.gold_at(d) for d in (0.5, 1.5, 9.0)] == pytest.approx([0.0, 0.5, 1.0])


RULES = ("mean", "min", "lower_bound")
PLAN = Plan(sizes=("narrow",), label_counts=(100, 400), kl_coefs=(0.1,), num_members=2)
RISES, FALLS = [0, 0.2, 0.4, 0.6, 0.8, 1.0], [0, 0.3, 0.5, 0.2, -0.5, -2.0]


def curves_of(weak, strong, *, kl=(), ensembles=()):
    found = [curve(weak), curve(strong, target="narrow-400")]
    found += [curve(golds, target="narrow-400", kl_coef=0.1) for golds in kl]
    return found + [curve(golds, target=f"narrow-400-{rule}") for rule, golds in ensembles]


def test_gold_turns_over_where_it_falls_against_every_proxy_while_that_rises():
    assert turns_over(curves_of(FALLS, FALLS), PLAN, "PPO").holds
    assert not turns_over(curves_of(FALLS, RISES), PLAN, "PPO").holds
    sinking = [curve(FALLS, proxies=[0, 1, 2, 1, 1, 1]), curve(FALLS, target="narrow-400")]
    found = turns_over(sinking, PLAN, "PPO")
    assert not found.holds
    assert found.evidence.startswith("against 1 of 2 proxies")
    assert "narrow-100: +0.50 at d = 1.0, -2.00 at 6.0" in found.evidence


def test_more_labels_are_worth_more_where_the_peak_is_higher():
    assert grows_with(curves_of(FALLS, RISES), PLAN, "labels").holds
    assert not grows_with(curves_of(RISES, FALLS), PLAN, "labels").holds


def test_a_penalty_is_early_stopping_where_its_run_ends_on_the_other_s_path():
    short = RISES[:3]  # ends at d = 1, where the other one is at 0.5
    assert penalty_stops_early(curves_of(FALLS, FALLS, kl=[short]), PLAN).holds
    found = penalty_stops_early(curves_of(FALLS, FALLS, kl=[[0, 0.5, 1.0]]), PLAN)
    assert not found.holds
    assert "+0.50 on average, from +0.50 to +0.50" in found.evidence


def test_ensembles_are_a_remedy_where_each_rule_ends_above_one_member():
    assert ensembles_lose_less(curves_of(FALLS, FALLS, ensembles=[(rule, RISES) for rule in RULES]), PLAN).holds
    one_fails = list(zip(RULES, (RISES, RISES, FALLS), strict=True))
    assert not ensembles_lose_less(curves_of(FALLS, FALLS, ensembles=one_fails), PLAN).holds


def test_the_grid_has_every_size_with_every_count_and_one_member_in_common():
    plan = Plan()
    assert len(plan.proxies) == 9
    assert plan.members[0] in plan.proxies
    assert len({proxy.folder for proxy in [*plan.proxies, *plan.members]}) == 9 + 3
    assert len({attempt.folder for attempt in plan.attempts}) == 9 + 3 + 3 * 3


def test_the_whole_study_in_small_writes_its_files_and_goes_on_where_it_ended(tmp_path, in_process, capsys):
    command = ["study", "overoptimization", "--quick", "--output-dir", "study", "--json"]
    assert cli.main(command) == 0
    told = strict(capsys.readouterr().out.splitlines()[-1])
    folder = tmp_path / "study"
    assert len(in_process) == 1 + 2 + 5  # a policy; two members; PPO: one proxy with and without penalty, three rules
    training, held_out = (read_lines(folder / f"labels-{name}.jsonl") for name in ("60", "held-out"))
    assert [len(training), len(held_out)] == [60, 20]
    assert {row["prompt"] for row in training}.isdisjoint(row["prompt"] for row in held_out)
    samples = jsonl(folder / "best_of_n.jsonl")
    assert len(samples) == 4
    assert set(samples[0]["scores"]) == {"gold", "narrow-60", *(f"narrow-60-{rule}" for rule in RULES)}
    assert {len(scores) for scores in samples[0]["scores"].values()} == {8}

    results = strict((folder / "results.json").read_text())
    assert len(results["curves"]) == 4 + 5
    for found in results["curves"]:
        start = found["points"][0]
        assert (start["distance"], start["proxy"], start["gold"]) == pytest.approx((0, 0, 0), abs=1e-9)
        efforts = [point["effort"] for point in found["points"]]
        assert efforts == ([1, 2, 4, 8] if found["method"] == "best of n" else [0, 1, 2, 3, 4])
    assert len(results["fits"]) == 4 + 4
    assert told["claims"] == results["claims"]
    markdown = (folder / "README.md").read_text()
    assert "| proxy | label accuracy | α | β | R² | fitted peak, d | peak of gold | gold at the end |" in markdown
    page = (folder / "report.html").read_text()
    assert page.count('class="picture"') == 2 + 2 + 1 + 2
    assert told["files"] == [f"study/{name}" for name in ("README.md", "results.json", "report.html")]

    in_process.clear()
    assert cli.main([*command, "--resume"]) == 0
    assert in_process == []
    assert strict((folder / "results.json").read_text()) == results
