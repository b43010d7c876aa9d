"""Many runs, some at a time: each a command in a process of its own, with a run folder of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from ppo_rlhf.errors import Interrupted, UserError
from ppo_rlhf.run.folder import is_finished
from ppo_rlhf.run.progress import StepProgress
from ppo_rlhf.run.stopping import StopRequest

POLL = 0.1  # seconds between looks at a process


@dataclass(frozen=True)
class Job:
    """A run of a grid."""

    name: str  # as it is told
    command: tuple[str, ...]  # takes --output-dir and --resume, which are added
    folder: Path  # of the run; what the command says goes into <folder>.log beside it

    @property
    def log(self) -> Path:
        """All that its processes said."""
        return self.folder.with_name(f"{self.folder.name}.log")


def available_cores() -> int:
    """How many cores this process may run on, where the platform tells; else how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_grid(
    jobs: Sequence[Job], *, workers: int, title: str = "runs", told: Callable[[Path], str] | None = None
) -> None:
    """Runs the jobs, `workers` at a time, one thread each; what is finished is not repeated, what was begun goes on.

    told: of a finished run's folder, what is said of it. A job that fails is told with its last line, and the others go
    on. Ctrl-C, SIGTERM and a closed terminal are passed
    on as one SIGINT, by which a run saves its step; a second one kills.

    Raises UserError at the end where any failed, and Interrupted after a signal.
    """
    waiting = [job for job in jobs if not is_finished(job.folder)]
    done = len(jobs) - len(waiting)
    progress = StepProgress(title, len(jobs), enabled=True)
    progress.tell(f"{title}: {len(jobs)}, of which {done} are finished; {workers} at a time")
    stop = StopRequest(tells=True)
    failed = []
    stop.listen()
    try:
        for job, code in _ended(waiting, workers, stop):
            if code == 0:
                done += 1
                if told is not None:
                    progress.tell(f"{job.name}: {told(job.folder)}")
                progress.show(done, {})
            elif not stop.signal:
                failed.append(job)
                progress.tell(f"{job.name} failed with exit code {code}: {_last_line(job.log)}")
    finally:
        stop.forget()
        progress.close()
    if stop.signal:
        raise Interrupted(f"stopped with {done} of {len(jobs)} runs finished; --resume goes on.", 128 + stop.signal)
    if failed:
        logs = ", ".join(str(job.log) for job in failed)
        raise UserError(f"{len(failed)} of {len(jobs)} runs failed: see {logs}. --resume tries them again.")


def _ended(jobs: Sequence[Job], workers: int, stop: StopRequest) -> Iterator[tuple[Job, int | None]]:
    """Carries the jobs out; each as it ends, with its exit code. Where the iterator is left, what runs is killed."""
    at_once = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(_carry_out, job, stop, at_once): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            at_once.set()


def _carry_out(job: Job, stop: StopRequest, at_once: threading.Event) -> int | None:
    """Runs a job's command to its end → its exit code; None where it was not begun, since all is to stop."""
    if stop.signal or at_once.is_set():
        return None
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        process = subprocess.Popen(
            [*job.command, "--output-dir", str(job.folder), "--resume"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # the terminal's Ctrl-C would reach it as well, and be its second
        )
    asked = False
    while process.poll() is None:
        if at_once.is_set():
            process.kill()
        elif stop.signal and not asked:
            process.send_signal(signal.SIGINT)
            asked = True
        time.sleep(POLL)
    return process.returncode


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
