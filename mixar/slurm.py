"""What Slurm says of the processes that it starts; nobody else reads SLURM_*, but for the job scripts in slurm/.

Another scheduler is a file of these three functions beside it, asked where this one is: `mixar.dist`, `mixar prepare`.
"""

import os
import re
import shutil
import subprocess

from mixar.errors import UserError


def job() -> list[str]:
    """The numbers of the job, of its step and of its restart, which together name what was started at once."""
    return [os.environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT")]


def ranks() -> dict[str, str] | None:
    """This task of a step in the variables that torchrun sets; None outside of a step.

    The batch shell is outside: it has SLURM_PROCID too, and is no rank of anything.

    Raises:
        UserError: nodes that hold unequally many tasks, or a list of nodes whose first name is unknown.
    """
    slurm = os.environ.get
    if "SLURM_STEP_ID" not in os.environ or "SLURM_PROCID" not in os.environ:
        return None
    world, nodes = slurm("SLURM_STEP_NUM_TASKS", "1"), slurm("SLURM_STEP_NUM_NODES", "1")
    counts: list[str] = []  # tasks of each node, which Slurm writes as 8(x4) or 8,7
    for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", slurm("SLURM_STEP_TASKS_PER_NODE", "1")):
        counts += [count] * int(times or 1)
    if len(set(counts)) != 1 or len(counts) != int(nodes):
        raise UserError(
            f"srun put {slurm('SLURM_STEP_TASKS_PER_NODE')} tasks on {nodes} nodes, and nodes must hold equally many: "
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
    """(rank, world) over the tasks of this step in all elements of this array job; (0, 1) outside of both."""
    given = {name.removeprefix("SLURM_"): value for name, value in os.environ.items()}
    rank, world = 0, 1
    if "STEP_ID" in given:  # without it this is the batch script, which has a PROCID too
        rank, world = int(given["PROCID"]), int(given["STEP_NUM_TASKS"])
    if "ARRAY_TASK_ID" in given:
        element, first = int(given["ARRAY_TASK_ID"]), int(given["ARRAY_TASK_MIN"])
        step = int(given.get("ARRAY_TASK_STEP", 1))  # some schedulers that speak Slurm's language leave it out
        rank, world = (element - first) // step * world + rank, int(given["ARRAY_TASK_COUNT"]) * world
    return rank, world


def _first_host(nodes: str) -> str:
    """The first host of a list in Slurm's notation; the usual ones need no scontrol, which containers often lack."""
    if usual := re.match(r"([\w.-]+)(?:\[(\d+)[-,\d]*\])?(?:,|$)", nodes):
        return usual[1] + (usual[2] or "")
    if shutil.which("scontrol"):
        told = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
        if told.returncode == 0:
            return told.stdout.split()[0]
    raise UserError(f"the first node of {nodes} is unknown here: export MASTER_ADDR=<its name> before srun")
