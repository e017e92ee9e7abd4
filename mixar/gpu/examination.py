"""The checks one after the other, each in a process of its own: after an error of CUDA, a process is lost."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import cast

import torch

from mixar.config import Config
from mixar.gpu.compiled import compiled_steps
from mixar.gpu.draws import random_numbers
from mixar.gpu.findings import Finding, failed
from mixar.gpu.operators import operators
from mixar.gpu.profiling import profiles
from mixar.gpu.ranks import engines
from mixar.gpu.sampling import sampling
from mixar.gpu.waits import waits

Check = Callable[[Config, torch.device], Iterator[Finding]]
CHECKS: dict[str, Check] = {
    "random numbers": random_numbers,
    "operators": operators,
    "waits": waits,
    "compiled step": compiled_steps,
    "profile": profiles,
    "sampling": sampling,
    "engines": engines,
}
SECONDS = 600.0  # of all checks together
_SPAWN = multiprocessing.get_context("spawn")  # CUDA does not survive a fork


def examine(
    cfg: Config, device: torch.device, checks: dict[str, Check] = CHECKS, seconds: float = SECONDS
) -> Iterator[Finding]:
    """The findings of all checks as they come; a check that crashes or hangs ends alone.

    Args:
        seconds: when they are over, the running check is ended, and the others are not run.
    """
    end = time.monotonic() + seconds
    for name, check in checks.items():
        if time.monotonic() < end:
            yield from _apart(name, check, cfg, device, end)
        else:
            yield Finding(name, "not run", f"the {seconds:g} seconds of all checks are over")


def _apart(name: str, check: Check, cfg: Config, device: torch.device, end: float) -> Iterator[Finding]:
    """The findings of a check in a process of its own."""
    ours, theirs = _SPAWN.Pipe(duplex=False)
    process = _SPAWN.Process(target=_send, args=(name, check, cfg, device, theirs))
    process.start()
    theirs.close()
    try:
        while ours.poll(max(0.0, end - time.monotonic())):
            yield ours.recv()
        yield Finding(name, "bad", "the check did not end in the time of all checks")
    except EOFError:  # the process has ended
        process.join()
        if process.exitcode:
            yield Finding(name, "bad", f"the process of the check ended with status {process.exitcode}")
    finally:
        process.kill()
        with suppress(ProcessLookupError):  # the launchers and compilers that it started
            os.killpg(cast(int, process.pid), signal.SIGKILL)
        process.join()


def _send(name: str, check: Check, cfg: Config, device: torch.device, pipe: Connection) -> None:
    os.setsid()  # a group to be ended as a whole
    try:
        for finding in check(cfg, device):
            pipe.send(finding)
    except Exception as error:
        pipe.send(failed(name, error))
