"""Servers, a browser, databases, tiny models."""

from databases import address, postgres
from label_cases import browser, serve
from tiny_runs import data, in_tmp_path, models

__all__ = ["address", "browser", "data", "in_tmp_path", "models", "postgres", "serve"]
