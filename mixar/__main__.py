"""`mixar <verb>`: one command line for the whole way from images to scores."""

import argparse
import importlib
import os
import select
import sys

from mixar import __version__
from mixar.command_line import VERBS, verb_parser
from mixar.errors import UserError, report
from mixar.process import interruptible

EXTRAS = {"deepspeed": "train", "streaming": "train", "tensorboard": "train", "mlxtend": "demo"}  # of pyproject.toml


def main(argv: list[str] | None = None) -> int:
    """Run one verb; 0 when it succeeded, 2 for a mistake that its message tells how to mend."""
    try:
        status = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what python flushes at its end
        return 141  # as a shell calls it when SIGPIPE ends a program
    return status


def _run(given: list[str]) -> int:
    prog = "mixar"
    try:
        with interruptible():
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
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mixar", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="MixAR: image generation by continuous masked autoregression, guided by discrete tokens.",
        epilog="verbs:\n" + "\n".join(f"  {verb:<9} {about}" for verb, (_, _, about) in VERBS.items())
        + "\n\n`mixar VERB --help` tells more; `mixar demo` is the place to start.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"mixar {__version__}")
    parser.add_argument("verb", choices=VERBS, metavar="VERB")
    return parser


def _nobody_reads() -> bool:
    """Whether what reads standard output has ended, as `head` does."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


if __name__ == "__main__":
    sys.exit(main())
