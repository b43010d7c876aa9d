"""Commands of many runs, whose runs are not trained."""

import json
from types import SimpleNamespace

import pytest

from classic import many_runs
from ppo_rlhf.run import is_finished


@pytest.fixture
def started(monkeypatch):
    """`names` of the runs that train. They come to what `returns` says of them, 50 where it says nothing."""
    noted = SimpleNamespace(names=[], returns={}, told=[])

    def fake_grid(jobs, *, workers, told):
        for job in jobs:
            if not is_finished(job.folder):
                noted.names.append(job.name)
                found = noted.returns.get(job.name, 50.0)
                row = {"step": 1, "steps": 128, "episodes": 100.0, "episode/return": found, "eval/return": found}
                (job.folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
                versions = {"torch": "2.0.0", "gymnasium": "1.0.0", "numpy": "2.1.0", "accelerate": "1.9.0"}
                (job.folder / "environment.json").write_text(json.dumps({"versions": versions}))
                (job.folder / "summary.json").write_text(json.dumps({"return_after": found}))
                noted.told.append(told(job.folder))

    monkeypatch.setattr(many_runs, "run_grid", fake_grid)
    return noted
