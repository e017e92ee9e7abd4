"""Where this process stands: its launcher, its rank among the others, its device, its precision."""

import atexit
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as c10d

from mixar.errors import PassingError, UserError

T = TypeVar("T")

# torch's own engines and DeepSpeed call what torch has just renamed, once a step
warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed")

_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_MEND = "start with torchrun, deepspeed or srun, which set all of them; for one process: unset RANK WORLD_SIZE"


@dataclass(frozen=True)
class Place:
    """One process of a run."""

    rank: int
    world: int
    device: torch.device
    local_rank: int = 0  # among the processes of its node
    local_world: int = 1
    launcher: str = "python"  # deepspeed | torchrun | srun | python

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def nodes(self) -> int:
        return self.world // self.local_world

    def autocast(self, precision: str) -> AbstractContextManager:
        """bfloat16 autocast for `bf16`, float32 for `fp32`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")


class ElsewhereError(UserError):
    """A mistake that another rank has told of: this one ends as that does, without a line of its own."""

    def __init__(self, text: str, status: int = UserError.status) -> None:
        super().__init__(text)
        self.status = status


def find() -> Place:
    """This process's place from its launcher's environment; joins no others.

    torchrun and deepspeed set RANK and its kin. Under srun they follow from SLURM_*, but only in a job step: the batch
    shell has SLURM_PROCID too, and is no rank of anything.

    Raises:
        UserError: an environment that is half set or contradicts itself.
    """
    launcher, env = _environment()
    numbers = {}
    for name in _PLACE[:4]:
        if not env[name].isdecimal():
            raise UserError(f"{name}={env[name]} is no number: {_MEND}")
        numbers[name] = int(env[name])
    rank, world, local_rank, local_world = numbers.values()
    if rank >= world or local_rank >= local_world or world % local_world:
        told = ", ".join(f"{name}={value}" for name, value in numbers.items())
        raise UserError(f"{told} contradict each other, nodes must hold equally many ranks: {_MEND}")
    return Place(rank, world, _device(local_rank), local_rank, local_world, launcher)


def start(timeout: float) -> Place:
    """This process's place, joined with the others: gloo on CPUs, NCCL on GPUs.

    Args:
        timeout: seconds without a step after which a run tells its stacks; collectives fail 10 s later.

    Raises:
        UserError: as `find`; PassingError: ranks that do not find each other.
    """
    place = find()
    if place.launcher == "srun":
        os.environ.update(_from_slurm())  # torch and DeepSpeed look for these names, whatever the launcher
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    elif place.local_world > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_world))
    if place.world > 1:
        join(place, timeout)
    return place


def join(place: Place, timeout: float) -> None:
    """Make the process group; a lone process, whose engine wants one all the same, needs no address for it."""
    if c10d.is_initialized():
        return
    gpu = place.device.type == "cuda"
    alone: dict[str, Any] = {"store": c10d.HashStore()} if place.world == 1 else {}
    try:
        c10d.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(seconds=timeout + 10), rank=place.rank,
            world_size=place.world, device_id=place.device if gpu else None, **alone,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:  # torch's own errors of connection are of these families
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise PassingError(
            f"rank {place.rank} of {place.world} did not meet the others at {where} ({_one_line(error)}): see that "
            "every rank was started, and that the address and port of rank 0's node can be reached from all nodes"
        ) from None


def leave() -> None:
    """Give up the process group, if there is one."""
    if c10d.is_initialized():
        c10d.destroy_process_group()


def abandon(status: int) -> None:
    """Let this process end without the others, who may be waiting for it in a collective: their launcher ends them.

    It ends with `status` where the interpreter would else be torn down, since the threads of an exchange that is under
    way can abort it then. Does nothing where there are no others.
    """
    if c10d.is_initialized() and c10d.get_world_size() > 1:
        atexit.register(_end, status)


def _end(status: int) -> None:
    for worker in multiprocessing.active_children():
        worker.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def on_main(place: Place, work: Callable[[], T]) -> T:
    """Do `work` on rank 0 alone and return its result on every rank; a collective.

    Raises:
        UserError: on rank 0, what `work` raised; on the others an `ElsewhereError`.
    """
    if place.world == 1:
        return work()
    told: list[Any] = [None, None]
    failure: BaseException | None = None
    if place.is_main:
        try:
            told[0] = work()
        except BaseException as error:  # the others wait: they must hear of whatever it was
            failure, told[1] = error, (error.status if isinstance(error, UserError) else None, _one_line(error))
    c10d.broadcast_object_list(told, device=torch.device("cpu"))
    if failure is not None:
        raise failure
    if told[1] is not None:
        status, text = told[1]
        raise RuntimeError(f"rank 0 failed: {text}") if status is None else ElsewhereError(text, status)
    return cast(T, told[0])


def gather(place: Place, value: T) -> list[T]:
    """The `value` of every rank, in their order, on every rank; a collective."""
    if place.world == 1:
        return [value]
    values: list[Any] = [None] * place.world
    c10d.all_gather_object(values, value)
    return values


class Agreement:
    """One small number all ranks agree on a step late: the largest that any of them brought.

    The exchange runs beside the step on CPUs, so that no step waits for it or for the device.
    """

    def __init__(self, place: Place) -> None:
        self.group: Any = c10d.new_group(backend="gloo") if place.world > 1 else None
        self._brought = torch.zeros(1, dtype=torch.int64)
        self._work: Any = None

    def exchange(self, value: int) -> int:
        """Bring `value`; returns what the ranks agreed on in the exchange before. Every rank calls it once a step."""
        if self.group is None:
            return value
        agreed = self.settle()
        self._brought.fill_(value)
        self._work = c10d.all_reduce(self._brought, c10d.ReduceOp.MAX, self.group, async_op=True)
        return agreed

    def settle(self) -> int:
        """Wait for the exchange that is under way, and return what it agreed on; 0 without any."""
        if self._work is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._brought)


def fast_precision(on: torch.device) -> str:
    """`bf16` where the hardware multiplies it natively, else `fp32`."""
    if on.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def _environment() -> tuple[str, dict[str, str]]:
    """The launcher, and the six variables of `_PLACE`."""
    env = {name: os.environ[name] for name in _PLACE if name in os.environ}
    if "RANK" in env or "WORLD_SIZE" in env:
        deepspeed = "LOCAL_SIZE" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
        if deepspeed:  # its launcher has a name of its own for it
            env.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])
        if env.get("WORLD_SIZE") == "1":  # who is alone needs no address, and is the first of its node
            env = {name: "0" for name in _PLACE} | {"LOCAL_WORLD_SIZE": "1"} | env
        if missing := [name for name in _PLACE if name not in env]:
            told = ", ".join(f"{name}={value}" for name, value in env.items())
            raise UserError(f"the environment has {told} but no {', '.join(missing)}: {_MEND}")
        return "deepspeed" if deepspeed else "torchrun", env
    if "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ:
        return "srun", _from_slurm()
    return "python", {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def _from_slurm() -> dict[str, str]:
    slurm = os.environ.get
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
        # two jobs on one node must not meet; below the range that the kernel hands out by itself
        port = 15000 + int(slurm("SLURM_JOB_ID", "0")) % 15000
        env |= {"MASTER_ADDR": slurm("MASTER_ADDR") or _first_host(slurm("SLURM_STEP_NODELIST", ""))}
        env |= {"MASTER_PORT": slurm("MASTER_PORT") or str(port)}
    return env


def _first_host(nodes: str) -> str:
    """The first host of a list in Slurm's notation; the usual ones need no scontrol, which containers often lack."""
    if usual := re.match(r"([\w.-]+)(?:\[(\d+)[-,\d]*\])?(?:,|$)", nodes):
        return usual[1] + (usual[2] or "")
    if shutil.which("scontrol"):
        told = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
        if told.returncode == 0:
            return told.stdout.split()[0]
    raise UserError(f"the first node of {nodes} is unknown here: export MASTER_ADDR=<its name> before srun")


def _device(local_rank: int) -> torch.device:
    """This process's accelerator, or the CPU."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not cards:
        return torch.device("cpu")
    if cards == 1:  # also where Slurm shows each task its own card only
        return torch.device("cuda", 0)
    if local_rank >= cards:
        raise UserError(
            f"LOCAL_RANK={local_rank}, but this node shows {cards} GPUs: start at most {cards} processes a node"
        )
    return torch.device("cuda", local_rank)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
