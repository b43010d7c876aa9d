"""The study of PPO's details: what is changed, seed by seed, and the whole of it in small."""

from dataclasses import asdict, replace

import pytest
import yaml
from refusals import refusal
from study_cases import in_process
from tiny_runs import in_tmp_path, strict

from ppo_rlhf import cli
from ppo_rlhf.config import PPOConfig
from ppo_rlhf.errors import UserError
from ppo_rlhf.models import load_value_head
from ppo_rlhf.study import ablations, overoptimization
from ppo_rlhf.study.ablations import VARIANTS, outcome
from ppo_rlhf.study.toy_runs import PIPELINE

__all__ = ["in_process", "in_tmp_path"]


def summaries(golds, kls):
    return [{"gold_score_after": gold, "kl": kl} for gold, kl in zip(golds, kls, strict=True)]


def test_a_variant_is_compared_seed_by_seed_with_the_demo_s_settings():
    """Of five seeds the interquartile mean leaves out the least and the greatest."""
    base = summaries([0.0, 1.0, 2.0, 3.0, 4.0], [5.0] * 5)
    found = outcome(VARIANTS[0], summaries([0.5, 1.5, 2.5, 3.5, 4.5], [1.0, 2.0, 3.0, 4.0, 50.0]), base)
    assert found.gold == (0.5, 1.5, 2.5, 3.5, 4.5)
    assert found.gold_estimate.value == 2.5
    # seeds differ by more than the change does, which is the same for each of them
    assert (found.gold_difference.value, found.gold_difference.low, found.gold_difference.high) == (0.5, 0.5, 0.5)
    assert found.gold_estimate.high - found.gold_estimate.low > 1
    assert found.kl_estimate.value == 3.0
    assert found.kl_difference.value == -2.0


def test_every_change_is_a_setting_that_the_demo_has_otherwise():
    demo = yaml.safe_load(PIPELINE.read_text())["ppo"]
    for variant in VARIANTS:
        for name, value in variant.settings.items():
            settings, default = demo, PPOConfig()
            for part in name.split("."):
                settings, default = (settings or {}).get(part), getattr(default, part)
            assert value != (default if settings is None else settings), name
    assert len({variant.folder for variant in VARIANTS}) == len(VARIANTS)


def test_the_whole_study_in_small_shares_the_models_of_a_seed(tmp_path, in_process, capfd):
    command = ["study", "ablations", "--quick", "--num-seeds", "1", "--output-dir", "study", "--json"]
    assert cli.main(command) == 0
    told = strict(capfd.readouterr().out.splitlines()[-1])
    seed = tmp_path / "study" / "seed-0"
    assert len(in_process) == 1 + 3
    assert [each["change"] for each in told["outcomes"]] == ["", "N(0, 1/√(d+1)), not 0", "1, not 2", "4, not 2"]
    for number, folder in enumerate(["value_head-random", "ppo.num_epochs-1", "ppo.num_epochs-4"], start=1):
        config = yaml.safe_load((seed / folder / "config.yaml").read_text())
        assert config["policy"].endswith("seed-0/demo/sft/policy")
        assert config["kl_coef"] == 0.15  # the demo's, where nothing else is said
        summary = strict((seed / folder / "summary.json").read_text())
        assert told["outcomes"][number]["gold"] == [summary["gold_score_after"]]
        # the same policy, prompts and noise
        assert told["gold_before"] == [pytest.approx(summary["gold_score_before"])]
    weight, bias = load_value_head(str(seed / "random-head"))
    assert 0.5 / 193**0.5 < float(weight.std()) < 2 / 193**0.5
    assert not bias.any()
    assert (tmp_path / "study" / "report.html").exists()
    assert "| value head at the start | N(0, 1/√(d+1)), not 0 |" in (tmp_path / "study" / "README.md").read_text()

    in_process.clear()
    resumed = ["study", "ablations", "--output-dir", "study", "--resume"]  # quick and one seed, as it was begun
    run = seed / "ppo.num_epochs-1" / "config.yaml"
    before = run.read_text()
    run.write_text(before.replace("kl_coef: 0.15", "kl_coef: 0.2"))  # as though the demo's had changed since
    assert "ppo.num_epochs-1 was started with kl_coef=0.2, not 0.15" in refusal(cli.main, resumed, capfd)
    run.write_text(before)
    run = seed / "demo" / "config.yaml"
    before = run.read_text()
    run.write_text(before.replace("batch_size: 32", "batch_size: 16"))
    assert "demo was started with reward.batch_size=16, not 32" in refusal(cli.main, resumed, capfd)
    run.write_text(before)
    assert in_process == []
    assert cli.main(resumed) == 0
    assert in_process == []
    assert cli.main([*resumed, "--quick"]) == 0
    assert in_process == []


def test_a_resumed_study_keeps_its_seeds_unless_more_are_asked_for(monkeypatch, tmp_path, capfd):
    """Nothing is run: the first grid ends it."""
    plans = []

    def run_nothing(folder, plan):
        plans.append(plan)
        raise UserError("enough")

    monkeypatch.setattr(ablations, "shared_jobs", run_nothing)
    command = ["study", "ablations", "--output-dir", "study"]
    for words in (["--num-seeds", "3", "--resume"], ["--resume"], ["--resume", "--num-seeds", "7"], ["--resume"]):
        assert cli.main([*command, *words]) == 2
    assert [plan.num_seeds for plan in plans] == [3, 3, 7, 7]
    assert plans[1] == ablations.Plan(num_seeds=3)
    told = refusal(cli.main, [*command, "--resume", "--num-seeds", "6"], capfd)
    assert "--num-seeds 6: study was started with 7; more may join them, not fewer." in told
    assert "study was started with num_steps=20, not 1" in refusal(cli.main, [*command, "--resume", "--quick"], capfd)
    assert len(plans) == 4


def test_a_resumed_overoptimization_keeps_its_seed(monkeypatch, tmp_path, capfd):
    plans = []

    def run_nothing(folder, plan):
        plans.append(plan)
        raise UserError("enough")

    monkeypatch.setattr("ppo_rlhf.study.overoptimization.study.write_prompts", run_nothing)
    command = ["study", "overoptimization", "--output-dir", "study"]
    for words in (["--quick", "--seed", "3"], ["--resume"], ["--resume", "--seed", "3"], ["--resume", "--quick"]):
        assert cli.main([*command, *words]) == 2
    assert plans == [replace(overoptimization.QUICK, seed=3)] * 4
    told = refusal(cli.main, [*command, "--resume", "--seed", "0"], capfd)
    assert "study was started with seed=3, not 0" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["ablation"], "Did you mean ablations?"),
        (["kl-estimators", "--quick"], "study kl-estimators has no option --quick"),
        (["kl-estimators", "--workers", "2"], "study kl-estimators has no option --workers"),
        (["ablations", "--seed", "1"], "study ablations has no option --seed"),
        (["ablations", "--seed", "0"], "study ablations has no option --seed"),
        (["overoptimization", "--num-seeds", "3"], "study overoptimization has no option --num-seeds"),
        (["ablations", "--num-seeds", "0"], "--num-seeds 0 must be at least 1"),
        (["overoptimization", "--workers", "0"], "--workers 0 must be at least 1"),
        (["overoptimization", "--seed", "-1"], "--seed -1 must lie between 0 and 2**31 - 1"),
        (["overoptimization", "--resume"], "--resume needs --output-dir"),
        (["ablations", "--output-dir", "begun"], "begun holds a run already"),
        (["ablations", "--quick", "--output-dir", "begun", "--resume"], "begun was started with num_steps=7, not 1"),
        (["overoptimization", "--output-dir", "other", "--resume"], "other holds another run than this study's"),
        (["overoptimization", "--output-dir", "user.py/study"], "user.py is a file, not a folder"),
        (["overoptimization", "--output-dir", "/proc/nope"], "/proc/nope cannot be written"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_run(words, told, tmp_path, in_process, capfd):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text(yaml.safe_dump(asdict(ablations.Plan(num_steps=7, details=[]))))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("seed: 0\n")  # of kl-estimators
    assert told in refusal(cli.main, ["study", *words], capfd)
    assert in_process == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun", "other", "user.py"]
