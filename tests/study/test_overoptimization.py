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
from ppo_rlhf.study.overoptimization.curves import Curve, Fit, Point, best_of_n_curve, fit, ppo_curve
from ppo_rlhf.study.overoptimization.page import (
    best_of_n_takes_less_kl,
    clear,
    clear_of_peak,
    document_of,
    ensembles_lose_less,
    grows_with,
    penalty_stops_early,
    results_of,
    turns_over,
)

__all__ = ["in_process", "in_tmp_path"]

DISTANCES = [0.0, 0.5, 1.0, 2.0, 3.5, 6.0]
RULES = ("mean", "min", "lower_bound")
PLAN = Plan(sizes=("narrow",), label_counts=(100, 400), kl_coefs=(0.1,), num_members=2)
RISES, FALLS = [0, 0.2, 0.4, 0.6, 0.8, 1.0], [0, 0.3, 0.5, 0.2, -0.5, -2.0]


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


@pytest.mark.parametrize(
    ("method", "alpha", "beta", "peak"),
    [
        ("PPO", 0.5, 0.0005, None),  # exp(999)
        ("PPO", 0.5, 0.5 / 700, math.exp(699)),
        ("PPO", -0.5, 0.5, math.exp(-2)),  # d·(−0.5 − 0.5·log d) is above 0 up to d = 1/e
        ("PPO", 0.5, 0.0, None),
        ("best of n", -0.3, 0.1, None),  # it falls from d = 0 on
        ("best of n", 0.0, 0.1, None),
        ("best of n", 0.3, 0.1, 1.5),
        ("best of n", 0.3, -0.1, None),
    ],
)
def test_a_form_has_a_peak_only_at_a_distance_above_zero_that_is_a_number(method, alpha, beta, peak):
    found = Fit("x", method, alpha=alpha, alpha_error=0, beta=beta, beta_error=0, r_squared=1)
    assert found.peak_distance == (peak if peak is None else pytest.approx(peak))


def test_two_points_are_too_few_for_two_coefficients_and_their_errors():
    assert fit(curve([0.0, 1.0, 1.5], [0.0, 0.5, 1.0])) is None


def test_a_run_that_never_left_the_start_has_a_row_without_a_fit():
    """Its estimated KL is 0 but for two evaluations."""
    plan = Plan(sizes=("narrow",), label_counts=(100,), kl_coefs=())
    names = ["narrow-100", *(f"narrow-100-{rule}" for rule in RULES)]
    curves = [curve(FALLS, target=name, method="best of n") for name in names]
    curves += [curve([0, 0.1, 0.2, 0.1], [0, 0, 0.3, 0.5]), *(curve(FALLS, target=name) for name in names[1:])]
    results = results_of(curves, {"narrow-100": 0.7}, plan)
    assert len(results.fits) == 4 + 3
    rows = document_of(results, plan).sections[2].tables[0].rows
    assert rows[0] == ["narrow-100", "0.700", *["none"] * 4, "+0.20 at d = 0.30", "+0.10 at d = 0.50", "+3.00"]
    assert "none" not in rows[1][:5]


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
    assert [bent.gold_at(d) for d in (0.5, 1.5, 2.0)] == pytest.approx([0.0, 0.5, 1.0])
    assert bent.gold_at(2.1) is None


def curves_of(weak, strong, *, kl=(), ensembles=()):
    found = [curve(weak), curve(strong, target="narrow-400")]
    found += [curve(golds, target="narrow-400", kl_coef=0.1) for golds in kl]
    return found + [curve(golds, target=f"narrow-400-{rule}") for rule, golds in ensembles]


def test_a_difference_is_clear_from_two_standard_errors_of_a_difference_on():
    """Of 200 numbers of standard deviation 1 the mean has a variance of 1/200, of two means the difference 1/100."""
    assert clear(PLAN) == pytest.approx(2 * 0.1)
    assert clear(PLAN, "best of n") == pytest.approx(2 * 0.02**0.5)  # 100 prompts


def test_the_best_of_many_equal_evaluations_seldom_lies_clearly_above_another():
    """Five evaluations of a flat curve, which are independent of the start and of one another."""
    least = clear_of_peak(curve(RISES), PLAN)
    noise = np.random.default_rng(0).normal(scale=200**-0.5, size=(100_000, 6))
    share = (noise[:, 1:].max(1) - noise[:, 0] > least).mean()
    assert 0.01 < share < 0.025
    assert (noise[:, 1:].max(1) - noise[:, 0] > clear(PLAN)).mean() > 0.05  # which two alone would call clear
    assert clear_of_peak(curve(RISES, method="best of n"), PLAN) == pytest.approx(least * 2**0.5)


def test_gold_turns_over_where_it_falls_by_every_proxy_by_which_it_rose_while_that_rises():
    assert turns_over(curves_of(FALLS, FALLS), PLAN, "PPO").holds is True
    assert turns_over(curves_of(FALLS, RISES), PLAN, "PPO").holds is False
    sinking = [curve(FALLS, proxies=[0, 1, 2, 1, 1, 1]), curve(FALLS, target="narrow-400")]
    found = turns_over(sinking, PLAN, "PPO")
    assert found.holds is False
    assert found.evidence.startswith("gold rose by 2 of 2 proxies and turned over by 1.")
    assert "narrow-100: +0.50 at d = 1.0, -2.00 at 6.0" in found.evidence


@pytest.mark.parametrize(
    "golds",
    [
        [0, -0.3, -0.5, -1.0, -1.5, -2.0],
        [0, 0.1, 0.25, 0.1, -0.5, -2.0],  # within the noise of the highest of five
        [0, 0.0, 0.1, 0.0, 0.1, 0.1],
    ],
)
def test_gold_that_never_rose_has_nothing_to_turn_over(golds):
    for rose, holds in ((FALLS, True), (RISES, False)):  # the other proxy tells
        found = turns_over(curves_of(rose, golds), PLAN, "PPO")
        assert found.holds is holds
        assert found.evidence.startswith(f"gold rose by 1 of 2 proxies and turned over by {holds:d}.")
        assert "narrow-400" not in found.evidence
    assert turns_over(curves_of(golds, golds), PLAN, "PPO").holds is None


@pytest.mark.parametrize(
    ("golds", "proxies"),
    [
        ([0, 0.3, 0.5, 0.4, 0.4, 0.31], None),  # gold falls by less than the noise
        (FALLS, [0, 1, 2, 2, 2, 2.19]),  # the proxy rises by less
    ],
)
def test_what_lies_within_the_noise_is_no_turning_over(golds, proxies):
    curves = [curve(golds, proxies=proxies), curve(FALLS, target="narrow-400")]
    assert turns_over(curves, PLAN, "PPO").holds is False


@pytest.mark.parametrize(
    ("peaks", "holds"),
    [
        ([0.1, 0.3, 0.5], True),
        ([0.3, 0.15, 0.6], True),  # a step falls within the noise
        ([0.1, 0.6, 0.3], False),  # a step falls clearly, though the last is the highest but one
        ([0.6, 0.45, 0.3], False),  # no step alone, the whole row does
        ([0.3, 0.4, 0.45], None),
        ([0.3, 0.2, 0.15], None),
    ],
)
def test_more_labels_are_worth_more_where_the_peak_is_clearly_higher(peaks, holds):
    plan = Plan(sizes=("narrow",), label_counts=(100, 400, 1600))
    curves = [
        curve([0, peak], [0, 1], target=f"narrow-{count}") for peak, count in zip(peaks, plan.label_counts, strict=True)
    ]
    assert grows_with(curves, plan, "labels").holds is holds
    assert grows_with(curves, plan, "size").holds is None  # there is one size


def test_one_row_that_falls_decides_and_one_that_stays_leaves_it_open():
    plan = Plan(sizes=("narrow", "wide"), label_counts=(100, 400))

    def holds(*peaks):
        names = ("narrow-100", "narrow-400", "wide-100", "wide-400")
        return grows_with(
            [curve([0, peak], [0, 1], target=name) for name, peak in zip(names, peaks, strict=True)], plan, "labels"
        ).holds

    assert holds(0.1, 0.5, 0.3, 0.6) is True
    assert holds(0.1, 0.5, 0.3, 0.4) is None
    assert holds(0.3, 0.4, 0.6, 0.3) is False


@pytest.mark.parametrize(
    ("gains", "holds"),
    [
        ([0.3, 0.5, 0.4, 0.2], True),
        ([0.3, 0.5, 0.4, -0.05], True),  # on average it has more, whatever one proxy says
        ([-0.3, -0.5, -0.4, -0.2], False),
        ([0.5, -0.4, 0.3, -0.3], None),
    ],
)
def test_best_of_n_takes_less_kl_where_the_mean_gain_over_the_proxies_is_above_zero(gains, holds):
    """PPO's gold rises by 0.2 each unit of d: at d = 2, where best of n ends, it is at 0.4."""
    plan = Plan(sizes=("narrow",), label_counts=(1, 2, 3, 4))
    curves = []
    for count, gain in zip(plan.label_counts, gains, strict=True):
        curves.append(curve([0, 1.0], [0, 5], target=f"narrow-{count}"))
        curves.append(curve([0, 0.4 + gain], [0, 2], target=f"narrow-{count}", method="best of n"))
    found = best_of_n_takes_less_kl(curves, plan)
    assert found.holds is holds
    assert f"{sum(gains) / 4:.2f} [" in found.evidence


def test_where_ppo_did_not_go_as_far_its_gold_is_not_known():
    plan = Plan(sizes=("narrow",), label_counts=(100,))
    near = [curve([0, 0.5], [0, 1.9]), curve([0, 0.5], [0, 2], method="best of n")]
    found = best_of_n_takes_less_kl(near, plan)
    assert (found.holds, found.evidence) == (None, "no run of PPO went as far as the best of 256")
    ends = [curve([0, 0.5], [0, 1], target="narrow-400"), curve([0, 0.5], [0, 2], target="narrow-400", kl_coef=0.1)]
    assert penalty_stops_early(ends, PLAN).evidence == "no run without a penalty went as far as those with one"


def test_best_of_n_beside_ppo_cannot_be_told_by_one_proxy():
    plan = Plan(sizes=("narrow",), label_counts=(100,))
    assert best_of_n_takes_less_kl([curve(FALLS), curve(RISES, method="best of n")], plan).holds is None


PENALISED = Plan(sizes=("narrow", "middle", "wide"), label_counts=(400,), kl_coefs=(0.1, 0.4))


@pytest.mark.parametrize(
    ("gains", "holds"),
    [
        ([(0.0, 0.0), (0.0, 0.0), (0.0, 0.0)], True),
        ([(0.3, -0.1), (-0.1, 0.0), (0.05, 0.05)], True),  # a single run may differ clearly
        ([(0.5, 0.4), (0.3, 0.4), (0.6, 0.5)], False),
        ([(-0.5, -0.4), (-0.3, -0.4), (-0.6, -0.5)], False),
        ([(0.5, 0.4), (0.0, 0.0), (0.0, 0.1)], None),
    ],
)
def test_a_penalty_is_early_stopping_where_its_runs_end_near_the_other_s_path_on_average(gains, holds):
    """The runs without a penalty are at 0.5 at d = 1, where those with one end."""
    curves = []
    for size, both in zip(PENALISED.sizes, gains, strict=True):
        curves.append(curve(FALLS, target=f"{size}-400"))
        for kl_coef, gain in zip(PENALISED.kl_coefs, both, strict=True):
            curves.append(curve([0, 0.5 + gain], [0, 1], target=f"{size}-400", kl_coef=kl_coef))
    found = penalty_stops_early(curves, PENALISED)
    assert found.holds is holds
    assert f"{sum(map(sum, gains)) / 6:.2f} [" in found.evidence
    assert "6 runs with a penalty" in found.evidence


def test_a_penalty_against_one_proxy_says_nothing_of_its_noise():
    found = penalty_stops_early(curves_of(FALLS, FALLS, kl=[[0, 0.5, 1.0]]), PLAN)
    assert found.holds is None
    assert "0.50 on average over 1 proxies, from +0.50 to +0.50" in found.evidence


def test_ensembles_are_a_remedy_where_each_rule_ends_clearly_above_one_member():
    def holds(*each):
        ensembles = list(zip(RULES, each, strict=True))
        return ensembles_lose_less(curves_of(FALLS, FALLS, ensembles=ensembles), PLAN).holds

    assert holds(RISES, RISES, RISES) is True
    assert holds(RISES, RISES, FALLS) is None  # one ends where the member does
    assert holds(RISES, FALLS, [*FALLS[:-1], -2.5]) is False


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
