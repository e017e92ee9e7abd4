"""A report about a run that hangs."""

import pickle
import sys
import threading
import traceback
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from torch._C import _distributed_c10d

from mixar.log import log

# torch's flight recorders of the last collectives; a torch without NCCL lacks the first
RECORDERS = {"nccl": "_dump_nccl_trace", "gloo": "_dump_fr_trace"}


class Watchdog(AbstractContextManager):
    """Logs the stack of every thread of this rank after `timeout` seconds without a `beat`, and writes what torch's
    flight recorders hold to `folder`/nccl_<rank> and gloo_<rank>.

    It does not end the run: the other ranks' collectives time out a little later, and the launcher ends this rank.
    """

    def __init__(self, timeout: float, folder: Path, rank: int) -> None:
        self.timeout, self.folder, self.rank = timeout, folder, rank
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
            self._write_records()
            self._beaten.wait()  # reported once

    def _write_records(self) -> None:
        for backend, name in RECORDERS.items():
            dump = getattr(_distributed_c10d, name, None)
            record = dump() if dump is not None else b""
            if not record or not pickle.loads(record)["entries"]:
                continue  # no collective of this backend
            file = self.folder / f"{backend}_{self.rank}"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                file.write_bytes(record)
            except OSError as error:
                log.error("%s cannot be written (%s)", file, error.strerror)
            else:
                log.error("the last collectives of %s are in %s", backend, file)


def _stacks() -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames().items()
    return "\n".join(f"{names.get(i, i)}:\n{''.join(traceback.format_stack(frame))}" for i, frame in frames)
