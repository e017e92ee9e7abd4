"""`mixar <verb>`: one command line for the whole way from images to scores."""

import argparse
import importlib
import sys

from mixar import __version__
from mixar.errors import UserError

VERBS = {
    "prepare": ("mixar.verbs.prepare", "images to shards of latents and tokens"),
    "train": ("mixar.train", "train a codec, the prior or MixAR; again resumes"),
    "sample": ("mixar.verbs.sample", "generate images from a run or an export"),
    "evaluate": ("mixar.verbs.evaluate", "FID, Inception Score, precision and recall, with a receipt"),
    "export": ("mixar.verbs.export", "the EMA weights of a run, with codecs and prior"),
    "demo": ("mixar.verbs.demo", "the whole method on small images, on a CPU, in minutes"),
    "plan": ("mixar.verbs.plan", "parameters, work, memory and planned speed of a config"),
    "doctor": ("mixar.verbs.doctor", "versions, devices, shards: is this machine ready"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; 0 when it succeeded, 2 for a mistake that its message tells how to mend."""
    given = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="mixar", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="MixAR: image generation by continuous masked autoregression, guided by discrete tokens.",
        epilog="verbs:\n" + "\n".join(f"  {verb:<9} {about}" for verb, (_, about) in VERBS.items())
        + "\n\n`mixar VERB --help` tells more; `make demo` is the place to start.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"mixar {__version__}")
    parser.add_argument("verb", choices=VERBS, metavar="VERB")
    verb = parser.parse_args(given[:1]).verb
    module = importlib.import_module(VERBS[verb][0])  # only this verb's libraries are imported
    parser = argparse.ArgumentParser(
        prog=f"mixar {verb}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    try:
        module.run(parser.parse_intermixed_args(given[1:]))
    except UserError as error:
        print(f"mixar {verb}: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print(f"mixar {verb}: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
