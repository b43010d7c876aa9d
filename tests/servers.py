"""The labelling server as a process of its own."""

import os
import re
import signal
import subprocess
import sys

import pytest
import tiny_runs


class Server:
    """`ppo-rlhf label …` or `compare … --label`, running."""

    def __init__(self, *words, cwd):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ppo_rlhf", *map(str, words)],
            cwd=cwd,
            env=tiny_runs.environment(PYTHONUNBUFFERED="1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        line = self.process.stdout.readline()
        if not line.startswith("label at "):
            raise AssertionError(line + self.process.communicate()[1])
        self.address = line.removeprefix("label at ").strip()
        self.port = int(re.search(r":(\d+)/", self.address)[1])

    def kill(self):
        """As the machine's failure would: no chance to clean up."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def end(self):
        """Ctrl-C; → what the command printed since it began to serve."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        out, err = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, err
        assert "Traceback" not in err, err
        return out


@pytest.fixture
def serve(tmp_path):
    """Starts servers that end with the test."""
    started = []

    def start(*words):
        started.append(Server(*words, cwd=tmp_path))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.kill()
        server.process.communicate()
