"""One process at a time writes into a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from ppo_rlhf.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]


def lock(folder: Path) -> IO[str]:
    """Takes the folder until the file that is returned is closed, or the process ends in whatever way.

    Raises UserError for a folder that another process writes into.
    """
    file = (folder / ".lock").open("a", encoding="utf-8")
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(
                f"another process is writing into {folder}; wait for its end, or give another --output-dir."
            ) from None
    return file
