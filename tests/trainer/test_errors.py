"""An error on one rank of a run: told where a user looks, without a wait for ranks that cannot hear of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from mixar.checkpoint import complete_checkpoints
from tests.home import end, fork_ranks, records
from tests.home import train_arguments as train

pytestmark = pytest.mark.slow

# rank 1, or the loader's worker of it, fails at a call of a method of the run's own
FAULT = """
import os
from {module} import {name} as faulty
method, count = faulty.{method}, [0]
def fails(*args, **kwargs):
    count[0] += 1
    if os.environ["RANK"] == "{rank}" and count[0] == {call}:
        raise {error}
    return method(*args, **kwargs)
faulty.{method} = fails
from mixar.errors import UserError
from mixar.train import main
main()
"""
ERRORS = {
    "mistake": ("UserError('take the other one')", "mixar train: take the other one", 2),
    "disk": ("OSError(5, 'Input/output error', '/data/x')", "OSError: [Errno 5] Input/output error: '/data/x'", 1),
    "bug": ("ZeroDivisionError('a bug')", "ZeroDivisionError: a bug", 1),
}
STEP, LOADER = ("mixar.objectives", "MixARObjective", "loss"), ("mixar.data.loader", "ShardSource", "read")


def run_with(fault: str, home: Path, run: Path, log: Path, world: int, *overrides: str) -> list[int]:
    arguments = ["-c", fault, *train(home, run, "train.log_every=1", "train.checkpoint_every=0.5", *overrides)[1:]]
    return end(fork_ranks(arguments, world, world // 2 if world > 2 else None, log), 200)


@pytest.mark.parametrize(
    ("engine", "place", "kind", "call"),
    [
        ("fsdp", STEP, "mistake", 1),  # before the first checkpoint
        ("fsdp", STEP, "mistake", 15),  # after it
        ("fsdp", STEP, "bug", 15),
        ("ddp", STEP, "disk", 15),
        ("zero1", STEP, "bug", 15),
        ("zero3", STEP, "mistake", 15),
        ("hsdp", STEP, "disk", 8),
        ("fsdp", LOADER, "mistake", 9),
        ("ddp", LOADER, "disk", 9),
    ],
)  # fmt: skip
def test_an_error_on_one_rank_is_told_and_ends_the_run(home, tmp_path, engine, place, kind, call) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    raised, told, status = ERRORS[kind]
    module, name, method = place
    fault = FAULT.format(module=module, name=name, method=method, rank=1, call=call, error=raised)
    workers = "data.workers=1" if place is LOADER else "data.workers=0"
    statuses = run_with(fault, home, run, log, 4 if engine == "hsdp" else 2, f"engine.name={engine}", workers,
                        "train.micro_batch=4")  # fmt: skip
    said = log.read_text()
    assert statuses[1] == status, said[-3000:]  # by itself: what `end` kills has another
    assert told in said and (kind != "mistake" or said.count(told) == 1)
    assert told.removeprefix("mixar train: ") in (run / "log.txt").read_text()
    assert not (run / "exports").exists()


def test_a_sum_that_cannot_be_taken_is_told_by_all(home, tmp_path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    fault = FAULT.format(module="mixar", name="checkpoint", method="_sums", rank=1, call=2,
                         error="OSError(5, 'Input/output error')")  # fmt: skip
    assert run_with(fault, home, run, log, 2) == [2, 2]
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("mixar train: ")]
    assert "could not be written" in line and "Input/output error" in line
    assert len(complete_checkpoints(run)) == 1


def test_a_preview_that_fails_costs_no_step(home, tmp_path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    fault = FAULT.format(module="mixar.objectives", name="MixARObjective", method="preview", rank=0, call=1,
                         error="RuntimeError('no picture')")  # fmt: skip
    assert run_with(fault, home, run, log, 2, "train.samples_every=1") == [0, 0]
    told = (run / "log.txt").read_text()
    assert "the preview after step 4 failed, the run continues" in told and "no picture" in told
    assert records(run)[-1]["step"] == 10 and (run / "exports").exists()


def test_an_interrupted_start_is_no_traceback(home, tmp_path) -> None:
    code = "import mixar.train as t\ndef load(*_):\n    raise KeyboardInterrupt\nt.load_config = load\nt.main()\n"
    done = subprocess.run([sys.executable, "-c", code, "x.yaml"], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == "mixar train: interrupted; the same command resumes where it stopped\n"
