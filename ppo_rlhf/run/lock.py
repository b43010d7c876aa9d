"""One process at a time writes into a run folder."""

from __future__ import annotations

import os
from pathlib import Path

from ppo_rlhf.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]


def lock(folder: Path) -> int | None:
    """Takes the folder itself, until the descriptor that is returned is closed or the process ends in whatever way.

    None where the system has no such locks. Raises UserError for a folder that another process writes into.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"another process is writing into {folder}; wait for its end, or give another --output-dir."
        ) from None
    except OSError:  # a network disk without locks
        os.close(descriptor)
        return None
    return descriptor
