"""A report about a run that hangs."""

import sys
import threading
import traceback
from contextlib import AbstractContextManager
from types import TracebackType

from mixar.log import log


class Watchdog(AbstractContextManager):
    """Logs the stack of every thread of this rank after `timeout` seconds without a `beat`.

    It does not end the run: the other ranks' collectives time out a little later, and the launcher ends this rank.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._step: int | None = None
        self._beaten, self._over = threading.Event(), False

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        self._beaten.set()

    def beat(self, step: int) -> None:
        """Report that step `step` begins."""
        self._step = step
        self._beaten.set()

    def _watch(self) -> None:
        while not self._over:
            if self._beaten.wait(self.timeout):
                self._beaten.clear()
                continue
            log.error("no step in %g s since step %s began; the threads of this rank:\n%s", self.timeout, self._step,
                      _stacks())  # fmt: skip
            self._beaten.wait()  # reported once


def _stacks() -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames().items()
    return "\n".join(f"{names.get(i, i)}:\n{''.join(traceback.format_stack(frame))}" for i, frame in frames)
