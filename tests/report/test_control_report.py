"""The report of control runs: curves over seeds and algorithms, and pictures of the policy in a real browser."""

import json
import shutil
from pathlib import Path

import pytest
from browsers import assert_accessible, page_of

from classic import cli as classic
from ppo_rlhf.cli import main
from ppo_rlhf.records import records_of
from ppo_rlhf.report import control, write_report
from ppo_rlhf.report.groups import groups_of

TINY = "--num-envs 4 --horizon 16 --num-steps 256 --network.hidden-sizes [16] --ppo.num-epochs 1 --eval-episodes 2"


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Finished tiny runs by name; not to be changed."""
    folder = tmp_path_factory.mktemp("control")
    plans = {
        "cartpole-0": "CartPole-v1 --seed 0 --eval-every 128",
        "cartpole-1": "CartPole-v1 --seed 1",
        "penalty": "CartPole-v1 --algorithm penalty",
        "pendulum": "Pendulum-v1",
    }
    for name, words in plans.items():
        arguments = ["train", *words.split(), *TINY.split(), "--log-with", "[]", "--output-dir", str(folder / name)]
        assert classic.main(arguments) == 0
    return folder


def address_of(*folders):
    return write_report(list(folders), Path("report.html"), findings=[]).absolute().as_uri()


def groups_in(*folders):
    return groups_of([record for folder in folders for record in records_of(folder)])


def rewrite(folder, name, change):
    """Changes each line of a file of the run."""
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    (folder / name).write_text("".join(json.dumps(change(row)) + "\n" for row in rows))


# --- curves -----------------------------------------------------------------------------------------------------------


def test_seeds_are_one_line_in_a_band_and_algorithms_lines_of_their_own(runs, tmp_path):
    seeds = [shutil.copytree(runs / f"cartpole-{seed}", tmp_path / str(seed)) for seed in (0, 1)]
    for seed, folder in enumerate(seeds):
        rewrite(folder, "metrics.jsonl", lambda row, seed=seed: {**row, "episode/return": row["step"] * (1 + 2 * seed)})
    groups = groups_in(*seeds, runs / "penalty")
    assert [(group.name, len(group.records)) for group in groups] == [("clip", 2), ("penalty", 1)]
    chart = control.charts_of(groups)[0]
    clip = chart.series[0]
    assert (clip.x, clip.y) == ([64, 128, 192, 256], [2, 4, 6, 8])  # the mean of n and 3n
    assert (clip.low, clip.high) == ([1, 2, 3, 4], [3, 6, 9, 12])


def test_seeds_whose_episodes_ended_at_other_steps_share_no_more_than_was_measured(runs, tmp_path):
    seeds = [shutil.copytree(runs / f"cartpole-{seed}", tmp_path / str(seed)) for seed in (0, 1)]
    kept = [(1, 3), (2, 3, 4)]  # updates in which episodes ended
    for folder, steps in zip(seeds, kept, strict=True):

        def change(row, steps=steps):
            row.pop("episode/return", None)
            return {**row, **({"episode/return": 10.0 * row["step"]} if row["step"] in steps else {})}

        rewrite(folder, "metrics.jsonl", change)
    line = control.charts_of(groups_in(*seeds))[0].series[0]
    assert (line.x, line.y) == ([128, 192], [20, 30])


def test_the_return_has_evaluations_and_the_solved_level_and_only_penalties_have_a_coefficient(runs):
    charts = {chart.title: chart for chart in control.charts_of(groups_in(runs / "cartpole-0"))}
    record = records_of(runs / "cartpole-0")[0]
    styles = {(each.name, each.style): each for each in charts["Return"].series}
    dots = styles["clip", "dots"]
    evaluated = [(row["steps"], row["eval/return"]) for row in record.rows if "eval/return" in row]
    assert list(zip(dots.x, dots.y, strict=True)) == [(0, record.summary["return_before"]), *evaluated]
    assert styles["solved: 475", "line"].y == [475, 475]
    assert "KL penalty’s coefficient β" not in charts
    penalties = {chart.title: chart for chart in control.charts_of(groups_in(runs / "penalty"))}
    assert "KL penalty’s coefficient β" in penalties
    assert penalties["KL(old‖new) of an update"].series[-1].name == "penalty.kl_target: 0.01"


def test_a_number_that_was_not_finite_is_a_gap(runs, tmp_path):
    folder = shutil.copytree(runs / "pendulum", tmp_path / "run")
    rewrite(folder, "metrics.jsonl", lambda row: {**row, "loss/value": None if row["step"] == 2 else 1.0})
    charts = {chart.title: chart for chart in control.charts_of(groups_in(folder))}
    assert str(charts["Value loss"].series[0].y) == "[1.0, nan, 1.0, 1.0]"


def test_the_outcome_is_a_sentence(runs, tmp_path):
    folders = [shutil.copytree(runs / f"cartpole-{seed}", tmp_path / str(seed)) for seed in (0, 1)]
    told = {"return_before": 20.0, "steps": 256, "seconds": 2.0, "return_std_after": 5.0, "return_solved": 475.0}
    for folder, after in zip(folders, (470, 490), strict=True):
        (folder / "summary.json").write_text(json.dumps({**told, "return_after": after}))
    (both,), (one,) = groups_in(*folders), groups_in(folders[0])
    start = "clip took CartPole-v1 from a mean return of 20.0 to"
    took = "in 256 steps and 2 seconds"
    assert control.sentence_of(both) == f"{start} 480.0 ± 14.1 over 2 seeds, {took}: solved, which takes 475."
    assert control.sentence_of(one) == f"{start} 470.0 ± 5.0 over episodes, {took}: not solved yet, which takes 475."
    (folders[0] / "summary.json").unlink()
    (one,) = groups_in(folders[0])
    assert control.sentence_of(one) == (
        "The run on CartPole-v1 has not finished: this is what it wrote up to step 256."
    )


# --- what the command takes -------------------------------------------------------------------------------------------


def test_a_comparison_s_folder_is_all_its_runs(capfd):
    words = "compare CartPole-v1 --algorithms clip trpo --seeds 0 1 --num-steps 1 --eval-episodes 2"
    assert classic.main([*words.split(), "--output-dir", "all"]) == 0
    assert main(["report", "all"]) == 0
    groups = groups_in(Path("all"))
    assert [(group.stage, group.name, len(group.records)) for group in groups] == [
        ("CartPole-v1", "clip", 2),
        ("CartPole-v1", "trpo", 2),
    ]
    assert Path("all/report.html").stat().st_size < 5_000_000


@pytest.mark.parametrize("lost", ["policy_pictures.jsonl", "summary.json"])
def test_a_run_that_lacks_a_file_is_reported_all_the_same(runs, browser, tmp_path, lost):
    folder = shutil.copytree(runs / "cartpole-0", tmp_path / "run")
    (folder / lost).unlink()
    with page_of(browser, address_of(folder)) as page:
        assert page.locator(".field").count() == (0 if lost == "policy_pictures.jsonl" else 4)


def test_a_picture_that_a_crash_cut_off_and_numbers_that_are_not_finite_are_passed_over(runs, browser, tmp_path):
    folder = shutil.copytree(runs / "cartpole-0", tmp_path / "run")

    def spoil(picture):
        picture["planes"][0]["quantities"][1]["numbers"] = [[None] * 41] * 41
        return picture

    rewrite(folder, "policy_pictures.jsonl", spoil)
    with (folder / "policy_pictures.jsonl").open("a") as file:
        file.write('{"step": 9, "pla')
    with page_of(browser, address_of(folder)) as page:
        assert page.locator(".field").count() == 4
        page.locator(".field canvas").nth(1).focus()
        page.keyboard.press("ArrowUp")
        assert page.locator(".field output").nth(1).inner_text().endswith("value not finite")


def test_control_and_language_runs_share_a_page(runs, tmp_path):
    language = tmp_path / "sft"
    language.mkdir()
    (language / "config.yaml").write_text("seed: 0\n")
    (language / "environment.json").write_text('{"stage": "sft"}')
    (language / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    page = write_report([runs / "pendulum", language], Path("report.html"), findings=[]).read_text()
    assert page.index(">Supervised fine-tuning</h3>") < page.index(">Pendulum-v1</h3>", page.index('id="curves"'))


# --- the pictures in a browser ----------------------------------------------------------------------------------------


def test_the_slider_shows_the_policy_over_time_and_figures_tell_their_numbers(runs, browser):
    pictures = records_of(runs / "pendulum")[0].pictures
    with page_of(browser, address_of(runs / "pendulum")) as page:
        canvas, reading = page.locator(".field canvas").first, page.locator(".field output").first
        assert page.inner_text(".policies .slider output") == "after 256 steps"
        final = canvas.screenshot()
        page.locator(".policies input").fill("0")
        assert page.inner_text(".policies .slider output") == "before training"
        assert canvas.screenshot() != final
        canvas.focus()
        page.keyboard.press("ArrowRight")  # from the middle, 20 of 0 to 40
        for _ in range(3):
            page.keyboard.press("ArrowDown")
        number = pictures[0]["planes"][0]["quantities"][0]["numbers"][17][21]
        shown = reading.inner_text().replace("−", "-")
        assert shown.startswith("angle 0.157 rad, angular velocity -1.2 rad/s: torque ")
        assert float(shown.split()[-3]) == pytest.approx(number, rel=1e-2, abs=1e-3)
        box = canvas.bounding_box()
        page.mouse.move(box["x"] + box["width"] - 1, box["y"] + 1)
        assert reading.inner_text().startswith("angle 3.14 rad, angular velocity 8 rad/s: torque")
        page.mouse.move(0, 0)
        assert reading.inner_text() == ""


def test_the_training_and_the_episodes_play_and_stop(runs, browser):
    with page_of(browser, address_of(runs / "cartpole-0", runs / "penalty")) as page:
        learn, act = (
            page.get_by_role("button", name="Play the training"),
            page.get_by_role("button", name="Play the ep"),
        )
        learn.click()
        page.wait_for_function("document.querySelector('.policies .slider output').textContent == 'after 64 steps'")
        assert learn.get_attribute("aria-pressed") == "true"
        act.click()
        assert learn.get_attribute("aria-pressed") == "false"
        page.wait_for_selector(".act[aria-pressed=false]")  # at the end of the longest
        page.locator(".policies select").select_option("penalty")
        assert page.inner_text(".policies .slider output") == "after 256 steps"
        page.get_by_role("checkbox", name="solved: 475").uncheck()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_and_nothing_scrolls_sideways(runs, browser, scheme):
    address = address_of(*(runs / name for name in ("cartpole-0", "cartpole-1", "penalty", "pendulum")))
    with page_of(browser, address, color_scheme=scheme) as page:
        page.wait_for_selector(".field canvas")
        for width in (360, 768, 1600):
            page.set_viewport_size({"width": width, "height": 900})
            assert_accessible(page)
