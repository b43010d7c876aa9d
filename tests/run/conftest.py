"""The fixtures and helpers of tests/stages."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))

from tiny_runs import data, in_tmp_path, models, one_thread

__all__ = ["data", "in_tmp_path", "models", "one_thread"]
