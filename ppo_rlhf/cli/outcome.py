"""What a command comes to."""

from typing import Any

Outcome = tuple[dict[str, Any], list[str]]  # a summary for programs, and what to tell of it
