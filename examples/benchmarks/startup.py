"""Times `--help` of every command, median of five: python examples/benchmarks/startup.py"""

from __future__ import annotations

import itertools
import resource
import statistics
import subprocess
import sys

from ppo_rlhf.cli import COMMANDS

WORDS = ((), *((command,) for command in COMMANDS))


def seconds(*words: str) -> float:
    """Median process CPU seconds of `ppo-rlhf WORDS --help`: alone on a machine as long as it takes."""
    times = [cpu_seconds_of_children()]
    for _ in range(5):
        subprocess.run([sys.executable, "-m", "ppo_rlhf", *words, "--help"], check=True, stdout=subprocess.DEVNULL)
        times.append(cpu_seconds_of_children())
    return statistics.median(after - before for before, after in itertools.pairwise(times))


def cpu_seconds_of_children() -> float:
    """Of those that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    for words in WORDS:
        print(f"ppo-rlhf {' '.join((*words, '--help')):18} {seconds(*words):.2f} s")


if __name__ == "__main__":
    main()
