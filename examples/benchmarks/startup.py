"""Times `--help` of every command, median of five: python examples/benchmarks/startup.py"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from ppo_rlhf.cli import COMMANDS


def seconds(*words: str) -> float:
    """Median wall seconds of `ppo-rlhf WORDS --help`."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "ppo_rlhf", *words, "--help"], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    for words in ((), *((command,) for command in COMMANDS)):
        print(f"ppo-rlhf {' '.join((*words, '--help')):18} {seconds(*words):.2f} s")


if __name__ == "__main__":
    main()
