"""What the report says: outcome, groups, curves, settings, findings, samples."""

import ast
import json
import math
import re
from pathlib import Path

import pytest
import tiny_runs
import torch
import yaml
from report_cases import inspected_in, report_of, write_run

import ppo_rlhf
from ppo_rlhf import report
from ppo_rlhf.cli import main
from ppo_rlhf.core import approx_kl, gae, kl_shaped_rewards
from ppo_rlhf.document import Chart, Series
from ppo_rlhf.errors import UserError
from ppo_rlhf.records import record_of, records_of
from ppo_rlhf.report.curves import curve_charts, frontier_charts, spread
from ppo_rlhf.report.groups import differences, groups_of
from ppo_rlhf.report.guide import GUIDE
from ppo_rlhf.report.outcome import sentence_of

ROOT = Path(ppo_rlhf.__file__).parents[1]


def group_of(*folders):
    (group,) = groups_of([record_of(folder) for folder in folders])
    return group


def test_runs_that_differ_in_seed_and_paths_are_one_group(tmp_path):
    folders = [write_run(tmp_path / f"seed-{seed}", seed=seed) for seed in range(3)]
    group = group_of(*folders)
    assert group.name == "seed-0 … seed-2 (3 runs)"
    assert [record.folder for record in group.records] == folders


def test_another_setting_or_another_model_s_name_is_another_group(tmp_path):
    records = [
        record_of(write_run(tmp_path / name, **settings))
        for name, settings in {
            "plain": {},
            "other": {"kl_coef": 0.5, "ppo": {"clip_range": 0.1, "dual_clip": None}},
            "hub": {"policy": "some/model"},
        }.items()
    ]
    groups = groups_of(records)
    assert [group.name for group in groups] == ["plain", "other", "hub"]
    assert differences(groups) == [
        ("kl_coef", [0.1, 0.5, 0.1]),
        ("policy", ["policy", "policy", "some/model"]),
        ("ppo.clip_range", [0.2, 0.1, 0.2]),
    ]


def test_a_group_is_drawn_as_its_mean_with_the_lowest_and_highest_as_a_band(tmp_path):
    group = group_of(*(write_run(tmp_path / str(seed), seed=seed, steps=4) for seed in (0, 1, 5)))
    line, dots = curve_charts([group])[0].series
    # the score is step / 4 + seed / 10
    assert line.x == [1, 2, 3, 4]
    assert line.low == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert line.y == pytest.approx([0.45, 0.7, 0.95, 1.2])
    assert line.high == pytest.approx([0.75, 1.0, 1.25, 1.5])
    assert (dots.style, dots.x, dots.low) == ("dots", [0, 2, 4], ())


def test_score_against_kl_is_a_path_through_the_evaluations_of_each_run(tmp_path):
    group = group_of(*(write_run(tmp_path / str(seed), seed=seed, steps=4) for seed in (0, 1)))
    score, gold = frontier_charts([group])
    assert [list(zip(each.x, each.y, strict=True)) for each in score.series] == [
        [(0.0, 0.0), (2 / 3, 0.5), (4 / 3, 1.0)],
        [(0.0, 0.0), (2 / 3, 0.6), (4 / 3, 1.1)],
    ]
    assert score.series[0].notes == ["at step 0", "at step 2", "at step 4"]
    assert gold.series[0].y == [0.0, 0.25, 0.5]


def test_a_metric_that_was_not_finite_leaves_a_gap(tmp_path):
    folder = write_run(tmp_path / "run", steps=3)
    rows = tiny_runs.metrics_of(folder)
    rows[2]["objective/score"] = None
    tiny_runs.write_rows(folder / "metrics.jsonl", rows)
    line = curve_charts([group_of(folder)])[0].series[0]
    assert [math.isnan(y) for y in line.y] == [False, True, False]
    assert "highest 1" in report_of(folder)


def test_long_runs_are_thinned_to_their_first_last_and_evenly_spread_steps():
    assert spread(5, 10) == [0, 1, 2, 3, 4]
    assert spread(101, 3) == [0, 50, 100]
    assert len(set(spread(1000, 400))) == 400


def test_a_chart_says_its_numbers_in_words_and_in_a_table():
    chart = Chart("Score", (Series("a", [0, 1, 2], [0.5, math.nan, -1.25]),))
    assert chart.summary == "a: from 0.5 (at 0) to -1.25 (at 2); lowest -1.25, highest 0.5."
    assert chart.table == [("a", "line", [("0", "0.5"), ("2", "-1.25")])]
    assert Chart("Score", (Series("a", [], []),)).summary == ""


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({}, "raised the reward model’s score from 0.00 to 1.00 and the gold score, which it never saw, from 0.00 to"),
        ({"gold_score_after": -0.5}, "but lowered the gold score, which it never saw, from 0.00 to −0.50"),
        ({"gold_score_after": -0.5}, "it learnt what the reward model overrates"),
        ({"score_after": -1.0}, "lowered the reward model’s score from 0.00 to −1.00 and raised the gold score"),
        ({"score_after": None}, "took the reward model’s score from 0.00 to not finite"),
    ],
)
def test_the_outcome_is_one_sentence(tmp_path, numbers, expected):
    folder = write_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | numbers))
    sentence = sentence_of(group_of(folder))
    assert expected in sentence
    assert sentence.endswith(".")
    assert sentence in report_of(folder)


def test_a_run_in_progress_says_how_far_it_is(tmp_path):
    folder = write_run(tmp_path / "run", summary=False)
    assert "has not finished: this is what it wrote up to step 6" in report_of(folder)
    assert report.outcome_lines(folder) == []


def test_the_sentence_of_several_seeds_tells_their_mean(tmp_path):
    folders = [write_run(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    assert "from 0.00 to 1.50" in sentence_of(group_of(*folders))
    assert "(means of 2 runs)" in sentence_of(group_of(*folders))


def test_runs_side_by_side_show_what_differs_and_the_settings_of_each(tmp_path):
    page = report_of(write_run(tmp_path / "one"), write_run(tmp_path / "two", kl_coef=0.7), output=tmp_path / "x.html")
    assert re.search(r"<code>kl_coef</code></th><td><code>0.1</code></td><td><code>0.7</code></td>", page)
    assert "one: ppo" in page
    assert "two: ppo" in page
    assert len(inspected_in(page)) == 2


def test_the_doctor_s_findings_are_shown_and_their_absence_too(tmp_path, capfd):
    folder = write_run(tmp_path / "run", batch_size=4)
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "whitening batch too small" in page
    assert "advantages are whitened over 4 responses" in page
    assert "Healthy: no check found anything." in report_of(folder, findings=[])
    assert "The doctor was not asked." in report_of(folder)


def test_several_runs_go_into_the_named_file_or_the_first_run_s_folder(tmp_path, capfd):
    folders = [write_run(tmp_path / name, kl_coef=kl_coef) for name, kl_coef in (("one", 0.1), ("two", 0.2))]
    assert main(["report", *map(str, folders), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {"report": f"{folders[0]}/report.html"}
    assert main(["report", *map(str, folders), "--output", "both.html"]) == 0
    for path in (Path("both.html"), folders[0] / "report.html"):
        assert "<title>one · two: run report</title>" in path.read_text()
    assert not (folders[1] / "report.html").exists()


def test_a_file_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path, capfd):
    folder = write_run(tmp_path / "run")
    assert main(["report", str(folder), "--output", "nowhere/report.html"]) == 2
    assert "nowhere/report.html cannot be written" in capfd.readouterr().err
    assert not Path("nowhere").exists()


def test_a_folder_with_settings_alone_is_refused(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"run holds no run: it has no metrics.jsonl"):
        report_of(folder)


def test_an_older_run_without_the_new_fields_shows_what_it_has(tmp_path):
    folder = write_run(tmp_path / "run")
    old = {"ids", "kl_coef", "new_logprobs", "kl", "gold_score"}
    numbers = {"tokens", "logprobs", "ref_logprobs", "entropy", "rewards", "values", "advantages", "returns"}
    rows = [
        {name: row[name] for name in row if name not in (old if row["kind"] == "rollout" else old | numbers)}
        for row in tiny_runs.jsonl(folder / "samples.jsonl")
    ]
    tiny_runs.write_rows(folder / "samples.jsonl", rows)
    (run,) = inspected_in(report_of(folder))
    assert run["held_out"][0].keys() == {"step", "prompt", "response", "finished", "score", "kl_coef"}
    assert run["rollouts"][0]["kl_coef"] == 0.1  # of the step's metrics
    assert "new" not in run["rollouts"][0]


def test_two_hundred_steps_stay_below_five_megabytes(tmp_path):
    folder = write_run(tmp_path / "run", steps=200, tokens=48, every=10)
    page = report_of(folder)
    assert len(page.encode()) < 5e6
    (run,) = inspected_in(page)
    for kind in ("held_out", "rollouts"):
        steps = sorted({row["step"] for row in run[kind]})
        assert steps[-1] == 200
        assert steps[0] == (0 if kind == "held_out" else 1)
        assert len(steps) > 20


def test_very_long_responses_leave_early_middle_and_late(tmp_path):
    (run,) = inspected_in(report_of(write_run(tmp_path / "run", steps=9, tokens=4000, every=1)))
    assert sorted({row["step"] for row in run["rollouts"]}) == [1, 5, 9]


def test_text_of_models_and_names_of_folders_cannot_become_markup(tmp_path):
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    folder = write_run(tmp_path / "<b>run", texts=[hostile, "\u2028"])
    page = report_of(folder, findings=[])
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "<b>run" not in page.replace("<bdi", "")
    assert inspected_in(page)[0]["rollouts"][0]["tokens"][:2] == [hostile, "\u2028"]


def test_a_line_separator_inside_a_text_ends_no_line_of_a_file(tmp_path):
    folder = write_run(tmp_path / "run", texts=["\u2028", "\x85"])
    assert len(record_of(folder).samples) == len((folder / "samples.jsonl").read_bytes().splitlines())


def test_nothing_of_the_page_comes_from_elsewhere(tmp_path):
    page = report_of(write_run(tmp_path / "run"))
    assert "default-src 'none'" in page  # so that a browser loads nothing, whatever a script asks for
    _, body = page.split("<body>\n")
    for remote in ('src="', "src='", 'href="http', "@import", "url(http"):
        assert remote not in body


def test_a_pipeline_s_stages_are_read_in_their_order(tmp_path):
    folder = tmp_path / "pipeline"
    for stage in ("ppo", "sft", "reward"):
        write_run(folder / stage, stage=stage)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 0}))
    assert [record.stage for record in records_of(folder)] == ["sft", "reward", "ppo"]
    assert {group.name for group in groups_of(records_of(folder))} == {"pipeline"}


@pytest.mark.parametrize("entry", GUIDE, ids=lambda entry: entry.anchor)
def test_the_guide_names_lines_that_the_code_has_and_the_study_guide_explains(entry):
    source = (ROOT / entry.file).read_text(encoding="utf-8")
    ast.parse(source)
    assert entry.line in source
    study = (ROOT / "docs" / "ppo-in-chatgpt.md").read_text(encoding="utf-8")
    assert f'<a id="{entry.anchor}"></a>' in study
    assert entry.line in study
    assert entry.file in study


def test_the_study_guide_s_worked_example_is_what_the_core_computes():
    study = (ROOT / "docs" / "ppo-in-chatgpt.md").read_text(encoding="utf-8").replace("−", "-")
    rows = [line.strip("| ").split(" | ") for line in study.splitlines() if re.match(r"\| [012] \|", line)]
    assert len(rows) == 3

    def column(place):
        return torch.tensor([[float(row[place].split("=")[-1]) for row in rows]])

    logprobs, ref_logprobs, kl, rewards, values = (column(place) for place in range(1, 6))
    mask, last = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[False, False, True]])
    torch.testing.assert_close(approx_kl(logprobs, ref_logprobs, "k1"), kl)
    torch.testing.assert_close(kl_shaped_rewards(torch.ones(1), kl, mask, kl_coef=0.1), rewards)
    found = gae(rewards, torch.cat([values, torch.zeros(1, 1)], 1), last, last, gamma=1.0, lam=0.95)
    for place, expected in zip((7, 8), found, strict=True):
        torch.testing.assert_close(column(place), expected, atol=6e-4, rtol=0)
