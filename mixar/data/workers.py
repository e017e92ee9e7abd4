"""Loader processes that are killed, by the kernel for want of memory for one."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

from mixar.errors import PassingError, UserError


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
