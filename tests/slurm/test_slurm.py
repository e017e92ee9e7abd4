"""The job scripts as they are, on a real Slurm: they train, and what interrupts them ends in a resumed run."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mixar.evaluation.classifier import save_classifier, train_classifier
from mixar.weights import read_export

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*(ROOT / "slurm").glob("*.sh"), Path(__file__).with_name("cluster.sh")])
TRAIN = ("--nodes=2", "--ntasks-per-node=1", "slurm/train_l.sh")  # its 16 tasks would share two cores


def weights(run: Path) -> dict[str, torch.Tensor]:
    (export,) = (run / "exports").iterdir()
    return read_export(export, "mixar")[1]


def equal(a: Path, b: Path) -> bool:
    return all(torch.equal(weights(a)[name], value) for name, value in weights(b).items())


def checkpoints(run: Path) -> int:
    return len(list((run / "checkpoints").glob("*/DONE")))


@pytest.fixture(scope="module")
def whole(cluster, home) -> Path:
    """A run on two nodes that nothing interrupted."""
    run = home / "whole"
    job = cluster.submit(*TRAIN, home / "config.yaml", f"run_dir={run}")
    assert cluster.finish(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert "1 tasks a node" in cluster.log(job)
    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_sound(script) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--external-sources", script], check=True, cwd=ROOT)


@pytest.mark.parametrize(("script", "nodes"), [("train_b", 1), ("train_l", 2), ("train_h", 2), ("prepare", 1)])
def test_a_cluster_of_8_gpus_a_node_takes_them(cluster, script, nodes) -> None:
    assert "to start at" in cluster("run", "sbatch", "--test-only", f"--nodes={nodes}", f"slurm/{script}.sh")


def test_from_another_folder_it_says_where_to_submit(cluster) -> None:
    job = cluster.submit("--chdir=/", "slurm/train_l.sh")
    assert cluster.finish(job)["ExitCode"] == "2:0"
    assert "submit this from the repository's folder" in cluster.log(job)


def test_every_task_of_two_nodes_with_8_gpus_has_its_place(cluster, tmp_path) -> None:
    script = tmp_path / "job.sh"
    lines = (ROOT / "slurm" / "train_l.sh").read_text().splitlines()
    report = "'echo $SLURM_PROCID/$SLURM_STEP_NUM_TASKS $SLURM_LOCALID $CUDA_VISIBLE_DEVICES'"
    script.write_text("\n".join(lines[:-2] + [f"run bash -c {report}"]))
    job = cluster.submit(script)
    assert cluster.finish(job)["JobState"] == "COMPLETED", cluster.log(job)
    for rank in range(16):
        assert f"{rank}/16 {rank % 8} 0,1,2,3,4,5,6,7\n" in cluster.log(job)


def test_restarts_are_bounded(cluster, tmp_path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\nsource slurm/common.sh\nrun false\n")
    job = cluster.submit("--requeue", "--open-mode=append", script, MAX_RESTARTS="1")
    ended = cluster.finish(job)
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("FAILED", "1", "1:0"), cluster.log(job)
    assert "not requeued: this was restart 1 of MAX_RESTARTS=1" in cluster.log(job)


def test_a_mistake_is_not_requeued(cluster, home) -> None:
    job = cluster.submit(*TRAIN, home / "config.yaml", "model.guidence=none")
    ended = cluster.finish(job)
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("FAILED", "0", "2:0"), cluster.log(job)
    assert "Did you mean 'model.guidance'?" in cluster.log(job)


def test_a_signal_and_a_crash_end_in_the_same_weights(cluster, home, whole) -> None:
    run = home / "signalled"
    job = cluster.submit(*TRAIN, home / "config.yaml", f"run_dir={run}")
    cluster.wait("a checkpoint", lambda: checkpoints(run), job)
    cluster("run", "scancel", "--signal=USR2", job)
    cluster.wait("a requeue", lambda: cluster.jobs(job)[0]["Restarts"] == "1", job)
    assert "== " in cluster.log(job) and "stopped, status 0" in cluster.log(job)
    before = checkpoints(run)
    cluster.wait("a step after it", lambda: cluster.log(job).count("resuming from") == 1, job)
    cluster("run", "scancel", "--signal=KILL", f"{job}.0")
    ended = cluster.finish(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), cluster.log(job)
    assert before and equal(run, whole)


def test_a_node_without_power_is_replaced(cluster, home, whole) -> None:
    run = home / "unplugged"
    job = cluster.submit(*TRAIN, home / "config.yaml", f"run_dir={run}")
    cluster.wait("a checkpoint", lambda: checkpoints(run), job)
    assert cluster.jobs(job)[0]["NodeList"] == "n[1-2]"
    cluster("kill-node", "n2")
    ended = cluster.finish(job, 150)
    cluster("start-node", "n2")
    assert (ended["JobState"], ended["Restarts"], ended["NodeList"]) == ("COMPLETED", "1", "n[1,3]"), cluster.log(job)
    assert equal(run, whole)


def test_the_pipeline_runs_its_stages_in_order(cluster, home) -> None:
    pixels = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)
    save_classifier(home / "classifier", *train_classifier(pixels, torch.arange(64) % 2, 2, steps=2))
    said = cluster(
        "run", "slurm/pipeline.sh", "l", home / "config.yaml", f"run_dir={home}/chained",
        f"data.shards={home}/chained-shards", "train.epochs=10", "--", "--reference", home / "images", "--count", "8",
        "--extractor", home / "classifier", PREPARE_OPTIONS="--array=0-1", TRAIN_OPTIONS="--nodes=2 --ntasks-per-node=1",
        SBATCH_PARTITION="main", SBATCH_OUTPUT="/dev/null",
    )  # fmt: skip
    prepare, train, evaluate = (word.strip(",") for word in said.split()[1::2])
    cluster.finish(evaluate, 150)
    stages = [cluster.jobs(job) for job in (prepare, train, evaluate)]
    assert [job["JobState"] for stage in stages for job in stage] == ["COMPLETED"] * 4
    for before, after in zip(stages, stages[1:]):
        assert max(job["EndTime"] for job in before) <= after[0]["StartTime"]
    assert json.loads((home / "chained" / "eval" / "0-8.json").read_text())["n"] == 8


def test_a_failed_stage_cancels_what_follows(cluster, home) -> None:
    said = cluster("run", "slurm/pipeline.sh", "l", home / "config.yaml", f"data.shards={home}/none",
                   f"data.images={home}/nothing", "--", "--reference", home / "images", PREPARE_OPTIONS="--array=0-0")  # fmt: skip
    prepare, train, evaluate = (word.strip(",") for word in said.split()[1::2])
    cluster.finish(evaluate)
    assert [cluster.jobs(job)[0]["JobState"] for job in (prepare, train, evaluate)] == ["FAILED", "CANCELLED", "CANCELLED"]
