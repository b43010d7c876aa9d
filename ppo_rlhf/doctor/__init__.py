"""The doctor: named checks over a run's files, each with cause and remedy. A leaf, which reads and never writes."""

from ppo_rlhf.doctor.checks import CHECKS, Check, Finding, examine
from ppo_rlhf.doctor.show import lines_of, show, watch

__all__ = ["CHECKS", "Check", "Finding", "examine", "lines_of", "show", "watch"]
