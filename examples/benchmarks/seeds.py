"""Runs a pipeline over several seeds and prints its outcomes as a Markdown table, with the largest peak memory.

    python examples/benchmarks/seeds.py demo --seeds 0 1 2 3 4 --output-dir runs/demo-seeds
    python examples/benchmarks/seeds.py pipeline --config examples/configs/rt_polarity/pipeline.yaml --seeds 0 1 2 \
        --output-dir runs/rt-seeds

A seed whose folder holds a finished run is not run again. One that fails is left out of the table, and the exit code
is 1.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path


def shown(number: float | None, digits: str) -> str:
    """The number; a dash for one that was not finite, which a summary holds as null, or is not there."""
    return "–" if number is None else format(number, digits)


def change(outcome: dict[str, float | None], name: str, digits: str) -> str:
    """A number before and after PPO."""
    return f"{shown(outcome.get(f'{name}_before'), digits)} → {shown(outcome.get(f'{name}_after'), digits)}"


COLUMNS = {
    "pairwise accuracy": lambda s: shown(s["reward"]["pairwise_accuracy"], ".3f"),
    "calibration error": lambda s: shown(s["reward"]["calibration_error"], ".3f"),
    "score": lambda s: change(s["ppo"], "score", ".2f"),
    "gold": lambda s: change(s["ppo"], "gold_score", ".2f"),
    "gold std before": lambda s: shown(s["ppo"].get("gold_score_std_before"), ".2f"),
    "KL, nats": lambda s: shown(s["ppo"]["kl"], ".1f"),
    "stop rate": lambda s: shown(s["ppo"]["stop_rate"], ".3f"),
    "length": lambda s: change(s["ppo"], "length", ".1f"),
    "distinct-2": lambda s: change(s["ppo"], "distinct_2", ".3f"),
    "annotators differ": lambda s: shown(s.get("comparisons", {}).get("disagreement"), ".3f"),
    "seconds": lambda s: " + ".join(f"{s['seconds'][name]:.0f}" for name in ("sft", "reward", "ppo")),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("demo", "pipeline"))
    parser.add_argument("--config", help="the pipeline's YAML file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output-dir", required=True)
    arguments = parser.parse_args()

    config = ["--config", arguments.config] if arguments.config else []
    summaries = {}
    for seed in arguments.seeds:
        folder = Path(arguments.output_dir) / f"seed-{seed}"
        options = ["--seed", str(seed), "--output-dir", str(folder), "--resume"]
        done = subprocess.run([sys.executable, "-m", "ppo_rlhf", arguments.command, *config, *options], check=False)
        if done.returncode == 0:
            summaries[seed] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))

    print("| seed | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for seed, summary in summaries.items():
        print(f"| {seed} | " + " | ".join(column(summary) for column in COLUMNS.values()) + " |")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"\npeak memory of a run: {peak:.2f} GiB")
    return 0 if len(summaries) == len(arguments.seeds) else 1


if __name__ == "__main__":
    sys.exit(main())
