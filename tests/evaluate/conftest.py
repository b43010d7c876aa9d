"""Tiny models and data, made once a session."""

from tiny_runs import data, in_tmp_path, models

__all__ = ["data", "in_tmp_path", "models"]
