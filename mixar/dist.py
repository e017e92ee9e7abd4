"""This process among the others of a run: its launcher, rank, device and precision, and their collectives."""

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

from mixar import slurm as scheduler
from mixar.errors import PassingError, UserError
from mixar.failures import ON_CPU
from mixar.signals import end_at_once

T = TypeVar("T")

# torch's own engines and DeepSpeed call functions that torch has renamed, in every step
warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed")

_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FIX = "start with torchrun, deepspeed or srun; for one process: unset RANK WORLD_SIZE"


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
    """A mistake that another rank reports: this one ends with the same status, without a message of its own."""

    elsewhere = True

    def __init__(self, text: str, status: int = UserError.status) -> None:
        super().__init__(text)
        self.status = status


def share() -> tuple[int, int]:
    """(rank, world) for work that needs no process group, such as `mixar prepare`; (0, 1) outside of a job."""
    return scheduler.share()


def find() -> Place:
    """This process's place, from the environment of its launcher; it joins no process group.

    torchrun and deepspeed set RANK and related variables; under srun, `mixar.slurm` gives them.

    Raises:
        UserError: an environment that is incomplete or contradicts itself.
    """
    launcher, env = _environment()
    numbers = {}
    for name in _PLACE[:4]:
        if not env[name].isdecimal():
            raise UserError(f"{name}={env[name]} is not a number: {_FIX}")
        numbers[name] = int(env[name])
    rank, world, local_rank, local_world = numbers.values()
    if rank >= world or local_rank >= local_world or world % local_world:
        given = ", ".join(f"{name}={value}" for name, value in numbers.items())
        raise UserError(f"{given} contradict each other, nodes need equal numbers of ranks: {_FIX}")
    return Place(rank, world, _device(local_rank), local_rank, local_world, launcher)


def start(timeout: float) -> Place:
    """This process's place, joined with the others: gloo on CPUs, NCCL on GPUs.

    Args:
        timeout: seconds without a step after which a run logs its stacks; collectives fail 10 s later.

    Raises:
        UserError: as `find`, or several ranks on one GPU.
        PassingError: ranks that do not find each other.
    """
    place = find()
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives that NCCL keeps a record of, for `watch`
    store = None
    if place.world > 1:
        end_at_once()
    if place.launcher == scheduler.LAUNCHER:
        os.environ.update(_environment()[1])  # torch and DeepSpeed read these names under any launcher
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
    """Create the process group; without a `store`, at the address and port in the environment.

    A single process, whose engine may need a group too, needs no address.

    Raises:
        UserError: several ranks on one GPU.
        PassingError: ranks that do not find each other.
    """
    if c10d.is_initialized():
        return
    gpu = place.device.type == "cuda"
    card = str(torch.cuda.get_device_properties(place.device).uuid) if gpu else ""
    try:
        if place.world == 1:
            store = c10d.HashStore()
        elif store is None:
            store, *_ = next(c10d.rendezvous("env://", place.rank, place.world, timeout=_limit(timeout)))
        if gpu and place.local_world > 1:
            _refuse_shared_card(place, card, store)
        c10d.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=_limit(timeout), rank=place.rank,
            world_size=place.world, device_id=place.device if gpu else None, store=store,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:  # torch's connection errors are of these classes
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        text = f"rank {place.rank} of {place.world} did not meet the others at {address}:{port} ({_one_line(error)})"
        if "EADDRINUSE" in str(error):
            text += f": another process listens there, `ss -ltnp 'sport = :{port}'` names it; end it, or start with "
            text += "another port: deepspeed --master_port, torchrun --master_port, or MASTER_PORT for srun"
        else:
            text += ": check that every rank was started, and that all nodes can reach this address and port of rank 0"
        raise PassingError(text) from None


def _refuse_shared_card(place: Place, card: str, store: c10d.Store) -> None:
    """Refuse, on every rank, two ranks on one GPU, with which NCCL would fail for a reason that it does not report.

    Args:
        card: the identity of this rank's GPU; its number is 0 in each process that sees one alone.
    """
    ranks = range(place.world)
    store.set(f"card {place.rank}", card)
    cards = [found.decode() for found in store.multi_get([f"card {rank}" for rank in ranks])]
    again = next((rank for rank in ranks if cards[rank] in cards[:rank]), None)
    if again is None:
        return
    store.set(f"read {place.rank}", "")
    if not place.is_main:
        raise ElsewhereError("two ranks have the same GPU")
    store.wait([f"read {rank}" for rank in ranks])  # the store may end with this process
    raise UserError(
        f"ranks {cards.index(cards[again])} and {again} have the same GPU ({cards[again]}): start one process per GPU, "
        f"such as torchrun --nproc_per_node=1, deepspeed --num_gpus=1 or srun --gpus-per-task=1; {ON_CPU}"
    )


def _meet(place: Place, timeout: float) -> c10d.TCPStore:
    """The store of a Slurm step's ranks, on a free port of rank 0's node.

    Rank 0 announces that port on the first free one of a fixed list of ports: some may be taken by another job, or by
    remains of a requeued one.
    """
    job = scheduler.job()
    word = f"mixar {'.'.join(job)}"
    # below the range from which the kernel assigns ports
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
            except (OSError, UnicodeDecodeError):  # no answer, or that of another program
                continue
            if said == word:
                return c10d.TCPStore(address, int(found), place.world, False, limit)
        time.sleep(0.2)
    raise PassingError(
        f"rank {place.rank} of {place.world} did not meet rank 0 on {address} within {timeout + 10:g} s: check that "
        "every rank was started, and that all nodes can reach this address"
    )


def _announce(word: str, ports: list[int]) -> None:
    """Send `word` to every connection to the first free one of `ports`, as long as this process lives."""
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
    """Destroy the process group, where there is one."""
    if c10d.is_initialized():
        c10d.destroy_process_group()


def among_others() -> bool:
    """Whether other ranks have joined this one."""
    return c10d.is_initialized() and c10d.get_world_size() > 1


def is_loss_of_others(error: BaseException) -> bool:
    """Whether a collective failed because another rank has ended or hangs: gloo's errors have no class of their own."""
    return isinstance(error, c10d.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def end(status: int) -> NoReturn:
    """End this process alone and at once. After an error the others may wait for it until their launcher ends them.

    The interpreter is not shut down: that would wait for the threads of a running exchange, or abort in threads that
    libraries leave behind.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error about a killed worker here
    for worker in multiprocessing.active_children():
        worker.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def side_group(place: Place, timeout: float) -> Any:
    """A second group of all ranks, on CPUs, with its time limit; None for a single process."""
    return c10d.new_group(backend="gloo", timeout=_limit(timeout)) if place.world > 1 else None


def limit_groups(timeout: float) -> None:
    """Give every process group the run's time limit: those of libraries have torch's default of up to 30 minutes."""
    for group in list(c10d.distributed_c10d._world.pg_map):
        c10d.distributed_c10d._set_pg_timeout(_limit(timeout), group)


def _limit(timeout: float) -> timedelta:
    return timedelta(seconds=timeout + 10)


def on_main(place: Place, work: Callable[[], T]) -> T:
    """Do `work` on rank 0 alone and return its result on every rank; a collective.

    Raises:
        Exception: on rank 0, the error of `work`; on the others an `ElsewhereError` for a `UserError`, else a
            RuntimeError.
    """
    if place.world == 1:
        return work()
    outcome: list[Any] = [None, None]
    failure: BaseException | None = None
    if place.is_main:
        try:
            outcome[0] = work()
        except BaseException as error:  # the others wait, and must learn of any error
            failure, outcome[1] = error, (error.status if isinstance(error, UserError) else None, _one_line(error))
    c10d.broadcast_object_list(outcome, device=torch.device("cpu"))
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        status, text = outcome[1]
        raise RuntimeError(f"rank 0 failed: {text}") if status is None else ElsewhereError(text, status)
    return cast(T, outcome[0])


def gather(place: Place, value: T, group: Any = None) -> list[T]:
    """The `value` of every rank, in rank order, on every rank; a collective of `group` or of all ranks."""
    if place.world == 1:
        return [value]
    values: list[Any] = [None] * place.world
    c10d.all_gather_object(values, value, group)
    return values


def on_each(place: Place, work: Callable[[], T], group: Any = None) -> list[T]:
    """Do `work` on every rank, and return the results of all or fail on all; a collective like `gather`.

    Raises:
        Exception: the error of `work` on this rank; where it failed only on others, an `ElsewhereError`.
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
    """Agreement of all ranks on one small number, the largest that any rank has given, with a delay of one step.

    The exchange runs on CPUs during the step, so that no step waits for it or for the device.
    """

    def __init__(self, place: Place, timeout: float) -> None:
        self.group = side_group(place, timeout)
        self._given = torch.zeros(1, dtype=torch.int64)
        self._work: Any = None

    def exchange(self, value: int) -> int:
        """Give `value`, and return the result of the previous exchange. Every rank calls it once per step."""
        if self.group is None:
            return value
        agreed = self.settle()
        self._given.fill_(value)
        self._work = c10d.all_reduce(self._given, c10d.ReduceOp.MAX, self.group, async_op=True)
        return agreed

    def settle(self) -> int:
        """Wait for the running exchange, and return its result; 0 where there is none."""
        if self._work is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._given)


def fast_precision(on: torch.device) -> str:
    """`bf16` where the hardware of device `on` multiplies it natively, else `fp32`."""
    if on.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def _environment() -> tuple[str, dict[str, str]]:
    """The launcher, and the six variables of `_PLACE`."""
    env = {name: os.environ[name] for name in _PLACE if name in os.environ}
    if "RANK" in env or "WORLD_SIZE" in env:
        deepspeed = "LOCAL_SIZE" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
        if deepspeed:  # its launcher uses another name
            env.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])
        if env.get("WORLD_SIZE") == "1":  # a single process needs no address, and is the first of its node
            env = {name: "0" for name in _PLACE} | {"LOCAL_WORLD_SIZE": "1"} | env
        if missing := [name for name in _PLACE if name not in env]:
            given = ", ".join(f"{name}={value}" for name, value in env.items())
            raise UserError(f"the environment has {given} but no {', '.join(missing)}: {_FIX}")
        return "deepspeed" if deepspeed else "torchrun", env
    _refuse_mpi("OMPI_COMM_WORLD", "MV2_COMM_WORLD")
    if started := scheduler.ranks():
        return scheduler.LAUNCHER, started
    _refuse_mpi("PMI")  # srun sets these too
    return "python", {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def _refuse_mpi(*prefixes: str) -> None:
    """Refuse to run under mpirun, where every rank would take itself for the only one."""
    for prefix in prefixes:
        rank, size = (os.environ.get(f"{prefix}_{name}", "1") for name in ("RANK", "SIZE"))
        if size != "1":
            raise UserError(f"{prefix}_RANK={rank} and {prefix}_SIZE={size} come from mpirun, which mixar does "
                            "not support: start with torchrun, deepspeed or srun")  # fmt: skip


def _device(local_rank: int) -> torch.device:
    """This process's accelerator, or the CPU."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not cards:
        return torch.device("cpu")
    if cards == 1:  # also where Slurm shows each task only its own card
        return torch.device("cuda", 0)
    if local_rank >= cards:
        raise UserError(
            f"LOCAL_RANK={local_rank}, but this node shows {cards} GPUs: start at most {cards} processes per node"
        )
    return torch.device("cuda", local_rank)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
