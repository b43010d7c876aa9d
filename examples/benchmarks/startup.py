"""Times `--help` of every command, least of five: python examples/benchmarks/startup.py"""

from __future__ import annotations

import itertools
import resource
import subprocess
import sys

from ppo_rlhf.cli import COMMANDS

WORDS = ((), *((command,) for command in COMMANDS))


def seconds(*words: str) -> float:
    """Least process CPU seconds of five times `ppo-rlhf WORDS --help`, which other work on the machine raises least."""
    times = [cpu_seconds_of_children()]
    for _ in range(5):
        subprocess.run([sys.executable, "-m", "ppo_rlhf", *words, "--help"], check=True, stdout=subprocess.DEVNULL)
        times.append(cpu_seconds_of_children())
    return min(after - before for before, after in itertools.pairwise(times))


def cpu_seconds_of_children() -> float:
    """Of those that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    for words in WORDS:
        print(f"ppo-rlhf {' '.join((*words, '--help')):18} {seconds(*words):.2f} s")


if __name__ == "__main__":
    main()
