"""`examples/benchmarks/rerun.py`: figures beside their intervals, and where these come from."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from refusals import refusal
from scipy import stats

from ppo_rlhf.run import checked_out_commit

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"
README = (BENCHMARKS / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def rerun(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import rerun

    return rerun


@pytest.fixture
def folder(tmp_path):
    """Where the demo has been run, and Pendulum with three seeds: none of them is run again."""
    write(tmp_path / "demo/seed-0", {"reward": {"pairwise_accuracy": 0.84}, "ppo": {"gold_score_after": 1.2, "kl": 3}})
    for seed, value in enumerate((-150.0, -170.0, -181.0)):
        write(tmp_path / f"pendulum/seed-{seed}", {"return_after": value})
    return tmp_path


def write(folder, summary):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "environment.json").write_text(json.dumps({"commit": checked_out_commit()}))
    (folder / "summary.json").write_text(json.dumps(summary))


def findings(folder):
    return {row["figure"]: row for row in json.loads((folder / "rerun.json").read_text())}


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        (2.0, "inside"),
        (1.0, "inside"),  # the ends belong to the interval
        (3.0, "inside"),
        (0.999, "below"),
        (3.001, "above"),
        (None, "missing"),
        (float("nan"), "missing"),
        (float("inf"), "missing"),
    ],
)
def test_a_figure_moved_unless_it_is_a_number_of_the_interval(rerun, value, verdict):
    assert rerun.Finding("a", "b", value, low=1.0, high=3.0, source="").verdict == verdict


def test_a_figure_is_the_mean_over_the_seeds(rerun):
    assert rerun.mean_of("ppo.kl", [{"ppo": {"kl": 1.0}}, {"ppo": {"kl": 4.0}}]) == 2.5


@pytest.mark.parametrize("other", [{}, {"ppo": {}}, {"ppo": {"kl": None}}, {"ppo": None}])
def test_a_figure_that_one_seed_lacks_is_missing(rerun, other):
    assert rerun.mean_of("ppo.kl", [{"ppo": {"kl": 1.0}}, other]) is None


def test_figures_inside_their_intervals_end_with_code_0(rerun, folder):
    assert rerun.main(["--resume", "--output-dir", str(folder), "--only", "demo", "pendulum"]) == 0
    found = findings(folder)
    assert found["return_after"]["value"] == -167.0
    assert {row["verdict"] for row in found.values()} == {"inside"}
    assert len(found) == 4


def test_a_figure_that_moved_ends_with_code_1_and_is_named(rerun, folder, capsys):
    write(folder / "demo/seed-0", {"reward": {"pairwise_accuracy": 0.5}, "ppo": {"gold_score_after": None, "kl": 3}})
    assert rerun.main(["--resume", "--output-dir", str(folder), "--only", "demo"]) == 1
    told = {figure: row["verdict"] for figure, row in findings(folder).items()}
    assert told == {"reward.pairwise_accuracy": "below", "ppo.gold_score_after": "missing", "ppo.kl": "inside"}
    assert re.search(r"demo.*0\.500.*below", capsys.readouterr().out)


def test_a_run_that_fails_leaves_its_figures_missing_and_the_others_are_compared(rerun, folder, monkeypatch, capsys):
    reference = next(each for each in rerun.read_references() if each.name == "pendulum")
    broken = rerun.Reference("broken", "python -c 'raise SystemExit(3)'", (0,), {"loss": (0, 1)}, "")
    monkeypatch.setattr(rerun, "read_references", lambda: [broken, reference])
    assert rerun.main(["--resume", "--output-dir", str(folder)]) == 1
    assert {figure: row["verdict"] for figure, row in findings(folder).items()} == {
        "loss": "missing",
        "return_after": "inside",
    }
    assert "broken seed 0 failed with exit code 3" in capsys.readouterr().err


def test_the_commands_are_those_of_a_user_with_a_folder_for_each_seed(rerun, tmp_path):
    for reference in rerun.read_references():
        jobs = reference.jobs(tmp_path)
        assert [job.folder for job in jobs] == [tmp_path / reference.name / f"seed-{n}" for n in reference.seeds]
        for seed, job in zip(reference.seeds, jobs, strict=True):
            words = list(job.command[1:])
            assert words[:2] in (["-m", "classic"], ["-m", "ppo_rlhf"])
            assert words[words.index("--seed") + 1] == str(seed)


def test_what_leaves_no_run_folder_is_measured(rerun):
    without = [each for each in rerun.read_references() if not each.seeds]
    assert {each.name for each in without} == set(rerun.WITHOUT_RUNS)
    assert rerun.claims_that_fail() == {"claims_that_fail": 0}


def test_the_slowest_help_is_the_largest_of_what_each_command_takes_at_least(rerun, monkeypatch):
    import startup

    used = iter([0, 5, 6, 8, 9, 13, 0, 3, 9, 12, 14, 17])  # 5 1 2 1 4 and 3 6 3 2 3 seconds
    monkeypatch.setattr(startup, "WORDS", ((), ("demo",)))
    monkeypatch.setattr(startup, "cpu_seconds_of_children", lambda: next(used))
    monkeypatch.setattr(startup.subprocess, "run", lambda *_, **__: None)
    assert rerun.slowest_help() == {"slowest_help": 2}


def test_runs_that_are_there_are_not_reported_again_unless_they_are_resumed(rerun, folder, capfd):
    told = refusal(rerun.main, ["--output-dir", folder, "--only", "pendulum"], capfd)
    assert "pendulum/seed-0 holds a run already; go on with it by --resume, or give another --output-dir." in told
    assert not (folder / "rerun.json").exists()


@pytest.mark.parametrize("place", ["pendulum/seed-1", "demo/seed-0/ppo"])
def test_runs_of_another_commit_are_not_resumed(rerun, folder, place, capfd):
    write(folder / place, {})
    (folder / place / "environment.json").write_text('{"commit": "0123abc"}')
    told = refusal(rerun.main, ["--resume", "--output-dir", folder, "--only", "demo", "pendulum"], capfd)
    assert f"{place} was run at commit 0123abc, and {checked_out_commit()} is checked out" in told
    assert not (folder / "rerun.json").exists()


def test_a_table_that_is_there_is_not_written_over(rerun, tmp_path, capfd):
    (tmp_path / "rerun.json").write_text("[]")
    told = refusal(rerun.main, ["--output-dir", tmp_path, "--only", "startup"], capfd)
    assert "holds a table already" in told
    assert (tmp_path / "rerun.json").read_text() == "[]"


def test_a_folder_that_cannot_be_made_is_named(rerun, capfd):
    told = refusal(rerun.main, ["--output-dir", "/proc/nope", "--only", "startup"], capfd)
    assert "/proc/nope cannot be written" in told


@pytest.mark.parametrize("words", [[], ["--resume"], ["--only", "startup"]])
def test_a_file_is_no_folder_for_runs(rerun, tmp_path, words, capfd):
    (tmp_path / "file").write_text("")
    assert "file is a file, not a folder" in refusal(rerun.main, ["--output-dir", tmp_path / "file", *words], capfd)


# ------------------------------------------------------------------------------- the intervals follow from the tables


def interval_of_mean(taken, count):
    """Where the mean of `count` more runs lies with 95 %: mean ± t·s·√(1/count + 1/n)."""
    half = stats.t.ppf(0.975, len(taken) - 1) * np.std(taken, ddof=1) * np.sqrt(1 / count + 1 / len(taken))
    return pytest.approx([np.mean(taken) - half, np.mean(taken) + half], abs=0.006)


def intervals(rerun, name):
    reference = next(each for each in rerun.read_references() if each.name == name)
    return {figure: list(ends) for figure, ends in reference.figures.items()}, len(reference.seeds)


def test_the_intervals_of_the_demo_are_those_of_the_tabled_seeds(rerun):
    section = README.split("## The embedded task")[1].split("`pairwise accuracy`")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if "→" in line]
    found, count = intervals(rerun, "demo")
    assert len(rows) == 5
    assert found["reward.pairwise_accuracy"] == interval_of_mean([float(row[1]) for row in rows], count)
    assert found["ppo.gold_score_after"] == interval_of_mean([float(row[4].split("→")[1]) for row in rows], count)
    assert found["ppo.kl"] == interval_of_mean([float(row[6]) for row in rows], count)


def by_seed(env_id):
    row = next(line for line in README.splitlines() if line.startswith(f"| {env_id}, clip, by seed |"))
    return [float(cell.replace("−", "-")) for cell in row.split("|")[2:-1]]


def test_the_interval_of_pendulum_is_that_of_the_tabled_seeds(rerun):
    found, count = intervals(rerun, "pendulum")
    assert found["return_after"] == interval_of_mean(by_seed("Pendulum-v1"), count)


def test_the_interval_of_cartpole_is_one_tabled_digit(rerun):
    assert set(by_seed("CartPole-v1")) == {500.0}
    assert intervals(rerun, "cartpole")[0]["return_after"] == [499.95, 500.05]
