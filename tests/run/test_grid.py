"""Runs side by side: which are started, what becomes of those that fail, and how all of them stop."""

import itertools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from ppo_rlhf.errors import Interrupted, UserError
from ppo_rlhf.run.grid import Job, available_cores, run_grid
from ppo_rlhf.run.stopping import StopRequest

# A run that notes when it was there, does what it is told, and finishes.
SCRIPT = """
import json, os, pathlib, signal, sys, time
what, _, folder, resume = sys.argv[1:]
folder = pathlib.Path(folder)
folder.mkdir(parents=True, exist_ok=True)
with (folder / "starts").open("a") as file:
    print(resume, os.environ["OMP_NUM_THREADS"], file=file)
def save(number, frame):
    with (folder / "saved").open("a") as file:
        print(number, file=file)
    if what == "saves":
        sys.exit(130)
signal.signal(signal.SIGINT, save)
began = time.time()
(folder / "listens").touch()
if what == "fails":
    sys.exit("first line\\nerror: lr=0 must be above 0.\\n")
while what in ("saves", "never ends"):
    time.sleep(0.02)
while what == "meets another" and len(list(folder.parent.glob("*/listens"))) < 2:
    time.sleep(0.02)
(folder / "summary.json").write_text(json.dumps([began, time.time()]))
"""


@pytest.fixture(autouse=True)
def hangup():
    """A hangup is heard even where the tests run under nohup, which ignores it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def job(tmp_path):
    """Makes a job that does something."""
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)

    def make(name, what="ends"):
        return Job(name, (sys.executable, "-S", str(script), what), tmp_path / "runs" / name)

    return make


def times(job):
    return json.loads((job.folder / "summary.json").read_text())


def starts(job):
    path = job.folder / "starts"
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def signal_when_listening():
    """Sends this process signals, each when the jobs' processes have got so far that they could hear it."""
    threads = []

    def begin(*waits, number=signal.SIGINT):
        def send():
            for paths in waits:
                while not all(path.exists() for path in paths):
                    time.sleep(0.01)
                os.kill(os.getpid(), number)

        threads.append(threading.Thread(target=send))
        threads[-1].start()

    yield begin
    for thread in threads:
        thread.join()


def test_every_job_runs_once_with_its_folder_and_one_thread(job):
    jobs = [job("one"), job("two"), job("three")]
    run_grid(jobs, workers=2)
    assert [starts(each) for each in jobs] == [["--resume 1"]] * 3


def test_a_finished_run_is_not_repeated(job):
    jobs = [job("one"), job("two")]
    run_grid(jobs[:1], workers=1)
    before = times(jobs[0])
    run_grid(jobs, workers=1)
    assert times(jobs[0]) == before
    assert len(starts(jobs[1])) == 1


def test_two_workers_run_two_jobs_at_a_time(job):
    jobs = [job(name, "meets another") for name in "ab"]  # neither would end alone
    run_grid(jobs, workers=2)
    assert all(times(each) for each in jobs)


def test_one_worker_runs_one_job_after_the_other(job):
    jobs = [job(name) for name in "abc"]
    run_grid(jobs, workers=1)
    spans = sorted(times(each) for each in jobs)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


def test_a_failure_is_told_with_its_last_line_and_the_others_go_on(job, capfd):
    jobs = [job("bad", "fails"), job("good")]
    with pytest.raises(UserError, match=r"1 of 2 runs failed: see .*bad\.log\. --resume"):
        run_grid(jobs, workers=1)
    assert "bad failed with exit code 1: error: lr=0 must be above 0." in capfd.readouterr().err
    assert "first line" in jobs[0].log.read_text()
    assert times(jobs[1])


def test_what_failed_is_tried_again(job):
    with pytest.raises(UserError):
        run_grid([job("one", "fails")], workers=1)
    run_grid([job("one")], workers=1)
    assert len(starts(job("one"))) == 2


def test_a_command_that_dies_without_a_word_is_told_so(job, capfd, tmp_path):
    silent = Job("silent", (sys.executable, "-S", "-c", "raise SystemExit(3)"), tmp_path / "silent")
    with pytest.raises(UserError):
        run_grid([silent], workers=1)
    assert "silent failed with exit code 3: it said nothing" in capfd.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_lets_the_runs_save_and_starts_no_other(job, signal_when_listening, number, code):
    jobs = [job("one", "saves"), job("two", "saves"), job("three")]
    signal_when_listening([each.folder / "listens" for each in jobs[:2]], number=number)
    with pytest.raises(Interrupted, match="0 of 3 runs finished; --resume goes on") as stopped:
        run_grid(jobs, workers=2)
    assert stopped.value.code == code
    assert [(each.folder / "saved").read_text() for each in jobs[:2]] == ["2\n", "2\n"]
    assert starts(jobs[2]) == []


def test_a_second_ctrl_c_ends_a_run_that_does_not_stop(job, signal_when_listening):
    stuck = job("one", "never ends")
    signal_when_listening([stuck.folder / "listens"], [stuck.folder / "saved"])
    with pytest.raises(KeyboardInterrupt):
        run_grid([stuck], workers=1)
    assert (stuck.folder / "saved").read_text() == "2\n"
    assert not Path(stuck.folder, "summary.json").exists()


def test_signals_do_afterwards_what_they_did_before(job):
    before = signal.getsignal(signal.SIGINT)
    run_grid([job("one")], workers=1)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_hangup_that_is_ignored_stays_so():
    """As by nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest(tells=False)
    stop.listen()
    signal.raise_signal(signal.SIGHUP)
    stop.forget()
    assert stop.signal == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_hangup_is_heard_though_its_terminal_is_gone(monkeypatch):
    """And stderr is another from then on, which takes what the step still says."""
    replaced = []

    def gone(descriptor, text):
        raise OSError(5, "Input/output error")

    stop = StopRequest(tells=True)
    stop.listen()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", gone)
        patch.setattr(os, "dup2", lambda source, target: replaced.append(target))
        signal.raise_signal(signal.SIGHUP)
    stop.forget()
    assert stop.signal == signal.SIGHUP
    assert replaced == [2]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this platform")
def test_only_the_cores_that_the_process_may_use_count():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
