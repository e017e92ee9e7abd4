"""The log of a run: the console, and log.txt in its directory."""

import logging
import traceback
from pathlib import Path

from mixar.errors import UserError

log = logging.getLogger("mixar")


class _LogFile(logging.FileHandler):
    """log.txt; on a full disk it loses lines, which the console still shows, and the run continues."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def start_log(file: Path, rank: int = 0) -> None:
    """Send the `mixar` logger to the console and to `file`; ranks other than the first log only warnings and errors."""
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.handlers.clear()
    log.propagate = False
    text = f"%(asctime)s {f'rank {rank}: ' * bool(rank)}%(message)s"
    console, kept = logging.StreamHandler(), _LogFile(file, encoding="utf-8")
    console.setFormatter(logging.Formatter(text, "%H:%M:%S"))
    kept.setFormatter(logging.Formatter(text, "%Y-%m-%d %H:%M:%S"))
    for handler in (console, kept):
        log.addHandler(handler)


def keep_in_log(error: BaseException) -> None:
    """Write the error that ends the run to log.txt only, since the program reports it on the console."""
    message = str(error) if isinstance(error, UserError) else "".join(traceback.format_exception(error)).rstrip()
    record = log.makeRecord(log.name, logging.ERROR, "", 0, f"ended by an error: {message}", (), None)
    for handler in log.handlers:
        if isinstance(handler, _LogFile):
            handler.handle(record)
