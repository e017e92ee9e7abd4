"""An error on one rank of a run: told where a user looks, without a wait for ranks that cannot hear of it."""

import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mixar.checkpoint import complete_checkpoints
from tests.home import end, fork_ranks, records, start_ranks
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
PLAIN = "from mixar.train import main\nmain()\n"
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


OUT_OF_MEMORY = (
    "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB "
    "of which 1.56 GiB is free. Including non-PyTorch memory, this process has 77.54 GiB memory in use. If reserved "
    "but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True')"
)


@pytest.mark.parametrize("world", [1, 2])
def test_out_of_memory_is_told_with_what_needs_less(home, tmp_path, world) -> None:
    run, log, last = tmp_path / "run", tmp_path / "log", world - 1
    module, name, method = STEP
    fault = FAULT.format(module=module, name=name, method=method, rank=last, call=15, error=OUT_OF_MEMORY)
    assert run_with(f"import torch{fault}", home, run, log, world, "train.micro_batch=4")[last] == 2
    said = log.read_text()
    (told,) = re.findall("^mixar train: (the GPU is out of memory.*)$", said, re.M)
    assert told in (run / "log.txt").read_text()
    assert "Tried to allocate 2.00 GiB" in told and "77.54 GiB memory in use" in told and "PYTORCH_ALLOC" not in told
    assert "it would fit by `mixar plan`'s reckoning" in told
    snapshot = run / f"memory-{last}.pickle"
    assert "segments" in pickle.loads(snapshot.read_bytes()) and f"{snapshot} shows what is on the GPU" in said
    kept = complete_checkpoints(run)[-1]
    (fix,) = re.findall(r"write (engine\.recompute=\w+)", told)
    assert run_with(PLAIN, home, run, log, world, "train.micro_batch=4", fix) == [0] * world
    assert f"resuming from {kept}" in log.read_text()


def test_a_full_machine_is_told(home, tmp_path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    module, name, method = STEP
    fault = FAULT.format(module=module, name=name, method=method, rank=0, call=3, error="a full machine").replace(
        "raise a full machine", "import torch; torch.empty(2**60)"
    )
    assert run_with(fault, home, run, log, 1) == [2], log.read_text()[-3000:]
    (told,) = [line for line in log.read_text().splitlines() if line.startswith("mixar train: this machine is out of")]
    assert "you tried to allocate 4611686018427387904 bytes" in told
    assert "give the job more of it, or write train.micro_batch=4 or engine.recompute=" in told
    assert not list(run.glob("memory-*"))


def test_a_sum_that_cannot_be_taken_is_told_by_all(home, tmp_path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    fault = FAULT.format(module="mixar", name="checkpoint", method="_sums", rank=1, call=2,
                         error="OSError(5, 'Input/output error')")  # fmt: skip
    assert run_with(fault, home, run, log, 2) == [2, 2]
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("mixar train: ")]
    assert "could not be written" in line and "Input/output error" in line
    assert len(complete_checkpoints(run)) == 1


@pytest.mark.parametrize(
    ("error", "traced"),
    [
        ("RuntimeError('no picture')", True),
        ("UserError('no picture')", False),
        ("RuntimeError('CUDA out of memory. no picture')", False),
    ],
)
def test_a_preview_that_fails_costs_no_step(home, tmp_path, error, traced) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    fault = FAULT.format(module="mixar.objectives", name="MixARObjective", method="preview", rank=0, call=1,
                         error=error)  # fmt: skip
    assert run_with(fault, home, run, log, 2, "train.samples_every=1") == [0, 0]
    told = (run / "log.txt").read_text()
    assert "the preview after step 4 failed, the run continues" in told and "no picture" in told
    assert ("Traceback" in told) is traced
    assert records(run)[-1]["step"] == 10 and (run / "exports").exists()


def test_ranks_that_are_done_do_not_shut_their_interpreters_down(home, tmp_path) -> None:
    aborting = f"import atexit, os\natexit.register(os.abort)\n{PLAIN}"  # as threads that DeepSpeed leaves behind may
    run, log = tmp_path / "run", tmp_path / "log"
    arguments = ["-c", aborting, *train(home, run, "train.epochs=0.25")[1:]]
    assert end(start_ranks(arguments, 2, log=log)) == [0, 0], log.read_text()[-3000:]
    assert (run / "exports").exists()


def test_an_interrupted_start_is_no_traceback(home, tmp_path) -> None:
    code = "import mixar.train as t\ndef load(*_):\n    raise KeyboardInterrupt\nt.load_config = load\nt.main()\n"
    done = subprocess.run([sys.executable, "-c", code, "x.yaml"], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == "mixar train: interrupted; the same command resumes where it stopped\n"
