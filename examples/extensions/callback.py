"""The course of a run as a table for a spreadsheet.

    callbacks:
      - {name: "examples/extensions/callback.py:Table", arguments: {path: course.csv}}

A class is made once, with its arguments, and called after each step.
"""

import csv
from pathlib import Path

from ppo_rlhf.run import is_main_process

COLUMNS = ["objective/score", "objective/kl", "response/length"]


class Table:
    def __init__(self, path):
        self.path = Path(path)

    def __call__(self, step, metrics):
        if not is_main_process():
            return
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(["step", *COLUMNS])
            writer.writerow([step, *(metrics[name] for name in COLUMNS)])
