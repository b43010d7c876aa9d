"""Servers, a browser, databases, tiny models."""

from browsers import browser
from databases import address, postgres
from servers import serve
from tiny_runs import data, in_tmp_path, models

__all__ = ["address", "browser", "data", "in_tmp_path", "models", "postgres", "serve"]
