"""Learning curves: what is a group of seeds, what is its interval, and what is written."""

import csv
import json
from pathlib import Path

import numpy as np
import yaml
from command_cases import answer, in_tmp_path
from matplotlib.colors import to_hex

from classic.plot import COLOURS, draw, read_curve, smoothed

__all__ = ["in_tmp_path"]


def write_run(folder, returns, *, env_id="Some-v0", algorithm="clip", seed=0, **settings):
    """A run folder with one return a thousand steps; None where no episode ended."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    config = {"env_id": env_id, "algorithm": algorithm, "seed": seed, "gamma": 0.99, **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [
        {"step": index, "steps": 1000 * index, **({} if value is None else {"episode/return": value})}
        for index, value in enumerate(returns, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def curves_of(*folders):
    return [read_curve(folder, "episode/return", "steps") for folder in folders]


def panels_of(curves, **more):
    figure = draw(curves, **{"metric": "episode/return", "x": "steps", "smooth": 1, **more})
    return [panel for panel in figure.axes if panel.get_visible()]


def lines_of(panel):
    return {line.get_label(): line for line in panel.lines if not line.get_label().startswith("_")}


def test_smoothing_is_the_mean_of_the_latest_points_and_of_fewer_at_the_start():
    assert smoothed(np.array([4.0, 2.0, 6.0, 1.0]), 2).tolist() == [4.0, 3.0, 4.0, 3.5]
    assert smoothed(np.array([4.0, 2.0, 6.0]), 1).tolist() == [4.0, 2.0, 6.0]


def test_runs_that_differ_in_their_seed_alone_are_one_line_the_mean_in_a_band():
    curves = curves_of(write_run("a", [1, 2, 3], seed=0), write_run("b", [3, 4, 8], seed=1, output_dir="b"))
    (panel,) = panels_of(curves)
    (label, line), *others = lines_of(panel).items()
    assert not others
    assert label == "clip (2 seeds)"
    assert line.get_xydata().tolist() == [[1000, 2], [2000, 3], [3000, 5.5]]
    assert len(panel.collections) == 1
    assert "95 % t interval" in panel.figure.get_supxlabel()


def test_runs_that_differ_in_a_setting_are_never_averaged():
    curves = curves_of(write_run("a", [1, 2]), write_run("b", [3, 4], seed=1, gamma=0.9))
    (panel,) = panels_of(curves)
    assert set(lines_of(panel)) == {"clip, gamma 0.99", "clip, gamma 0.9"}
    assert not panel.collections


def test_runs_that_differ_in_many_settings_are_called_by_their_folders():
    more = {"seed": 1, "gamma": 0.9, "network": {"activation": "relu"}, "horizon": 8}
    (panel,) = panels_of(curves_of(write_run("a", [1, 2]), write_run("b", [3, 4], **more)))
    assert set(lines_of(panel)) == {"clip, a", "clip, b"}


def test_a_setting_that_one_run_lacks_tells_it_apart():
    (panel,) = panels_of(curves_of(write_run("a", [1, 2]), write_run("b", [3, 4], ppo={"clip_range": 0.1})))
    assert set(lines_of(panel)) == {"clip, clip_range None", "clip, clip_range 0.1"}


def test_eight_lines_are_told_apart_in_colour_or_style():
    curves = curves_of(*(write_run(f"run-{i}", [1, 2], algorithm=f"kind-{i}") for i in range(8)))
    (panel,) = panels_of(curves)
    assert len({(line.get_color(), str(line.get_linestyle())) for line in panel.lines}) == 8


def test_each_environment_has_its_panel_and_each_algorithm_its_colour():
    curves = curves_of(
        write_run("a", [1, 2], algorithm="clip"),
        write_run("b", [3, 4], algorithm="trpo"),
        write_run("c", [5, 6], env_id="Other-v0"),
    )
    panels = panels_of(curves)
    assert [panel.get_title(loc="left") for panel in panels] == ["Some-v0", "Other-v0"]
    assert {name: to_hex(line.get_color()).upper() for name, line in lines_of(panels[0]).items()} == {
        "clip": COLOURS[0],
        "trpo": COLOURS[1],
    }
    assert all(panel.get_xlabel() == "environment steps" and panel.get_ylabel() for panel in panels)


def test_steps_at_which_no_episode_ended_are_bridged_and_nothing_is_extrapolated():
    curves = curves_of(write_run("a", [None, 2, None, 6]), write_run("b", [0, 0, 0, 0, 0], seed=1))
    (line,) = lines_of(panels_of(curves)[0]).values()
    assert line.get_xydata().tolist() == [[2000, 1], [3000, 2], [4000, 3]]


def test_a_smoothed_single_run_keeps_its_raw_points_in_sight():
    (panel,) = panels_of(curves_of(write_run("a", [1, 9, 2])), smooth=2)
    assert [line.get_ydata().tolist() for line in panel.lines] == [[1, 9, 2], [1, 5, 5.5]]
    low, high = panel.get_ylim()
    assert low < 1
    assert high > 9


def test_a_line_that_a_crash_cut_off_is_left_out():
    folder = write_run("a", [1, 2])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "ste')
    assert curves_of(folder)[0].y.tolist() == [1, 2]


def test_plot_writes_png_svg_and_the_raw_numbers_and_says_so(capfd):
    write_run("a", [1.5, 2])
    write_run("b", [3, 4], seed=1)
    paths = answer(capfd, "plot", "a", "b", "--output", "curve.png")
    assert paths == {"png": "curve.png", "svg": "curve.svg", "csv": "curve.csv"}
    assert Path("curve.png").read_bytes().startswith(b"\x89PNG")
    svg = Path("curve.svg").read_text()
    assert "Some-v0" in svg
    assert "episode return" in svg
    rows = list(csv.DictReader(Path("curve.csv").read_text().splitlines()))
    assert [(row["run"], row["seed"], row["steps"], float(row["episode/return"])) for row in rows] == [
        ("a", "0", "1000", 1.5),
        ("a", "0", "2000", 2.0),
        ("b", "1", "1000", 3.0),
        ("b", "1", "2000", 4.0),
    ]


def test_one_run_is_drawn_into_its_folder_and_several_where_one_stands(capfd):
    write_run("a", [1, 2])
    write_run("b", [3, 4], seed=1)
    assert answer(capfd, "plot", "a")["png"] == "a/learning_curve.png"
    assert answer(capfd, "plot", "a", "b")["png"] == "learning_curves.png"


def test_the_same_runs_give_the_same_svg(capfd):
    write_run("a", [1, 2])
    for name in ("one", "two"):
        answer(capfd, "plot", "a", "--output", f"{name}.svg")
    assert Path("one.svg").read_bytes() == Path("two.svg").read_bytes()


def test_any_metric_can_be_drawn_over_any_other(capfd):
    write_run("a", [1, 2])
    answer(capfd, "plot", "a", "--metric", "steps", "--x", "step", "--output", "curve.png")
    assert Path("curve.csv").read_text().splitlines()[0].endswith("step,steps")
