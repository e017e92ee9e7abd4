"""What a verb owes: it ends when asked to, prints on any terminal, and refuses early."""

import io
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixar.errors import UserError
from mixar.files import try_writing
from mixar.signals import STOPPING


@contextmanager
def interruptible() -> Iterator[None]:
    """Let the signals that ask for an end do what Ctrl-C does, and any terminal show any text."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not every locale can write the name of a user's folder
        sys.stdout.reconfigure(errors="backslashreplace")
    before = {}
    if threading.current_thread() is threading.main_thread():  # python gives signals to no other
        heard = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]  # as under nohup
        before = {number: signal.signal(number, signal.default_int_handler) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_writable(file: Path) -> None:
    """See, before hours go into it, whether `file` can be written. Makes nothing.

    Raises:
        UserError: it cannot, or a folder has its name.
    """
    try:
        try_writing(file.parent)
        taken = file.is_dir()
    except OSError as error:
        raise UserError(f"cannot write {file} ({error.strerror}): name a place that you may write to") from None
    if taken:
        raise UserError(f"cannot write {file}, which is a folder: name a file")
