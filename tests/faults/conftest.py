"""Tiny models and data, made once a session; uninterrupted runs; the server that forks all others."""

import os
from multiprocessing import forkserver
from pathlib import Path

import fault_cases
import pytest
import tiny_runs
from tiny_runs import data, in_tmp_path, models

__all__ = ["data", "in_tmp_path", "models"]


def pytest_collection_modifyitems(config, items):
    """A hundred kills take minutes: only where slow tests are asked for, `pytest tests/faults -m slow -s`."""
    if not config.getoption("-m"):
        slow = [item for item in items if item.path.parent == Path(__file__).parent and item.get_closest_marker("slow")]
        items[:] = [item for item in items if item not in slow]
        config.hook.pytest_deselected(items=slow)


@pytest.fixture(scope="session", autouse=True)
def server():
    """Started with this folder on its path, which holds what it imports."""
    here = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, [here, here.parent, here.parents[1]])))
        fault_cases.context()
        forkserver.ensure_running()


@pytest.fixture(scope="session")
def whole(models, data, tmp_path_factory):
    """An uninterrupted run of each stage: → its outcome by stage."""
    cwd = tmp_path_factory.mktemp("whole")
    (cwd / "user.py").write_text(tiny_runs.USER_FUNCTIONS)
    found = {}
    for stage in fault_cases.CASES:
        assert fault_cases.finish(stage, fault_cases.words_of(stage, models, data, cwd / stage), cwd) == 0
        found[stage] = fault_cases.outcome(stage, cwd / stage)
    return found
