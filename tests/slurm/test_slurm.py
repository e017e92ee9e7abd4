"""The job scripts as they are, on a real Slurm: they train, and what interrupts them ends in a resumed run."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from mixar import train
from tests.home import exported_weights

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*(ROOT / "slurm").glob("*.sh"), Path(__file__).with_name("cluster.sh")])
FEW = "--ntasks-per-node=1"  # a task for each of 16 GPUs would be too much for this machine
TRAIN = (FEW, "slurm/train_l.sh")


def equal(a: Path, b: Path) -> bool:
    return all(torch.equal(exported_weights(a)[name], value) for name, value in exported_weights(b).items())


def checkpoints(run: Path) -> set[Path]:
    return set((run / "checkpoints").glob("*/DONE"))


def pipeline(cluster, home: Path, *overrides: str) -> list[str]:
    """Submit the pipeline; the ids of its jobs, in order."""
    evaluate = ("--reference", home / "images", "--count", "8", "--extractor", home / "classifier")
    said = cluster(
        "run", "slurm/pipeline.sh", "l", home / "config.yaml", *overrides, "--", *evaluate,
        PREPARE_OPTIONS="--array=0-1", TRAIN_OPTIONS=FEW, SBATCH_OUTPUT=f"{cluster.logs}/%A.log",
    )  # fmt: skip
    return [word.strip(",") for word in said.split()[1::2]]


@pytest.fixture(scope="module")
def chain(cluster, home) -> list[str]:
    """The pipeline's jobs, after their end: they leave shards and a run that nothing interrupted."""
    jobs = pipeline(cluster, home)
    cluster.finish(jobs[-1])
    return jobs


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_sound(script) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--external-sources", script], check=True, cwd=ROOT)


@pytest.mark.parametrize("run_dir", ["runs/exp #2  a", "2024-01-05", "007", "it's $HOME"])
def test_the_pipeline_hands_on_the_run_dir_as_it_is(tmp_path, run_dir) -> None:
    sbatch = tmp_path / "sbatch"  # what was submitted, an argument a line
    sbatch.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >>{tmp_path}/submitted\necho 7\n')
    sbatch.chmod(0o755)
    subprocess.run(
        ["slurm/pipeline.sh", "l", f"run_dir={run_dir}", "--trust-pickle", "--", "--count", "8"], check=True, cwd=ROOT,
        env=os.environ | {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    submitted = (tmp_path / "submitted").read_text().splitlines()
    assert submitted[-4:] == ["slurm/evaluate.sh", run_dir, "--count", "8"]
    assert submitted.count(f"run_dir={run_dir}") == submitted.count("--trust-pickle") == 2


@pytest.mark.parametrize(("script", "nodes"), [("train_b", 1), ("train_l", 2), ("train_h", 2), ("prepare", 1)])
def test_nodes_of_8_gpus_take_them(cluster, script, nodes) -> None:
    assert "to start at" in cluster("run", "sbatch", "--test-only", f"--nodes={nodes}", f"slurm/{script}.sh")


def test_from_another_folder_it_says_where_to_submit(cluster) -> None:
    job = cluster.submit("--chdir=/", "slurm/train_l.sh")
    assert cluster.finish(job)["ExitCode"] == "2:0"
    assert "submit this from the repository's folder" in cluster.log(job)


def test_a_task_for_each_gpu_of_two_nodes(cluster, tmp_path) -> None:
    head = (ROOT / "slurm" / "train_l.sh").read_text().rpartition("[[")[0]  # all but what it runs
    (tmp_path / "job.sh").write_text(
        head + "run bash -c 'echo $SLURM_PROCID/$SLURM_STEP_NUM_TASKS $SLURM_LOCALID $CUDA_VISIBLE_DEVICES'"
    )
    job = cluster.submit(tmp_path / "job.sh")
    assert cluster.finish(job)["JobState"] == "COMPLETED", cluster.log(job)
    for rank in range(16):
        assert f"{rank}/16 {rank % 8} 0,1,2,3,4,5,6,7\n" in cluster.log(job)


def test_restarts_are_bounded(cluster, tmp_path) -> None:
    (tmp_path / "job.sh").write_text("#!/bin/bash\nsource slurm/common.sh\nrun false\n")
    job = cluster.submit("--requeue", "--open-mode=append", tmp_path / "job.sh", MAX_RESTARTS="1")
    ended = cluster.finish(job)
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("FAILED", "1", "1:0"), cluster.log(job)
    assert "not requeued: this was restart 1 of MAX_RESTARTS=1" in cluster.log(job)


def test_a_mistake_is_not_requeued(cluster, home) -> None:
    job = cluster.submit(*TRAIN, home / "config.yaml", "model.guidence=none")
    ended = cluster.finish(job)
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("FAILED", "0", "2:0"), cluster.log(job)
    assert "Did you mean 'model.guidance'?" in cluster.log(job)


def test_what_may_pass_is_requeued(cluster, home, tmp_path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        job = cluster.submit(*TRAIN, home / "config.yaml", f"run_dir={tmp_path}", MAX_RESTARTS="0")
        ended = cluster.finish(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "1:0"), cluster.log(job)
    assert f"another process is training in {tmp_path}" in cluster.log(job)
    assert "not requeued: this was restart 0 of MAX_RESTARTS=0" in cluster.log(job)


def test_a_wrong_flag_is_no_crash(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("MIXAR_OUTCOME", str(tmp_path / "outcome"))
    monkeypatch.setattr(sys, "argv", ["train.py", "config.yaml", "--nothing"])
    with pytest.raises(SystemExit):
        train.main()
    assert (tmp_path / "outcome").read_text() == "refused\n"


def test_the_pipeline_runs_its_stages_in_order(cluster, home, chain) -> None:
    stages = [cluster.jobs(job) for job in chain]
    states = [job["JobState"] for stage in stages for job in stage]
    assert states == ["COMPLETED"] * 4, "\n".join(cluster.log(job)[-4000:] for job in chain)
    for before, after in pairwise(stages):
        assert max(job["EndTime"] for job in before) <= after[0]["StartTime"]
    assert json.loads((home / "run" / "eval" / "0-8.json").read_text())["n"] == 8
    assert stages[1][0]["NodeList"] == "n[1-2]" and "2 ranks on 2 nodes" in cluster.log(chain[1])


def test_a_failed_stage_cancels_what_follows(cluster, home) -> None:
    jobs = pipeline(cluster, home, f"data.shards={home}/none", f"data.images={home}/none")
    cluster.finish(jobs[-1])
    assert [cluster.jobs(job)[0]["JobState"] for job in jobs] == ["FAILED", "CANCELLED", "CANCELLED"]


def test_a_signal_and_a_crash_change_no_weight(cluster, home, chain) -> None:
    run = home / "signalled"
    job = cluster.submit(*TRAIN, home / "config.yaml", f"run_dir={run}")
    cluster.wait("a checkpoint", lambda: checkpoints(run), job)
    cluster("run", "scancel", "--signal=USR2", job)
    cluster.wait("a resumed run", lambda: "resuming from" in cluster.log(job), job)
    assert "stopped, status 0" in cluster.log(job)
    cluster("run", "scancel", "--signal=KILL", f"{job}.0")
    ended = cluster.finish(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), cluster.log(job)
    assert cluster.log(job).count("resuming from") == 2 and equal(run, home / "run")


def test_a_bug_that_comes_again_and_again_ends_the_job(cluster, home, chain, tmp_path) -> None:
    (tmp_path / "bug.py").write_text(
        "from mixar.objectives import MixARObjective\nfrom mixar.train import main\n"
        "def loss(*_):\n    raise ZeroDivisionError('a bug')\nMixARObjective.loss = loss\nmain()\n"
    )
    command = f"python -u {tmp_path}/bug.py {home}/config.yaml run_dir={tmp_path}/run"
    (tmp_path / "job.sh").write_text(f"#!/bin/bash\nsource slurm/common.sh\nrun {command}\n")
    job = cluster.submit("--nodes=2", FEW, "--requeue", "--open-mode=append", tmp_path / "job.sh", MAX_RESTARTS="10",
                         PYTHONPATH=str(ROOT))  # fmt: skip
    ended = cluster.finish(job, 300)
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("FAILED", "2", "1:0"), cluster.log(job)
    assert "ZeroDivisionError: a bug" in cluster.log(job) and "it fails each time" in cluster.log(job)


def test_a_node_without_power_is_replaced(cluster, home, chain) -> None:
    run = home / "unplugged"
    job = cluster.submit(*TRAIN, home / "config.yaml", f"run_dir={run}")
    cluster.wait("a checkpoint", lambda: checkpoints(run), job)
    assert cluster.jobs(job)[0]["NodeList"] == "n[1-2]"
    cluster("kill-node", "n2")
    ended = cluster.finish(job)
    cluster("start-node", "n2")
    assert (ended["JobState"], ended["Restarts"], ended["NodeList"]) == ("COMPLETED", "1", "n[1,3]"), cluster.log(job)
    assert "resuming from" in cluster.log(job) and equal(run, home / "run")


def test_a_time_limit_and_a_preemption_are_outlived(cluster, home, chain) -> None:
    run = home / "outlived"
    job = cluster.submit(*TRAIN, home / "config.yaml", f"run_dir={run}", "train.epochs=100000")
    cluster.wait("a checkpoint", lambda: checkpoints(run), job)
    before = cluster.jobs(job)[0]["Restarts"]  # 1 where a node that has just come back could not be reached
    cluster("run", "scontrol", "update", f"jobid={job}", "timelimit=5")  # the script wants its signal 10 minutes before
    cluster.wait("a requeue", lambda: cluster.jobs(job)[0]["Restarts"] != before, job)
    cluster("run", "scontrol", "update", f"jobid={job}", "timelimit=60")
    cluster.wait("a resumed run", lambda: cluster.log(job).count("resuming from") == 1, job)
    cluster.submit("--partition=urgent", "--nodes=3", "--exclusive", "--wrap=true")
    cluster.wait("another", lambda: cluster.log(job).count("resuming from") == 2, job)
    assert cluster.log(job).count("stopped, status 0") == 2
    cluster("run", "scancel", job)
    assert cluster.finish(job)["JobState"] == "CANCELLED"
