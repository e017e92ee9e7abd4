"""The ranks and jobs of Slurm. No other Python file reads SLURM_*.

To support another scheduler, write the same names in a file beside this one, and import that in `mixar.dist`.
"""

import os
import re
import shutil
import subprocess

from mixar.errors import UserError

LAUNCHER = "srun"  # the command that starts the ranks


def job() -> list[str]:
    """The numbers of the job, its step and its restart, which together identify one start of processes."""
    return [os.environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT")]


def ranks() -> dict[str, str] | None:
    """The rank of this task in the variables that torchrun sets; None outside of a step.

    The batch shell is outside of all steps, although it has a SLURM_PROCID.

    Raises:
        UserError: nodes with unequal numbers of tasks, or a list of nodes whose first host is unknown.
    """
    slurm = os.environ.get
    if "SLURM_STEP_ID" not in os.environ or "SLURM_PROCID" not in os.environ:
        return None
    world, nodes = slurm("SLURM_STEP_NUM_TASKS", "1"), slurm("SLURM_STEP_NUM_NODES", "1")
    counts: list[str] = []  # tasks of each node, written by Slurm as 8(x4) or 8,7
    for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", slurm("SLURM_STEP_TASKS_PER_NODE", "1")):
        counts += [count] * int(times or 1)
    if len(set(counts)) != 1 or len(counts) != int(nodes):
        raise UserError(
            f"srun put {slurm('SLURM_STEP_TASKS_PER_NODE')} tasks on {nodes} nodes, but nodes need equal numbers: "
            "write srun --ntasks-per-node=<GPUs of a node>"
        )
    env = {
        "RANK": slurm("SLURM_PROCID", "0"), "WORLD_SIZE": world, "LOCAL_RANK": slurm("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": counts[0],
    }  # fmt: skip
    if world != "1":
        env["MASTER_ADDR"] = slurm("MASTER_ADDR") or _first_host(slurm("SLURM_STEP_NODELIST", ""))
    return env


def share() -> tuple[int, int]:
    """(rank, world) of this task among those of all elements of an array job; (0, 1) outside of steps and arrays."""
    given = {name.removeprefix("SLURM_"): value for name, value in os.environ.items()}
    rank, world = 0, 1
    if "STEP_ID" in given:  # without it, this is the batch shell, which has a PROCID too
        rank, world = int(given["PROCID"]), int(given["STEP_NUM_TASKS"])
    if "ARRAY_TASK_ID" in given:
        element, first = int(given["ARRAY_TASK_ID"]), int(given["ARRAY_TASK_MIN"])
        step = int(given.get("ARRAY_TASK_STEP", 1))  # schedulers that imitate Slurm may leave it out
        rank, world = (element - first) // step * world + rank, int(given["ARRAY_TASK_COUNT"]) * world
    return rank, world


def _first_host(nodes: str) -> str:
    """The first host of a list in Slurm's notation. Usual lists need no scontrol, which containers often lack."""
    if usual := re.match(r"([\w.-]+)(?:\[(\d+)[-,\d]*\])?(?:,|$)", nodes):
        return usual[1] + (usual[2] or "")
    if shutil.which("scontrol"):
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
        if listed.returncode == 0:
            return listed.stdout.split()[0]
    raise UserError(f"the first node of {nodes} is unknown here: export MASTER_ADDR=<its name> before srun")
