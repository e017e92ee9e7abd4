"""What asks a run for an end, with as many loader workers as by default: each way ends in a checkpoint."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixar.checkpoint import complete_checkpoints
from tests.home import free_port, rank_environments, records, start_ranks
from tests.home import train_arguments as train

pytestmark = pytest.mark.slow
PROGRAMS = Path(sys.executable).parent
# a run without end, and without a checkpoint of its own before it
ENDLESS = ("train.epochs=100000", "train.checkpoint_every=100000", "train.log_every=1", "data.workers=4")
LAUNCHERS = {
    "python": [sys.executable, "{file}"],
    "mixar": [sys.executable, "-m", "mixar", "train"],
    "torchrun": [str(PROGRAMS / "torchrun"), "--nproc_per_node=2", "--master_port={port}", "{file}"],
    "deepspeed": [str(PROGRAMS / "deepspeed"), "--num_gpus=2", "--master_port={port}", "{file}"],
}


def launch(home: Path, run: Path, launcher: str, log: Path) -> subprocess.Popen:
    """A run as a session of its own, once it has trained a few steps."""
    file, *given = train(home, run, *ENDLESS)
    begin = [part.format(port=free_port(), file=file) for part in LAUNCHERS[launcher]]
    env = os.environ | {"PATH": f"{PROGRAMS}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*begin, *given], env=env, stdout=log.open("w"), stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    while not (run / "metrics.jsonl").exists() or len(records(run)) < 3:
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.05)
    return process


def left(run: Path) -> bool:
    return subprocess.run(["pgrep", "-f", f"run_dir={run}"], stdout=subprocess.DEVNULL).returncode == 0


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run directory, of whose processes none outlives the test."""
    yield tmp_path / "run"
    subprocess.run(["pkill", "-KILL", "-f", f"run_dir={tmp_path / 'run'}"], check=False)


@pytest.mark.parametrize(
    ("launcher", "name", "target"),
    [
        ("python", "SIGTERM", "group"),
        ("python", "SIGINT", "group"),  # Ctrl-C
        ("python", "SIGHUP", "group"),  # a closed terminal
        ("python", "SIGUSR2", "group"),
        ("python", "SIGTERM", "process"),
        ("mixar", "SIGTERM", "process"),
        ("mixar", "SIGINT", "group"),
        ("torchrun", "SIGTERM", "group"),
        ("torchrun", "SIGTERM", "process"),
        ("torchrun", "SIGUSR2", "process"),  # of which torchrun dies, and tells its ranks nothing
        ("deepspeed", "SIGTERM", "group"),
        ("deepspeed", "SIGTERM", "process"),  # likewise
        ("deepspeed", "SIGINT", "group"),
    ],
)
def test_every_end_that_is_asked_for_keeps_a_checkpoint(home, run, tmp_path, launcher, name, target) -> None:
    log = tmp_path / "log"
    process = launch(home, run, launcher, log)
    send = os.killpg if target == "group" else os.kill
    send(process.pid, getattr(signal, name))
    status = process.wait(120)
    for _ in range(600):
        if not left(run):
            break
        time.sleep(0.2)
    told = log.read_text()
    assert not left(run), told[-3000:]
    (kept,) = complete_checkpoints(run)
    assert int(kept.name) >= records(run)[-1]["images"]
    assert "stopped by a signal after step" in (run / "log.txt").read_text()
    if launcher in ("python", "mixar"):  # a launcher says more of its own
        assert "Traceback" not in told
        assert status == (130 if name == "SIGINT" else 0)


def test_what_was_to_be_ignored_stays_ignored(home, run) -> None:
    arguments = train(home, run, "train.log_every=1", "data.workers=1", "train.epochs=1000")
    process = subprocess.Popen(
        ["nohup", sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        while not (run / "metrics.jsonl").exists():
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGHUP)
        seen = len(records(run))
        while len(records(run)) < seen + 3:
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_signal_to_one_rank_s_group_stops_all(home, run, tmp_path) -> None:
    processes = start_ranks(train(home, run, *ENDLESS), 2, log=tmp_path / "log", start_new_session=True)
    while not (run / "metrics.jsonl").exists():
        assert processes[0].poll() is None
        time.sleep(0.05)
    os.killpg(processes[1].pid, signal.SIGTERM)
    assert [process.wait(120) for process in processes] == [0, 0]
    assert len(complete_checkpoints(run)) == 1


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_rank_that_waits_for_others_ends_at_once() -> None:
    place = rank_environments(2)[0]
    process = subprocess.Popen([sys.executable, "-m", "mixar", "doctor"], env=os.environ | place)
    try:
        while not listens(int(place["MASTER_PORT"])):
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        assert process.wait(60) == -signal.SIGTERM
    finally:
        process.kill()
