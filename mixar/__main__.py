"""`mixar <verb>`: one command line for the whole way from images to scores."""

import argparse
import importlib
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mixar import __version__
from mixar.command_line import VERBS, verb_parser
from mixar.errors import UserError, report
from mixar.signals import STOPPING

# package and the extra of pyproject.toml that brings it
EXTRAS = {
    "deepspeed": "train", "streaming": "train", "tensorboard": "train", "matplotlib": "plot", "mlxtend": "demo",
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns its exit status: 0 for success, 2 for a mistake whose message says how to fix it."""
    try:
        status = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it ends
        return 141  # the status that a shell gives a program ended by SIGPIPE
    return status


def _run(given: list[str]) -> int:
    prog = "mixar"
    if isinstance(sys.stdout, io.TextIOWrapper):  # not every locale can write the name of a user's folder
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _interruptible():
            verb = _parser().parse_args(given[:1]).verb
            prog = f"mixar {verb}"
            args = verb_parser(verb).parse_intermixed_args(given[1:])
            importlib.import_module(VERBS[verb].module).run(args)  # only this verb's libraries are imported
    except SystemExit as end:  # argparse's: after --help, or of a wrong flag
        return int(end.code or 0)
    except (UserError, KeyboardInterrupt) as error:
        return report(prog, error)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        print(f"{prog}: {error.name} is missing: write pip install 'mixar[{EXTRAS[error.name]}]'", file=sys.stderr)
        return UserError.status
    except BrokenPipeError:
        raise
    except (RuntimeError, MemoryError, OSError) as error:
        from mixar.failures import in_words  # imports torch

        reported = in_words(error)
        if reported is error:
            raise
        return report(prog, reported)
    return 0


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let the signals that ask for an end act as Ctrl-C does."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
        handled = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]  # as under nohup
        before = {number: signal.signal(number, signal.default_int_handler) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mixar", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="MixAR: image generation by continuous masked autoregression, guided by discrete tokens.",
        epilog="verbs:\n" + "\n".join(f"  {verb:<9} {about}" for verb, (_, _, about) in VERBS.items())
        + "\n\n`mixar VERB --help` says more; `mixar demo` is the place to start.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"mixar {__version__}")
    parser.add_argument("verb", choices=VERBS, metavar="VERB")
    return parser


def _nobody_reads() -> bool:
    """Whether the reader of standard output has gone, as `head` does."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


if __name__ == "__main__":
    sys.exit(main())
