"""What the two tutorial examples share: train with a preset, and draw the return curve with its moving average."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from classic import Policy, train
from classic.config import TrainConfig
from classic.evaluate import Evaluator

WINDOW = 9  # rollouts of the moving average, as in the tutorial


def train_and_draw(preset: TrainConfig, *, seed: int, output: Path) -> float:
    """Trains with the preset, draws the curve to `output`; → the final policy's mean return over 100 fresh episodes."""
    episodes: list[float] = []
    returns: list[float] = []

    def note(_: int, metrics: Mapping[str, float]) -> None:
        if "episode/return" in metrics:
            episodes.append((episodes[-1] if episodes else 0) + metrics["episodes"])
            returns.append(metrics["episode/return"])

    policy: Policy = train(preset.env_id, config=preset, seed=seed, callbacks=[note])
    evaluator = Evaluator(preset.env_id, episodes=100, seed=seed + 1, settings=preset.environment)
    final = evaluator(policy).metrics["eval/return"]
    evaluator.close()

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(episodes, returns, color="#9ecae1", label="mean of each rollout's episodes")
    axes.plot(episodes, moving_average(np.array(returns)), color="#08519c", label=f"moving average of {WINDOW}")
    axes.set(xlabel="episodes", ylabel="return", title=f"PPO on {preset.env_id}: {final:.0f} over 100 fresh episodes")
    axes.legend(loc="upper left")
    figure.savefig(output, dpi=150)
    print(f"{preset.env_id}: {int(episodes[-1])} episodes, final return {final:.1f}, curve in {output}")
    return final


def moving_average(values: np.ndarray) -> np.ndarray:
    """The mean of up to WINDOW values around each one; shorter windows at both ends."""
    half = WINDOW // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def options(description: str | None, tutorial: str, output: str) -> argparse.Namespace:
    """The command line of an example."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tutorial", action="store_true", help=f"the tutorial's hyper-parameters (preset {tutorial})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(output), help="where the curve is drawn, PNG, PDF or SVG")
    return parser.parse_args()
