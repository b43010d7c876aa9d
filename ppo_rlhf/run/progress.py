"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SHOWN = {
    "loss": "loss",
    "eval/loss": "held-out loss",
    "eval/accuracy": "held-out accuracy",
    "objective/score": "score",
    "objective/gold_score": "gold",
    "objective/kl": "KL",
    "response/length": "length",
    "tokens_per_second": "tokens/s",
    "throughput/matmul_share": "of peak",
    "episode/return": "return",
    "eval/return": "evaluated",
    "steps_per_second": "steps/s",
}


class StepProgress:
    """Shows completed steps with their main metrics."""

    def __init__(self, title: str, num_steps: int, *, enabled: bool) -> None:
        """Plain lines come about twenty times a run."""
        self.title = title
        self.num_steps = num_steps
        self.enabled = enabled
        self.every = max(1, num_steps // 20)
        self.latest: dict[str, float] = {}  # of metrics that not every step has
        self.console = Console(stderr=True, highlight=False)
        self.bar: Progress | None = None
        if enabled and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
                console=self.console,
            )
            self.bar.start()
            self.task = self.bar.add_task(title, total=num_steps, metrics="")

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tells of a completed step."""
        self.latest |= {name: metrics[name] for name in SHOWN if name in metrics}
        labelled = {label: self.latest[name] for name, label in SHOWN.items() if name in self.latest}
        shown = "  ".join(f"{label} {_short(value)}" for label, value in labelled.items())
        if self.bar is not None:
            self.bar.update(self.task, completed=step, metrics=shown)
        elif self.enabled and (step % self.every == 0 or step == self.num_steps):
            self.console.print(f"{self.title} {step}/{self.num_steps}  {shown}", soft_wrap=True)

    def tell(self, message: str) -> None:
        """A line that stays."""
        if self.enabled:
            self.console.print(message, soft_wrap=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()


def _short(number: float) -> str:
    """Three digits, and all those before the point."""
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"
