"""Grids of runs without processes of their own, which would import everything once a run."""

import pytest

from ppo_rlhf import cli
from ppo_rlhf.run import is_finished
from ppo_rlhf.toy import corpus


@pytest.fixture
def in_process(monkeypatch):
    """The studies' grids run in this process, without reports of the runs; → the names of the jobs that were run."""
    ran = []

    def run_grid(jobs, *, workers, title):
        for job in jobs:
            if not is_finished(job.folder):
                ran.append(job.name)
                assert job.command[1:3] == ("-m", "ppo_rlhf")
                assert cli.main([*job.command[3:], "--output-dir", str(job.folder), "--resume"]) == 0

    monkeypatch.setattr(corpus, "NUM_DEMONSTRATIONS", 600)  # to write twelve thousand takes seconds
    monkeypatch.setattr(cli, "_write_report", lambda folders: None)
    for module in ("overoptimization.study", "ablations"):
        monkeypatch.setattr(f"ppo_rlhf.study.{module}.run_grid", run_grid)
    return ran
