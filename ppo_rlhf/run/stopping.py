"""Ctrl-C and SIGTERM during a run: the step is finished and saved first."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Listens for the two signals while a run is being written."""

    def __init__(self, *, tells: bool) -> None:
        """tells: that it has heard, on stderr."""
        self.signal = 0  # that was received
        self._tells = tells
        self._before: dict[signal.Signals, object] = {}

    def listen(self) -> None:
        """From now on a signal is kept until the end of the step; a second one interrupts at once."""
        if threading.current_thread() is threading.main_thread():  # no other may
            self._before = {each: signal.signal(each, self._receive) for each in SIGNALS}

    def forget(self) -> None:
        """Signals do again what they did before."""
        for each, handler in self._before.items():
            signal.signal(each, handler)  # type: ignore[arg-type]
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        if self._tells:  # past Python's buffers, in the middle of whose writing a signal may come
            os.write(2, b"stopping after this step; once more stops at once.\n")
