import pytest

from ppo_rlhf import toy


@pytest.fixture(scope="session")
def demonstrations():
    return toy.demonstrations()


@pytest.fixture(scope="session")
def scored(demonstrations):
    """The completions and their gold rewards."""
    completions = [row["completion"] for row in demonstrations]
    return completions, toy.gold([row["prompt"] for row in demonstrations], completions)
