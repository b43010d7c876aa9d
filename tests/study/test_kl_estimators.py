"""The study of KL estimators: its numbers against sums worked by hand, its claims, its files, its command."""

import json
import math
from dataclasses import replace

import pytest
import torch
from refusals import refusal
from tiny_runs import in_tmp_path

from ppo_rlhf import cli
from ppo_rlhf.study import kl_estimators
from ppo_rlhf.study.kl_estimators import accuracy, optimum, policy_at

__all__ = ["in_tmp_path"]

P, Q = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([0.25, 0.75], dtype=torch.float64)
UP, DOWN = math.log(2), math.log(2 / 3)  # log p/q of the two tokens
KL = (UP + DOWN) / 2


@pytest.mark.parametrize(
    ("estimator", "estimates"),
    [
        ("k1", (UP, DOWN)),
        ("k2", (UP**2 / 2, DOWN**2 / 2)),
        ("k3", (1 / 2 - 1 + UP, 3 / 2 - 1 + DOWN)),
    ],
)
def test_bias_and_spread_are_those_of_two_tokens_summed_by_hand(estimator, estimates):
    found = accuracy(estimator, P.log(), Q.log())
    assert found.kl == pytest.approx(KL)
    assert found.bias == pytest.approx(sum(estimates) / 2 - KL, abs=1e-15)
    assert found.std == pytest.approx(abs(estimates[0] - estimates[1]) / 2)
    assert found.lowest == pytest.approx(min(estimates))


def test_gradients_are_those_of_the_closed_forms():
    """∇KL(p‖q) = p·(log p/q − KL), and k3's as a loss is ∇KL(q‖p) = p − q, both for a softmax's logits."""
    true = P * (torch.tensor([UP, DOWN]) - KL)
    reverse = P - Q
    expected = float((reverse - true).norm() / true.norm())
    assert accuracy("k3", P.log(), Q.log()).loss_gradient_error == pytest.approx(expected)
    assert accuracy("k3", P.log(), Q.log()).reverse_gradient_error == pytest.approx(0, abs=1e-12)
    assert accuracy("k3", P.log(), Q.log()).loss_gradient_norm == pytest.approx(2**0.5 / 4)  # p − q = (1/4, −1/4)
    expected = float((true - reverse).norm() / reverse.norm())
    assert accuracy("k2", P.log(), Q.log()).reverse_gradient_error == pytest.approx(expected)
    assert accuracy("k2", P.log(), Q.log()).loss_gradient_error == pytest.approx(0, abs=1e-12)
    assert accuracy("k1", P.log(), Q.log()).loss_gradient_norm == pytest.approx(0, abs=1e-12)
    assert accuracy("k1", P.log(), Q.log()).reward_gradient_error == pytest.approx(0, abs=1e-12)
    centred = torch.tensor([UP**2, DOWN**2]) / 2 - (UP**2 + DOWN**2) / 4
    expected = float((P * centred - true).norm() / true.norm())
    assert accuracy("k2", P.log(), Q.log()).reward_gradient_error == pytest.approx(expected)


@pytest.mark.parametrize("kl", [1e-3, 0.5, 1.9])
def test_a_policy_is_as_far_from_the_reference_as_was_asked(kl):
    reference = torch.zeros(8, dtype=torch.float64)  # the KL to it is at most log 8 = 2.08 nats
    direction = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p, q = policy_at(kl, reference, direction).softmax(-1), reference.softmax(-1)
    assert float((p * (p / q).log()).sum()) == pytest.approx(kl, rel=1e-9)


def test_a_distance_that_no_policy_has_is_refused():
    with pytest.raises(ValueError, match=r"stays below 2\.079 nats"):
        policy_at(3.0, torch.zeros(8, dtype=torch.float64), torch.arange(8.0, dtype=torch.float64))


def test_the_reward_k1_ends_at_the_boltzmann_policy_and_the_reward_k3_does_not():
    """Two tokens, rewards 1 and 0, β = 1, uniform reference: p* = σ(1), KL = p·log 2p + (1−p)·log 2(1−p)."""
    rewards, reference = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    best = 1 / (1 + math.exp(-1))
    kl = best * math.log(2 * best) + (1 - best) * math.log(2 * (1 - best))
    found = optimum("k1", rewards, reference, kl_coef=1.0)
    assert found.best_kl == pytest.approx(kl)
    assert found.kl == pytest.approx(kl)
    assert found.regret == pytest.approx(0, abs=1e-12)
    k3 = optimum("k3", rewards, reference, kl_coef=1.0)
    assert k3.lowest_ratio < 1e-20 < found.lowest_ratio
    assert k3.kl == pytest.approx(math.log(2))  # one token is all that is left
    assert k3.regret == pytest.approx(best - kl - (1 - math.log(2)))


def test_the_gradient_of_the_reverse_kl_is_the_policy_less_the_reference():
    """By automatic differentiation of Σ q·log q/p."""
    logits = P.log().requires_grad_()
    (Q * (Q.log() - logits.log_softmax(-1))).sum().backward()
    assert torch.allclose(logits.grad, P - Q)


@pytest.mark.parametrize("seed", [0, 1, 2, 72, 305, 822])  # the last three's directions end before 1 nat
def test_the_known_facts_hold(seed):
    claims = kl_estimators.run(seed).claims
    assert len(claims) == 8
    assert [claim.text for claim in claims if not claim.holds] == []


def test_a_claim_that_the_numbers_do_not_bear_out_is_said_to_fail():
    found = kl_estimators.run()
    swapped = {"k1": "k2", "k2": "k3", "k3": "k1"}
    mixed = [type(row)(**{**vars(row), "estimator": swapped[row.estimator]}) for row in found.accuracies]
    ends = [type(row)(**{**vars(row), "estimator": swapped[row.estimator]}) for row in found.optima]
    assert not any(claim.holds for claim in kl_estimators.claims_of(mixed, ends))


@pytest.mark.parametrize(("estimator", "name"), [("k1", "loss_gradient_norm"), ("k3", "reverse_gradient_error")])
def test_a_claim_about_a_gradient_fails_by_one_error_of_a_thousandth(estimator, name):
    found = kl_estimators.run()
    off = [replace(row, **{name: 1e-3}) if row.estimator == estimator else row for row in found.accuracies]
    failing = [claim.text for claim in kl_estimators.claims_of(off, found.optima) if not claim.holds]
    assert len(failing) == 1
    assert failing[0].startswith(f"As a loss, {estimator} has")


def test_the_command_writes_its_numbers_and_a_page_and_tells_the_claims(tmp_path, capsys):
    assert cli.main(["study", "kl-estimators", "--seed", "5", "--output-dir", "study", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(claim["holds"] for claim in told["claims"])
    assert told["files"] == [f"study/{name}" for name in ("README.md", "results.json", "report.html")]
    assert (tmp_path / "study" / "config.yaml").read_text() == "seed: 5\n"
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    assert results["claims"] == told["claims"]
    assert len(results["accuracies"]) == 3 * 7
    assert [row["estimator"] for row in results["optima"]] == ["k1", "k2", "k3"]
    markdown = (tmp_path / "study" / "README.md").read_text()
    assert "| As a loss, k1 has no gradient at all in expectation. | yes | largest norm" in markdown
    assert "| k2 | 0.3 | " in markdown
    assert (tmp_path / "study" / "report.html").read_text().count('class="picture"') == 4


def test_a_second_study_does_not_write_over_the_first(tmp_path, capfd):
    command = ["study", "kl-estimators", "--output-dir", "study"]
    assert cli.main(command) == 0
    before = (tmp_path / "study" / "results.json").read_bytes()
    assert "study holds a run already" in refusal(cli.main, [*command, "--seed", "1"], capfd)
    assert (tmp_path / "study" / "results.json").read_bytes() == before
