"""A leaf: reads the folders of runs and studies, writes one self-contained report.html."""

from ppo_rlhf.report.outcome import outcome_lines
from ppo_rlhf.report.page import write_report
from ppo_rlhf.report.study import write_study

__all__ = ["outcome_lines", "write_report", "write_study"]
