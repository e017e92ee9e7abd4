"""Where a process stands, from what each launcher gives it."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from mixar import dist, slurm
from mixar.errors import PassingError, UserError
from mixar.failures import ON_CPU
from tests.home import rank_environments

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "n1",
            "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none"}  # fmt: skip
DEEPSPEED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": "29500", "CROSS_RANK": "0", "CROSS_SIZE": "1"}  # fmt: skip
SRUN = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
        "SLURM_STEP_NODELIST": "n[3-4]"}  # fmt: skip
OTHERS = ("SLURM_", "TORCHELASTIC", "LOCAL_SIZE", "CROSS_", "OMPI_", "PMI_")


@pytest.fixture
def find(monkeypatch):
    """`find(environment)` in an environment that has nothing else of any launcher."""

    def run(environment: dict[str, str]) -> dist.Place:
        for name in list(dist.os.environ):
            if name in dist._PLACE or name.startswith(OTHERS):
                monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return dist.find()

    return run


@pytest.mark.parametrize(
    ("environment", "launcher", "place"),
    [
        ({}, "python", (0, 1, 0, 1)),
        (TORCHRUN, "torchrun", (5, 8, 1, 4)),
        (DEEPSPEED, "deepspeed", (1, 2, 1, 2)),
        (SRUN, "srun", (9, 16, 1, 8)),
        (SRUN | {"PMI_RANK": "9", "PMI_SIZE": "16"}, "srun", (9, 16, 1, 8)),  # srun sets these too
        ({"RANK": "0", "WORLD_SIZE": "1"}, "torchrun", (0, 1, 0, 1)),
        # the batch shell of a job is no rank of anything
        ({"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "16"}, "python", (0, 1, 0, 1)),
    ],
)
def test_each_launcher_s_place_is_found(find, environment, launcher, place) -> None:
    found = find(environment)
    assert (found.launcher, (found.rank, found.world, found.local_rank, found.local_world)) == (launcher, place)
    assert found.nodes == place[1] // place[3] and found.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "no LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0"}, "no WORLD_SIZE"),
        (TORCHRUN | {"RANK": "eight"}, "RANK=eight is not a number"),
        (TORCHRUN | {"RANK": "8"}, "contradict each other"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "3"}, "contradict each other"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "9,7"}, "nodes need equal numbers"),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8"}, "OMPI_COMM_WORLD_SIZE=8 come from mpirun"),
        (SRUN | {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8"}, "from mpirun"),  # its daemons are srun's
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "PMI_SIZE=2 come from mpirun"),
    ],
)
def test_a_half_set_environment_ends_with_a_sentence(find, environment, told) -> None:
    with pytest.raises(UserError, match=told) as error:
        find(environment)
    assert "torchrun" in str(error.value) or "srun" in str(error.value)


@pytest.mark.parametrize(("nodes", "first"), [("n7", "n7"), ("gpu-[08-11,14]", "gpu-08"), ("a3,b1", "a3")])
def test_the_first_node_without_scontrol(find, monkeypatch, nodes, first) -> None:
    find(SRUN | {"SLURM_STEP_NODELIST": nodes})
    monkeypatch.setenv("PATH", "")
    assert (slurm.ranks() or {})["MASTER_ADDR"] == first


def test_ranks_that_do_not_meet_say_so(find) -> None:
    place = find(TORCHRUN | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "1"})
    with pytest.raises(UserError, match=r"rank 1 of 8 did not meet the others at 127\.0\.0\.1:1"):
        dist.join(place, timeout=-9)


MEET = """
import sys, torch, torch.distributed as c10d
from mixar import dist
place = dist.start(60)
total = torch.ones(1)
c10d.all_reduce(total)
print(int(total), flush=True)
dist.leave()
"""


def test_ranks_of_a_step_meet_though_their_first_ports_are_taken(tmp_path) -> None:
    step = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2",
                   "MASTER_ADDR": "127.0.0.1", "SLURM_JOB_ID": "4711"}  # fmt: skip
    first = 15000 + 4711
    with socket.create_server(("", first)), socket.create_server(("", first + 1009)):  # one that never says a word
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", MEET], env=os.environ | step | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank},
                stdout=subprocess.PIPE, text=True,
            )
            for rank in "01"
        ]  # fmt: skip
        assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["2\n", "2\n"]


def test_a_port_in_use_is_told_as_one(find) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        place = find(TORCHRUN | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "LOCAL_RANK": "0",
                                 "TORCHELASTIC_USE_AGENT_STORE": "False"})  # fmt: skip
        with pytest.raises(PassingError, match=rf"EADDRINUSE.*another process listens there.*:{port}'"):
            dist.join(place, timeout=-5)


CARDS = """
import os, sys, types, torch
from mixar import dist, errors
torch.cuda.is_available, torch.cuda.device_count, torch.cuda.set_device = lambda: True, lambda: 1, lambda device: None
card = types.SimpleNamespace(uuid=sys.argv[1])
torch.cuda.get_device_properties = lambda device: card
# NCCL needs a GPU
dist.c10d.init_process_group = lambda *_, **given: print("joins with", given["device_id"], flush=True)
try:
    dist.start(60)
except errors.UserError as error:
    sys.exit(errors.report("mixar train", error))
"""


@pytest.mark.parametrize(("seen", "status"), [("GPU-{rank}", 0), ("GPU-7", 2)])
@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_ranks_with_a_card_each_are_told_from_ranks_on_one_card(launcher, seen, status) -> None:
    step = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2",
                   "MASTER_ADDR": "127.0.0.1", "SLURM_JOB_ID": "4713"}  # fmt: skip
    given = rank_environments(2)
    if launcher == "srun":
        given = [step | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", CARDS, seen.format(rank=rank)], env=os.environ | environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank, environment in enumerate(given)
    ]  # fmt: skip
    told = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [status] * 2, told
    if status == 0:
        assert told == [("joins with cuda:0\n", "")] * 2
    else:
        assert "ranks 0 and 1 have the same GPU (GPU-7): start one process per GPU" in told[0][1]
        assert ON_CPU in told[0][1] and told[1] == ("", "")
