"""The report: the outcome in numbers, the curves, and samples before and after."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ppo_rlhf.errors import UserError

STAGES = ("sft", "reward", "ppo")
CURVES = {
    "loss": "training loss",
    "eval/loss": "held-out loss",
    "eval/accuracy": "held-out accuracy",
    "eval/gold_accuracy": "held-out accuracy against gold",
    "objective/score": "score",
    "objective/gold_score": "gold score",
    "objective/kl": "KL to the reference, nats a response",
    "objective/entropy": "entropy, nats a token",
    "policy/clip_fraction": "clip fraction",
    "policy/approx_kl": "KL(old‖new), nats a token",
    "value/explained_variance": "explained variance",
    "response/length": "response length, tokens",
    "response/stop_rate": "stop rate",
    "kl_coef": "KL coefficient",
}


def write_report(folder: Path) -> Path:
    """report.html for a run's folder, or a pipeline's; → its path. Raises UserError for a folder that holds no run."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}.")
    stages = [name for name in STAGES if (folder / name / "metrics.jsonl").exists()]
    places = [(name, folder / name) for name in stages] or [(folder.name, folder)]
    if not (places[0][1] / "metrics.jsonl").exists():
        raise UserError(f"{folder} holds no run: it has no metrics.jsonl.")
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape())
    page = environment.get_template("page.html").render(
        title=folder.name,
        outcome=outcome_lines(folder),
        sections=[{"name": name, "curves": curves_of(path), "samples": samples_of(path)} for name, path in places],
        config=(folder / "config.yaml").read_text(encoding="utf-8") if (folder / "config.yaml").exists() else "",
    )
    target = folder / "report.html"
    target.write_text(page, encoding="utf-8")
    return target


def outcome_lines(folder: Path) -> list[str]:
    """The outcome of a finished run in a few lines; empty while it is not finished."""
    path = folder / "summary.json"
    if not path.exists():
        return []
    summary = json.loads(path.read_text(encoding="utf-8"))
    stages = {name: summary[name] for name in STAGES if isinstance(summary.get(name), dict)}
    if not stages:
        stages = {_stage_of(folder): summary}
    seconds = summary["seconds"] if isinstance(summary["seconds"], dict) else {_stage_of(folder): summary["seconds"]}
    return [_line(name, numbers) + f"  ({seconds[name]:.0f} s)" for name, numbers in stages.items()]


def _line(stage: str, numbers: dict[str, Any]) -> str:
    def shown(name: str, digits: str) -> str:
        return _shown(numbers[name], digits)

    if stage == "sft":
        return f"sft:    held-out loss {shown('loss_before', '.3f')} → {shown('loss_after', '.3f')} nats a token"
    if stage == "reward":
        return (
            f"reward: held-out pairs ordered right {shown('pairwise_accuracy', '.1%')}, "
            f"calibration error {shown('calibration_error', '.3f')}"
        )
    gold = ""
    if "gold_score_before" in numbers:
        gold = f", gold score {shown('gold_score_before', '.2f')} → {shown('gold_score_after', '.2f')}"
    return (
        f"ppo:    score {shown('score_before', '.2f')} → {shown('score_after', '.2f')}{gold}, "
        f"KL {shown('kl', '.1f')} nats a response, stop rate {shown('stop_rate', '.1%')}"
    )


def _shown(number: float | None, digits: str) -> str:
    """The number, or what stands for one that was not finite, which the run folder holds as null."""
    return "not finite" if number is None else format(number, digits)


def _stage_of(folder: Path) -> str:
    return json.loads((folder / "environment.json").read_text(encoding="utf-8"))["stage"]


def curves_of(folder: Path) -> list[str]:
    """An SVG picture for each metric of the run that has a curve; held-out values of a metric as dots beside it."""
    rows = _lines(folder / "metrics.jsonl")
    pictures = []
    for name, label in CURVES.items():
        points = _points(rows, name)
        held_out = _points(rows, name.replace("objective/", "eval/"))
        if len(points) > 1:
            pictures.append(_picture(label, points, held_out if name.startswith("objective/") else []))
    return pictures


def _points(rows: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """Steps and values of a metric; a value that was not finite leaves a gap."""
    return [(row["step"], math.nan if row[name] is None else row[name]) for row in rows if name in row]


def _picture(label: str, points: list[tuple[float, float]], held_out: list[tuple[float, float]]) -> str:
    figure = Figure(figsize=(4, 2.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), linewidth=1.2, marker="o" if len(points) < 30 else "", markersize=3)
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o", markersize=4, label="held-out")
        axes.legend(frameon=False, fontsize=8)
    axes.set_title(label, fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def samples_of(folder: Path) -> list[list[tuple[str, str, str]]]:
    """A row for each held-out sample, as it was before and after the run: cells of (heading, text, numbers)."""
    rows = [row for row in _lines(folder / "samples.jsonl") if row["kind"] == "held-out"]
    if not rows:
        return []
    before, after = ([row for row in rows if row["step"] == step] for step in (rows[0]["step"], rows[-1]["step"]))
    return [_cells(*sides) for sides in zip(before, after, strict=False)]  # a run cut short may have written fewer


def _cells(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str]]:
    prompt = ("prompt", before["prompt"], "")
    if "chosen" in before:
        return [
            prompt,
            *(
                (side, before[side], f"score {_shown(before[score], '.2f')} → {_shown(after[score], '.2f')}")
                for side, score in (("chosen", "chosen_score"), ("rejected", "rejected_score"))
            ),
        ]
    demonstration = [("demonstration", before["demonstration"], "")] if "demonstration" in before else []
    sides = [(when, row["response"], _numbers_of(row)) for when, row in (("before", before), ("after", after))]
    return [prompt, *demonstration, *sides]


def _numbers_of(response: dict[str, Any]) -> str:
    numbers = [
        f"{label} {_shown(response[name], digits)}{unit}"
        for name, label, digits, unit in (
            ("score", "score", ".2f", ""),
            ("gold_score", "gold", ".2f", ""),
            ("kl", "KL", ".1f", " nats"),
        )
        if name in response
    ]
    return ", ".join(numbers if response["finished"] else [*numbers, "cut off"])


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
