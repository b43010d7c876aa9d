"""The report: the outcome in numbers, the curves, and samples before and after."""

from __future__ import annotations

import io
import json
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
    if stage == "sft":
        return f"sft:    held-out loss {numbers['loss_before']:.3f} → {numbers['loss_after']:.3f} nats a token"
    if stage == "reward":
        return (
            f"reward: held-out pairs ordered right {numbers['pairwise_accuracy']:.1%}, "
            f"calibration error {numbers['calibration_error']:.3f}"
        )
    gold = ""
    if "gold_score_before" in numbers:
        gold = f", gold score {numbers['gold_score_before']:.2f} → {numbers['gold_score_after']:.2f}"
    return (
        f"ppo:    score {numbers['score_before']:.2f} → {numbers['score_after']:.2f}{gold}, "
        f"KL {numbers['kl']:.1f} nats a response, stop rate {numbers['stop_rate']:.1%}"
    )


def _stage_of(folder: Path) -> str:
    return json.loads((folder / "environment.json").read_text(encoding="utf-8"))["stage"]


def curves_of(folder: Path) -> list[str]:
    """An SVG picture for each metric of the run that has a curve; held-out values of a metric as dots beside it."""
    rows = _lines(folder / "metrics.jsonl")
    pictures = []
    for name, label in CURVES.items():
        points = [(row["step"], row[name]) for row in rows if name in row]
        held_out = [(row["step"], row[twin]) for row in rows if (twin := name.replace("objective/", "eval/")) in row]
        if len(points) > 1:
            pictures.append(_picture(label, points, held_out if name.startswith("objective/") else []))
    return pictures


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


def samples_of(folder: Path) -> list[dict[str, Any]]:
    """Each held-out prompt with its response before and after the run."""
    rows = [row for row in _lines(folder / "samples.jsonl") if row["kind"] == "held-out"]
    if not rows:
        return []
    first, last = min(row["step"] for row in rows), max(row["step"] for row in rows)
    before = {row["prompt"]: row for row in rows if row["step"] == first}
    after = {row["prompt"]: row for row in rows if row["step"] == last}
    return [
        {"prompt": prompt, "before": before[prompt], "after": after[prompt]} for prompt in before if prompt in after
    ]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
