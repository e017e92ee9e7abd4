"""Who prepares what under Slurm."""

import pytest

from mixar.verbs.prepare import slurm_share

BATCH = {"PROCID": "0", "NTASKS": "8"}  # what a batch script has


def task(rank: int, world: int) -> dict[str, str]:
    """What a task of srun has more, or other."""
    return BATCH | {"STEP_ID": "0", "PROCID": str(rank), "STEP_NUM_TASKS": str(world)}


def element(place: int, first: int = 0, step: int = 1, count: int = 3) -> dict[str, str]:
    """What an element of an array has more."""
    given = {"ID": place, "MIN": first, "STEP": step, "COUNT": count}
    return {f"ARRAY_TASK_{name}": str(value) for name, value in given.items()}


@pytest.mark.parametrize(
    ("given", "share"),
    [
        ({}, (0, 1)),
        (BATCH, (0, 1)),
        (task(3, 8), (3, 8)),
        (element(2), (2, 3)),
        (BATCH | element(14, first=10, step=2), (2, 3)),
        (task(1, 4) | element(2), (9, 12)),
        (task(0, 1) | element(5, first=5, count=1), (0, 1)),  # one element sent again takes what is left
    ],
)
def test_shares_by_slurm(monkeypatch, given, share) -> None:
    for name, value in given.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert slurm_share() == share


def test_an_array_with_holes_is_refused(monkeypatch, refused) -> None:
    for name, value in element(5, first=1).items():  # of --array=1,2,5
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert "no rank 4 of 3: write --rank 0 to 2; of a Slurm array, --array=0-2" in refused("prepare", "config.yaml")
