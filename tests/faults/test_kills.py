"""A process that is killed loses at most the steps since its last checkpoint, and ends where it would have ended."""

import random
from pathlib import Path

import pytest
from fault_cases import CASES, Kills, killed_and_resumed, outcome

KILLS_OF_A_RUN = 4


def check(stage, seed, models, data, whole, kills):
    """Kills a run of the stage several times; it must end as the uninterrupted one, without having lost its work."""
    expected = whole[stage]
    moments = random.Random(seed)
    folder, done = killed_and_resumed(stage, models, data, Path.cwd(), moments, kills, times=KILLS_OF_A_RUN)
    assert outcome(stage, folder) == expected
    assert [row["step"] for row in expected["metrics"]][-1] == CASES[stage].steps
    assert not list(Path(folder).rglob("*.partial"))
    return done


@pytest.mark.parametrize("stage", CASES)
def test_a_run_that_is_killed_four_times_ends_bit_for_bit_as_the_uninterrupted_one(stage, models, data, whole):
    kills = Kills()
    done = check(stage, 0, models, data, whole, kills)
    assert kills.total >= 2
    assert done > 0  # the last resume did not start again


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", CASES)
def test_a_hundred_kills_lose_nothing(stage, models, data, whole, tmp_path, monkeypatch):
    """Twenty-five of each stage; with -s it tells how many of them hit a checkpoint while it was written."""
    kills, seed, resumed = Kills(), 1, 0
    while kills.total < 25:
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "user.py").write_text((tmp_path / "user.py").read_text())
        monkeypatch.chdir(folder)
        resumed += check(stage, seed, models, data, whole, kills) > 0
        seed += 1
    print(f"{stage}: {kills}, {resumed} of {seed - 1} runs resumed last from a step above 0")
    assert kills.in_a_write > 0
    assert resumed > 0
