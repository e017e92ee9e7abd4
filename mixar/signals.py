"""Signals that ask a run to end: they are handled between two steps, and not by its worker processes."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

# sent by a scheduler, Ctrl-C, or a terminal that closes
STOPPING = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)


@contextmanager
def held_back() -> Iterator[None]:
    """Block the signals that ask for an end in this thread, and permanently in processes that it forks meanwhile.

    When a signal to the process group ends a run, the run needs its workers for a few more batches.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_at_once() -> None:
    """Let the signals that act like Ctrl-C, except Ctrl-C itself, end this process at once without a message.

    While it waits for other ranks, torch does not let python handle them.
    """
    for number in STOPPING:
        if number != signal.SIGINT and signal.getsignal(number) is signal.default_int_handler:
            signal.signal(number, signal.SIG_DFL)


class Signals(AbstractContextManager):
    """Catches the signals that ask for an end, so that a run can end between two steps; restores them on exit.

    Signals that were ignored before, as under nohup, stay ignored. The end of the launcher counts as a signal, since
    some signals end the launcher without reaching its ranks.

    Args:
        launcher: as named in `Place`.
    """

    def __init__(self, launcher: str) -> None:
        self._caught: str | None = None
        self._before: dict[signal.Signals, Any] = {}
        launched = launcher == "deepspeed" or "TORCHELASTIC_RUN_ID" in os.environ
        self._above = ancestors() if launched else []

    @property
    def caught(self) -> str | None:
        """The name of the caught signal; None if there is none."""
        if self._caught is None and self._above and ancestors() != self._above:
            self._caught = "end of its launcher"
        return self._caught

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # python handles signals in no other thread
            for number in STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._caught = signal.Signals(number).name


def ancestors() -> list[int]:
    """The parent process, and its parent if that is also a launcher, as with `deepspeed`."""
    parent = os.getppid()
    try:
        # the name in parentheses may contain anything; state and parent follow
        above = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
        launches = b"deepspeed" in Path(f"/proc/{above}/cmdline").read_bytes()
    except (OSError, ValueError, IndexError):  # the process has ended, or this is not Linux
        return [parent]
    return [parent, above] if launches else [parent]
