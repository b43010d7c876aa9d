"""Ctrl-C, SIGTERM and a closed terminal during a run: the step is finished and saved first."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class StopRequest:
    """Listens for the signals while a run is being written."""

    def __init__(self, *, tells: bool) -> None:
        """tells: that it has heard, on stderr."""
        self.signal = 0  # that was received
        self._tells = tells
        self._before: dict[signal.Signals, object] = {}

    def listen(self) -> None:
        """From now on a signal is kept until the end of the step; a second one interrupts at once.

        A hangup that is ignored already, by nohup, stays so.
        """
        if threading.current_thread() is threading.main_thread():  # no other may
            heard = [each for each in SIGNALS if each.name != "SIGHUP" or signal.getsignal(each) != signal.SIG_IGN]
            self._before = {each: signal.signal(each, self._receive) for each in heard}

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
            try:
                os.write(2, b"stopping after this step; once more stops at once.\n")
            except OSError:  # the terminal is gone: what else is said there must not end the step
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
