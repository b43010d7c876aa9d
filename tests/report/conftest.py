"""Tiny models and data, a browser, and a small PPO run whose report is looked into."""

from browsers import browser
from report_cases import trained
from tiny_runs import data, in_tmp_path, models

__all__ = ["browser", "data", "in_tmp_path", "models", "trained"]
