"""The command line, run for real in this process."""

import shutil

import pytest

from mixar.__main__ import main


@pytest.fixture
def mixar(capsys):
    """`mixar("sample", ...)` gives (exit status, what it printed, what it complained of)."""

    def run(*arguments) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def refused(mixar):
    """`refused("sample", ...)` gives the one line with which a command is refused."""

    def run(*arguments) -> str:
        status, _, complaint = mixar(*arguments)
        lines = [line for line in complaint.strip().splitlines() if "| " not in line]  # without progress bars
        assert status == 2 and len(lines) == 1 and lines[0].startswith(f"mixar {arguments[0]}: ")
        return lines[0]

    return run


@pytest.fixture
def run_dir(tmp_path, release):
    """A run directory with an export."""
    shutil.copytree(release, tmp_path / "run" / "exports" / "7-ema")
    return tmp_path / "run"
