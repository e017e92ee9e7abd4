"""Runs of several ranks that something happens to: each ends resumed, or with a sentence that says what to do."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from mixar.checkpoint import complete_checkpoints
from mixar.config import load_config
from mixar.errors import UserError
from mixar.train import train as run_training
from tests.home import Forked, end, exported_weights, fork_ranks, records, start_ranks
from tests.home import train_arguments as train

pytestmark = pytest.mark.slow


def wait_for(path: Path, processes: Sequence[subprocess.Popen | Forked]) -> None:
    while not path.exists():
        assert all(process.poll() is None for process in processes), f"a rank ended before {path} was there"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory) -> Path:
    """A run of 10 steps on two ranks under FSDP that nothing happened to."""
    root = tmp_path_factory.mktemp("whole")
    log = root / "log"
    assert end(fork_ranks(train(home, root / "run", "train.log_every=1"), 2, None, log)) == [0, 0], log.read_text()
    return root / "run"


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_launchers_of_two_ranks(home, whole, tmp_path, launcher) -> None:
    programs = Path(sys.executable).parent
    start = {
        "torchrun": ["torchrun", "--standalone", "--nproc_per_node=2"],
        "deepspeed": ["deepspeed", "--num_gpus=2", f"--master_port={20000 + os.getpid() % 9000}"],
    }[launcher]
    done = subprocess.run(
        [str(programs / start[0]), *start[1:], *train(home, tmp_path / "run", "train.log_every=1")], cwd=tmp_path,
        env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = (tmp_path / "run" / "log.txt").read_text()
    assert f"engine {'zero3, for the deepspeed' if launcher == 'deepspeed' else 'fsdp, for all ranks'}" in told
    assert "2 ranks on 1 nodes" in told and "float32, also when sent between ranks" in told
    for mine, theirs in zip(records(tmp_path / "run"), records(whole), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert json.loads((tmp_path / "run" / "deepspeed.json").read_text()) if launcher == "deepspeed" else True


@pytest.mark.parametrize("which", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_to_one_rank_stops_all_after_a_checkpoint(home, whole, tmp_path, which) -> None:
    run, outcome = tmp_path / "run", tmp_path / "outcome"
    command = train(home, run, "train.log_every=1")
    processes = start_ranks(command, 2, log=tmp_path / "log", MIXAR_OUTCOME=str(outcome))
    wait_for(run / "metrics.jsonl", processes)
    processes[1].send_signal(which)
    assert end(processes) == [0, 0], (tmp_path / "log").read_text()[-3000:]
    assert outcome.read_text() == "stopped\n" and not (run / "exports").exists()
    (kept,) = complete_checkpoints(run)[-1:]
    assert int(kept.name) // 16 == records(run)[-1]["step"]  # not one step is lost
    assert end(start_ranks(command, 2, log=tmp_path / "log", MIXAR_OUTCOME=str(outcome))) == [0, 0]
    assert outcome.read_text() == "done\n"
    assert all(torch.equal(exported_weights(run)[name], value) for name, value in exported_weights(whole).items())


@pytest.mark.parametrize("damage", ["bit", "torn", "gone"])
def test_a_damaged_checkpoint_is_passed_over_by_all_ranks(home, whole, tmp_path, damage) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "exports")
    file = sorted(complete_checkpoints(run)[-1].glob("__1_*"))[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink() if damage == "gone" else file.write_bytes(content[: -100 if damage == "torn" else None])
    assert end(fork_ranks(train(home, run), 2, None, tmp_path / "log")) == [0, 0]
    told = (run / "log.txt").read_text()
    assert f"{file.name} changed since it was written" in told and "resuming from" in told
    assert all(torch.equal(exported_weights(run)[name], value) for name, value in exported_weights(whole).items())


def test_a_full_disk_keeps_the_last_checkpoint(home, small_disk, tmp_path) -> None:
    run, log = small_disk / "run", tmp_path / "log"
    command = train(home, run, "train.log_every=1")
    processes = fork_ranks(command, 2, None, log)
    wait_for(run / "checkpoints" / "000000000080" / "DONE", processes)
    assert end(processes) != [0, 0]  # there is no room for a second
    told = [line for line in log.read_text().splitlines() if line.startswith("mixar train: a checkpoint in")]
    assert len(told) == 1 and "free space, then the same command resumes from" in told[0]
    assert [kept.name for kept in complete_checkpoints(run)] == ["000000000080"]
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert end(fork_ranks(command, 2, None, log)) == [0, 0]
    assert "resuming from" in (run / "log.txt").read_text() and (run / "exports").exists()


def test_a_rank_that_hangs_is_seen_in_the_log(home, tmp_path) -> None:
    code = (  # rank 1 never gets its third batch
        "import os, sys, time\nfrom mixar.data.loader import ShardSource\nread, count = ShardSource.read, [0]\n"
        "def slow(self, picks):\n    count[0] += 1\n    if os.environ['RANK'] == '1' and count[0] == 3:\n"
        "        time.sleep(1000)\n    return read(self, picks)\n"
        "ShardSource.read = slow\nfrom mixar.train import main\nmain()\n"
    )
    run = tmp_path / "run"
    arguments = ["-c", code, *train(home, run, "engine.timeout=8", "train.micro_batch=8")[1:]]
    processes = fork_ranks(arguments, 2, None, tmp_path / "log")
    begun = time.monotonic()
    assert end(processes) != [0, 0]
    assert time.monotonic() - begun < 100
    told = (run / "log.txt").read_text()
    assert "rank 1: no step in 8 s since step 2 began" in told and "in slow" in told and told.count("MainThread:") == 2
    assert "the last collectives of gloo are in" in told
    assert sorted(file.name for file in (run / "flight").iterdir()) == ["gloo_0", "gloo_1"], "NCCL was not used"
    entries = [len(pickle.loads((run / "flight" / f"gloo_{rank}").read_bytes())["entries"]) for rank in (0, 1)]
    assert entries[0] > entries[1] > 0, "rank 0 waits in a collective that rank 1 has not begun"


def test_a_step_that_is_not_finite_is_skipped_by_all_ranks(home, tmp_path) -> None:
    run = tmp_path / "run"
    poison = ["optim.lr=1e30", "optim.clip=0", "optim.warmup_epochs=0", "train.max_skips=2", "data.workers=1"]
    processes = start_ranks(train(home, run, *poison, "engine.name=zero2"), 2, log=tmp_path / "log")
    assert end(processes) == [2, 2]
    told = (tmp_path / "log").read_text()
    assert "steps in a row were not finite" in told and "terminate called" not in told
    assert subprocess.run(["pgrep", "-f", f"run_dir={run}"]).returncode == 1, "the loader's workers are left"
    replay = json.loads(sorted((run / "replay").iterdir())[0].read_text())
    assert len(set(replay["keys"])) == 16  # of both ranks


def test_a_remote_that_fails_for_a_while(home, tmp_path) -> None:
    remote, run = tmp_path / "remote", tmp_path / "run"
    shutil.copytree(home / "shards", remote)
    away = remote / "part-00000" / "shard.00000.mds"
    shard = away.read_bytes()
    away.unlink()
    told = [f"data.shards=file://{remote}", f"data.cache={tmp_path / 'cache'}"]
    processes = fork_ranks(train(home, run, *told), 2, None, tmp_path / "log")
    while "trying again in 1 s" not in (tmp_path / "log").read_text():
        assert processes[0].poll() is None, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.05)
    away.write_bytes(shard)
    assert end(processes) == [0, 0] and (run / "exports").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"gradient_clipping": 1.0}, r"gradient_clipping=1\.0, but it is 3\.0 by the config's optim\.clip"),
        ({"bf16": {"enabled": True}}, r"'bf16', which train\.precision decides"),
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization\.stage=3, but it is 1 by the config's engine\.name"),
    ],
)
def test_settings_of_deepspeed_that_contradict(home, tmp_path, content, told) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=told):
        run_training(load_config(home / "config.yaml", [f"run_dir={tmp_path}/run", "engine.name=zero1",
                                                        f"engine.deepspeed={tmp_path}/ds.json"]))  # fmt: skip


def test_settings_of_deepspeed_that_go_with_ours(home, tmp_path) -> None:
    theirs, run = tmp_path / "ds.json", tmp_path / "run"
    theirs.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 1000}, "train_batch_size": "auto"}))
    command = train(home, run, "engine.name=zero1", f"engine.deepspeed={theirs}", "train.epochs=0.25")
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    settings = json.loads((run / "deepspeed.json").read_text())
    assert settings["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 1000}
