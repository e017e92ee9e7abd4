"""The processes of a loader: their start, and their end by a kill, such as the kernel's for want of memory."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader

from mixar.errors import PassingError, UserError


def started(loader: DataLoader[Any]) -> tuple[Iterator[Any], list[BaseProcess]]:
    """A loader's iterator, and the processes that it started; it has no public list of them."""
    others = active_children()
    batches = iter(loader)
    return batches, [process for process in active_children() if process not in others]


@contextmanager
def watching(workers: list[BaseProcess]) -> Iterator[None]:
    """Report the end of one of a loader's `workers`, whatever error the reading of its batches ran into.

    Raises:
        PassingError: one has ended before the loader did.
    """
    if workers:  # torch would raise wherever the main thread then is, not where the batches are read
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    except Exception as error:
        # its pipe may break a moment before its end is known
        if isinstance(error, UserError) or not wait([worker.sentinel for worker in workers], timeout=1):
            raise
        raise PassingError(
            "a loader process was killed, most often for want of memory: give the job more of it, or write a smaller "
            "data.workers"
        ) from None
