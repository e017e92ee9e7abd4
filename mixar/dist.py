"""Where this process stands: its launcher, its rank among the others, its device, its precision."""

import errno
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as c10d

from mixar import slurm
from mixar.errors import PassingError, UserError
from mixar.signals import end_at_once

T = TypeVar("T")

# torch's own engines and DeepSpeed call what torch has just renamed, once a step
warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed")

_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_MEND = "start with torchrun, deepspeed or srun; for one process: unset RANK WORLD_SIZE"


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
    """A mistake that another rank tells of: this one ends as that does, without a line of its own."""

    elsewhere = True

    def __init__(self, text: str, status: int = UserError.status) -> None:
        super().__init__(text)
        self.status = status


def find() -> Place:
    """This process's place from its launcher's environment; joins no others.

    torchrun and deepspeed set RANK and its kin; under srun they follow from `mixar.slurm`.

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
    store = None
    if place.world > 1:
        end_at_once()
    if place.launcher == "srun":
        os.environ.update(_environment()[1])  # torch and DeepSpeed look for these names, whatever the launcher
        if place.world > 1 and "MASTER_PORT" not in os.environ:
            store = _meet(place, timeout)
            os.environ["MASTER_PORT"] = str(store.port)
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    elif place.local_world > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_world))
    if place.world > 1:
        join(place, timeout, store)
    return place


def join(place: Place, timeout: float, store: c10d.Store | None = None) -> None:
    """Make the process group, at the address and port of the environment where there is no `store` yet.

    A lone process, whose engine wants a group all the same, needs no address for it.
    """
    if c10d.is_initialized():
        return
    gpu = place.device.type == "cuda"
    store = c10d.HashStore() if place.world == 1 else store
    try:
        c10d.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=_limit(timeout), rank=place.rank,
            world_size=place.world, device_id=place.device if gpu else None, store=store,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:  # torch's own errors of connection are of these families
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        told = f"rank {place.rank} of {place.world} did not meet the others at {address}:{port} ({_one_line(error)})"
        if "EADDRINUSE" in str(error):
            told += f": another process listens there, `ss -ltnp 'sport = :{port}'` names it; end it, or start with "
            told += "another port: deepspeed --master_port, torchrun --master_port, or MASTER_PORT for srun"
        else:
            told += ": see that every rank was started, and that the address and port of rank 0's node can be reached "
            told += "from all nodes"
        raise PassingError(told) from None


def _meet(place: Place, timeout: float) -> c10d.TCPStore:
    """The store of a Slurm step's ranks, on any free port of rank 0's node.

    Rank 0 tells the port to whoever asks at the first of a row of agreed ones that it can have: one may be held by
    another job, or by what a requeued job has left behind.
    """
    job = slurm.job()
    word = f"mixar {'.'.join(job)}"
    # below the range that the kernel hands out by itself
    ports = [15000 + (int(job[0]) + 1009 * i) % 15000 for i in range(16)]
    address, limit = os.environ["MASTER_ADDR"], _limit(timeout)
    if place.is_main:
        store = c10d.TCPStore(address, 0, place.world, True, limit, wait_for_workers=False)
        _announce(f"{word} {store.port}\n", ports)
        return store
    end = time.monotonic() + limit.total_seconds()
    while time.monotonic() < end:
        for port in ports:
            try:
                with socket.create_connection((address, port), timeout=2) as asking:
                    said, _, found = asking.makefile().readline().rpartition(" ")
            except (OSError, UnicodeDecodeError):  # nobody there, or somebody else
                continue
            if said == word:
                return c10d.TCPStore(address, int(found), place.world, False, limit)
        time.sleep(0.2)
    raise PassingError(
        f"rank {place.rank} of {place.world} did not meet rank 0 on {address} within {timeout + 10:g} s: see that "
        "every rank was started, and that this node can be reached from all others"
    )


def _announce(word: str, ports: list[int]) -> None:
    """Tell `word` to whoever connects to the first of `ports` that is free, for as long as this process lives."""
    for port in ports:
        try:
            six = socket.has_dualstack_ipv6()
            server = socket.create_server(
                ("", port), family=socket.AF_INET6 if six else socket.AF_INET, dualstack_ipv6=six
            )
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            continue

        def serve(server: socket.socket = server) -> None:
            while True:
                with suppress(OSError), server.accept()[0] as asking:
                    asking.sendall(word.encode())

        threading.Thread(target=serve, name="meeting", daemon=True).start()
        return
    raise PassingError(
        f"the ports {', '.join(map(str, ports))} of this node are all in use (EADDRINUSE): export MASTER_PORT=<a free "
        "one> before srun"
    )


def leave() -> None:
    """Give up the process group, if there is one."""
    if c10d.is_initialized():
        c10d.destroy_process_group()


def among_others() -> bool:
    """Whether other ranks have joined this one."""
    return c10d.is_initialized() and c10d.get_world_size() > 1


def is_loss_of_others(error: BaseException) -> bool:
    """Whether a collective failed since another rank has ended or hangs: gloo's errors have no class of their own."""
    return isinstance(error, c10d.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def end(status: int) -> NoReturn:
    """End this process at once, alone: the others may wait for it in a collective, until their launcher ends them.

    The interpreter is not torn down: threads of an exchange that is under way would be waited for, or abort it.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise here that a worker was killed
    for worker in multiprocessing.active_children():
        worker.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def side_group(place: Place, timeout: float) -> Any:
    """A group of all ranks on CPUs beside the training's own, with its time limit; None for a lone process."""
    return c10d.new_group(backend="gloo", timeout=_limit(timeout)) if place.world > 1 else None


def limit_groups(timeout: float) -> None:
    """Give every process group the run's time limit: libraries make theirs with torch's own, of up to 30 minutes."""
    for group in list(c10d.distributed_c10d._world.pg_map):
        c10d.distributed_c10d._set_pg_timeout(_limit(timeout), group)


def _limit(timeout: float) -> timedelta:
    return timedelta(seconds=timeout + 10)


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


def gather(place: Place, value: T, group: Any = None) -> list[T]:
    """The `value` of every rank, in their order, on every rank; a collective, of `group` where one is given."""
    if place.world == 1:
        return [value]
    values: list[Any] = [None] * place.world
    c10d.all_gather_object(values, value, group)
    return values


def on_each(place: Place, work: Callable[[], T], group: Any = None) -> list[T]:
    """Do `work` on every rank: the results of all, or an error on all of them; a collective as `gather`.

    Raises:
        Exception: what `work` raised here; where it raised elsewhere alone, an `ElsewhereError`.
    """
    result: Any = None
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    found = gather(place, (result, failure and f"{type(failure).__name__}: {_one_line(failure)}"), group)
    if failure is not None:
        raise failure
    for rank, (_, text) in enumerate(found):
        if text is not None:
            raise ElsewhereError(f"rank {rank}: {text}")
    return [value for value, _ in found]


class Agreement:
    """One small number all ranks agree on a step late: the largest that any of them brought.

    The exchange runs beside the step on CPUs, so that no step waits for it or for the device.
    """

    def __init__(self, place: Place, timeout: float) -> None:
        self.group = side_group(place, timeout)
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
    _refuse_mpi("OMPI_COMM_WORLD", "MV2_COMM_WORLD")
    if started := slurm.ranks():
        return "srun", started
    _refuse_mpi("PMI")  # srun sets these too
    return "python", {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def _refuse_mpi(*prefixes: str) -> None:
    """Refuse the ranks of mpirun, each of which would believe to be alone."""
    for prefix in prefixes:
        rank, size = (os.environ.get(f"{prefix}_{name}", "1") for name in ("RANK", "SIZE"))
        if size != "1":
            raise UserError(f"{prefix}_RANK={rank} and {prefix}_SIZE={size} tell of mpirun, whose ranks mixar "
                            "does not take: start with torchrun, deepspeed or srun")  # fmt: skip


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
