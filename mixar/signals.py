"""The signals that ask for an end: heard between two steps by the run, and by no process that works for it."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

# a scheduler, Ctrl-C, a terminal that closes
STOPPING = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)


@contextmanager
def held_back() -> Iterator[None]:
    """Hold back the signals that ask for an end, in this thread and for good in processes that it forks meanwhile.

    A signal to the whole group asks a run for an end, which takes its workers for a few more batches.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_at_once() -> None:
    """Let the signals that do what Ctrl-C does, but for Ctrl-C itself, end this process without a word.

    While it waits for other ranks, torch gives python no chance to handle them.
    """
    for number in STOPPING:
        if number != signal.SIGINT and signal.getsignal(number) is signal.default_int_handler:
            signal.signal(number, signal.SIG_DFL)


class Signals(AbstractContextManager):
    """Takes the signals that ask for an end, so that a run can end between two steps. Put back on leaving.

    Signals that were ignored before, as under nohup, stay ignored. The end of a launcher counts as one: of what some
    signals do to it, its ranks hear nothing else.

    Args:
        launcher: as a `Place` names it.
    """

    def __init__(self, launcher: str) -> None:
        self._caught: str | None = None
        self._before: dict[signal.Signals, Any] = {}
        launched = launcher == "deepspeed" or "TORCHELASTIC_RUN_ID" in os.environ
        self._above = ancestors() if launched else []

    @property
    def caught(self) -> str | None:
        """The name of the signal that came, None before."""
        if self._caught is None and self._above and ancestors() != self._above:
            self._caught = "end of its launcher"
        return self._caught

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # python gives signals to no other
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
    """The process that started this one, and the one above where it is a launcher too: `deepspeed` has two of them."""
    parent = os.getppid()
    try:
        # the name in parentheses may hold anything; state and parent follow
        above = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
        launches = b"deepspeed" in Path(f"/proc/{above}/cmdline").read_bytes()
    except (OSError, ValueError, IndexError):  # no such process any more, or no Linux
        return [parent]
    return [parent, above] if launches else [parent]
