"""A leaf: reads a run's folder, writes one self-contained report.html into it."""

from ppo_rlhf.report.page import outcome_lines, write_report

__all__ = ["outcome_lines", "write_report"]
