"""A leaf: reads the folders of runs, writes one self-contained report.html."""

from ppo_rlhf.report.outcome import outcome_lines
from ppo_rlhf.report.page import write_report

__all__ = ["outcome_lines", "write_report"]
