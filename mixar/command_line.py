"""The arguments of each verb, in a file that imports nothing heavy, so that --help answers at once."""

import argparse
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mixar.cards import CARDS
from mixar.errors import UserError
from mixar.resources import config_names
from mixar.sampling_flags import AXES, GRID, add_flags


def _path(text: str) -> str:
    if not text.strip():
        raise UserError("a path on the command line is empty: write it, or leave its flag out")
    return text


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise UserError(f"--minutes {text} is not a number of minutes: write one such as 15")
    return minutes


def _configs(parser: argparse.ArgumentParser) -> None:
    """The configs that ship with mixar. Each is one complete run, and can be named in place of a file.

        mixar configs                          their names, and what they are
        mixar configs mixar_l                  the file itself
        mixar configs mixar_l --copy DIR       a copy to change; without a name, copies of all

    A copy never replaces a file.
    """
    parser.add_argument("name", nargs="?", choices=config_names(), metavar="NAME", help="such as mixar_l or demo/mixar")
    parser.add_argument("--copy", type=Path, metavar="DIR", help="write copies into this folder")


def _prepare(parser: argparse.ArgumentParser) -> None:
    """Turn images into shards: both flips' latent moments and discrete tokens, label and key, and a manifest.

        mixar prepare CONFIG data.images=DIR --list
        mixar prepare CONFIG data.images=DIR data.shards=OUT vae.weights=PATH tokenizer.weights=PATH

    Several ranks share the work: the elements of a Slurm array, the tasks of an srun step, --rank and --world, or just
    the same command several times. Each returns when the set is complete. An interrupted run resumes where it stopped.
    """
    parser.add_argument("config", help="yaml file, such as configs/mixar_l.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.images=/data/imagenet/train")
    parser.add_argument(
        "--list", action="store_true", help="only show classes, counts, sizes, modes and what would be skipped"
    )
    parser.add_argument(
        "--verify", action="store_true", help="decode 16 images of finished shards to <shards>/verify.png"
    )
    parser.add_argument(
        "--pre-draw", action="store_true", help="also draw TI-Mix's tokens beforehand, for ti_mix.source=shards"
    )
    parser.add_argument("--trust-pickle", action="store_true", help="read checkpoints that hold more than tensors")
    parser.add_argument("--rank", type=int, help="default: by the array element and the task of srun")
    parser.add_argument("--world", type=int, help="default: likewise")


def _train(parser: argparse.ArgumentParser) -> None:
    """Train what a config describes: config -> place -> data -> objective -> trainer.

        mixar train CONFIG [key=value ...] [--dry-run]

    The same command again resumes.
    """
    parser.add_argument("config", help="yaml file, such as configs/mixar_l.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.batch=256")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and start nothing")
    parser.add_argument("--trust-pickle", action="store_true", help="the same as trust_pickle=true")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it


def _sample(parser: argparse.ArgumentParser) -> None:
    """Generate images from a run directory or an export folder.

        mixar sample runs/mixar_l --labels 207,360 --count 16 --grid
        mixar sample runs/mixar_l --count 50000 --npz

    PNGs are named <seed>-<label>.png. Image i depends on seed + i alone, not on the batch, the count or the order of
    the others. The same command resumes where it stopped.
    """
    parser.add_argument("path", type=_path, metavar="PATH", help="run directory (its newest export) or export folder")
    add_flags(parser, "one of each class in turn")
    parser.add_argument(
        "--out", type=_path, metavar="DIR", help="default: PATH/samples/<seed>-<count>, beside PATH for an export"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--grid", action="store_true", help="also show the first 64 in one picture, <out>-grid.png")
    form.add_argument("--npz", action="store_true", help="write samples.npz in ADM's form instead of PNGs")


def _evaluate(parser: argparse.ArgumentParser) -> None:
    """Score images against a reference: Frechet distance, Inception Score, precision and recall, with a JSON receipt.

        mixar evaluate runs/mixar_l --reference imagenet.npz                       samples 50,000 images, scores them
        mixar evaluate --samples DIR --reference DIR --crop 256                    scores what is there
        mixar evaluate --reference DIR --crop 256 --save-statistics imagenet.npz   keeps a reference for later
        mixar evaluate runs/mixar_l --reference imagenet.npz --grid steps=8,64 cfg_scale=2,3 --repeats 3
                                                                                   speed against quality, at each point

    A distance is called FID only with the published Inception weights and 50,000 samples. Samples are kept, so that
    the same command resumes where it stopped. A grid uses the same seeds and labels at each point, in the folders of
    `mixar sample`, and writes PATH/eval/<name>-grid.json with a table (.md) and a plot (.png).
    """
    parser.add_argument(
        "path", type=_path, nargs="?", metavar="PATH", help="run directory or export folder to sample from"
    )
    parser.add_argument("--samples", metavar="PATH", help="folder of images, or npz, to score instead")
    parser.add_argument("--reference", required=True, help="images: folder, npz or built-in set; or npz of statistics")
    parser.add_argument("--crop", type=int, metavar="SIZE", help="crop a folder of reference images, as ADM does")
    parser.add_argument("--extractor", default="inception", help="inception, inception=FILE, or a classifier's export")
    parser.add_argument("--reconstructions", action="store_true", help="the samples are reconstructions: an rFID")
    parser.add_argument("--save-statistics", metavar="FILE", help="keep the reference's statistics as an npz")
    parser.add_argument(
        "--out", type=_path, metavar="FILE", help="the receipt or grid; default: PATH/eval/<seed>-<count>.json"
    )
    axes = f"{', '.join(AXES)} (default: {' '.join(GRID)}, and the presets)"
    parser.add_argument("--grid", nargs="*", metavar="NAME=V,V", help=f"sample and score each point of a grid: {axes}")
    parser.add_argument("--repeats", type=int, metavar="N", help="score each point of the grid on N ranges of seeds")
    add_flags(parser, "50000")


def _export(parser: argparse.ArgumentParser) -> None:
    """Write the EMA weights of a run's newest checkpoint as a release: safetensors, config.json, codecs and prior.

        mixar export runs/mixar_l
        mixar export runs/mixar_l vae.weights=PATH tokenizer.weights=PATH prior.weights=PATH --out release
        mixar export configs/mar_b.yaml vae.weights=kl16.ckpt --weights mar_base/checkpoint-last.pth --out mar_b

    The last one turns a public MAR checkpoint into a release to sample from. A run may be training meanwhile. Codecs
    and prior are included where the config, or a key=value here, names them.
    """
    parser.add_argument(
        "run", type=_path, metavar="RUN", help="run directory; with --weights the config of those weights"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as vae.weights=PATH")
    parser.add_argument("--weights", metavar="FILE", help="a public MAR checkpoint, in place of a run's")
    parser.add_argument("--trust-pickle", action="store_true", help="read checkpoints that hold more than tensors")
    parser.add_argument("--out", type=_path, metavar="DIR", help="default: RUN/exports/<images>-ema")


def _demo(parser: argparse.ArgumentParser) -> None:
    """The whole method on small images, on a CPU, in minutes: codecs, shards, prior, MixAR, samples, scores, a picture.

        mixar demo                   5,000 digits that ship with a package: nothing is downloaded
        mixar demo --images DIR      your images, classes from the sub-folders, in 15 minutes
        mixar demo --images DIR --minutes 60
        mixar demo --compare         none, DC-Mix, DC-SA and DC-CA side by side, as in the paper's tables

    After an interruption, the same command resumes where it stopped.
    """
    parser.add_argument("--images", default="digits", help="a folder of images, or a built-in set (default: digits)")
    parser.add_argument("--out", type=lambda text: Path(_path(text)), help="default: runs/demo, or runs/demo-short")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes", type=_minutes, metavar="M", help="of all stages together, by this machine's measured speed"
    )
    length.add_argument(
        "--short", action="store_true", help="every stage in about a minute, to see that all of it runs"
    )
    parser.add_argument("--compare", action="store_true", help="train the four guidances side by side")


def _plan(parser: argparse.ArgumentParser) -> None:
    """Parameters, steps, work and memory of a config, in seconds and without starting anything.

        mixar plan CONFIG [key=value ...] --gpus 32 --gpu h100
        mixar plan CONFIG --print run_dir

    With --gpus also memory per rank by part, bytes moved, images/s and days under each engine, and the assumptions.
    """
    parser.add_argument("config", help="yaml file, such as configs/mixar_l.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpus", type=int, metavar="N", help="of the whole run, in nodes of eight")
    parser.add_argument("--gpu", choices=CARDS, default="h100", help="the card, with --gpus (default: h100)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--print", metavar="KEY", help="print the value of one key of the config as it is, for scripts")


def _doctor(parser: argparse.ArgumentParser) -> None:
    """Check this machine: versions, devices, memory, compilers; with a config also its folders, shards and weights.

        mixar doctor [CONFIG] [key=value ...]
        srun --ntasks-per-node=8 mixar doctor CONFIG    every rank checks its place; so under torchrun -m mixar doctor
        mixar doctor CONFIG [key=value ...] --gpu       other checks: of this machine's GPUs, with random weights

    With several ranks, the first one's findings are shown, then those in which other nodes differ, and a timed
    all-reduce. A line is `ok`, a `note` (it works, with a limitation), or `bad` (it will fail).

    --gpu takes ten minutes at most and needs no images or weights. It checks numbers, operators, waits, compilation,
    sampling and engines, measures a step, and writes every figure to gpu.json.
    """
    parser.add_argument("given", nargs="*", metavar="CONFIG key=value", help="a run to check for, both parts optional")
    parser.add_argument("--gpu", action="store_true", help="check the GPUs by the config's step, and write gpu.json")


class Verb(NamedTuple):
    """A verb's arguments, the module with its `run(args)`, and a short description."""

    arguments: Callable[[argparse.ArgumentParser], None]
    module: str
    about: str


VERBS = {
    "configs": Verb(_configs, "mixar.verbs.configs", "the configs that ship with mixar: list, show, copy"),
    "prepare": Verb(_prepare, "mixar.verbs.prepare", "images to shards of latents and tokens"),
    "train": Verb(_train, "mixar.train", "train a codec, the prior or MixAR; again resumes"),
    "sample": Verb(_sample, "mixar.verbs.sample", "generate images from a run or an export"),
    "evaluate": Verb(_evaluate, "mixar.verbs.evaluate", "FID, Inception Score, precision and recall, with a receipt"),
    "export": Verb(_export, "mixar.verbs.export", "the EMA weights of a run, with codecs and prior"),
    "demo": Verb(_demo, "mixar.verbs.demo", "the whole method on small images, on a CPU, in minutes"),
    "plan": Verb(_plan, "mixar.verbs.plan", "parameters, work, memory and planned speed of a config"),
    "doctor": Verb(_doctor, "mixar.verbs.doctor", "versions, devices, shards: check this machine"),
}


def verb_parser(verb: str) -> argparse.ArgumentParser:
    """The argument parser of one of `VERBS`."""
    parser = argparse.ArgumentParser(
        prog=f"mixar {verb}", description=inspect.getdoc(VERBS[verb].arguments),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    VERBS[verb].arguments(parser)
    return parser
