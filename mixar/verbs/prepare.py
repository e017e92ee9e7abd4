"""Turn images into shards: both flips' latent moments and discrete tokens, label and key, and a manifest.

    mixar prepare CONFIG data.images=DIR --list
    mixar prepare CONFIG data.images=DIR data.shards=OUT vae.weights=PATH tokenizer.weights=PATH

Several ranks share the work: the elements of a Slurm array, the tasks of an srun step, --rank and --world, or just the
same command several times. Each returns when the set is complete. An interrupted run goes on where it stopped.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from mixar import dist
from mixar.codecs import load_tokenizer, load_vae
from mixar.config import Config, load_config
from mixar.data.images import training_images
from mixar.data.manifest import read_manifest
from mixar.data.parts import local_folder
from mixar.data.pre_draw import check_pre_draw, predraw
from mixar.data.shards import planned_manifest, prepare, verify
from mixar.data.survey import survey
from mixar.errors import UserError
from mixar.objectives.frozen import Frozen


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    rank, world = slurm_share()
    parser.add_argument("--rank", type=int, default=rank, help="default: by the array element and the task of srun")
    parser.add_argument("--world", type=int, default=world, help="default: likewise")


def slurm_share() -> tuple[int, int]:
    """(rank, world) over the tasks of this srun step in all elements of this array job; (0, 1) outside of both."""
    given = {name.removeprefix("SLURM_"): value for name, value in os.environ.items()}
    rank, world = 0, 1
    if "STEP_ID" in given:  # without it this is the batch script, which has a PROCID too
        rank, world = int(given["PROCID"]), int(given["STEP_NUM_TASKS"])
    if "ARRAY_TASK_ID" in given:
        element, first = int(given["ARRAY_TASK_ID"]), int(given["ARRAY_TASK_MIN"])
        step = int(given.get("ARRAY_TASK_STEP", 1))  # some schedulers that speak Slurm's language leave it out
        rank, world = (element - first) // step * world + rank, int(given["ARRAY_TASK_COUNT"]) * world
    return rank, world


def run(args: argparse.Namespace) -> None:
    if not 0 <= args.rank < args.world:
        last = args.world - 1
        raise UserError(
            f"no rank {args.rank} of {args.world}: write --rank 0 to {last}; of a Slurm array, --array=0-{last}"
        )
    cfg = load_config(args.config, args.overrides + ["trust_pickle=true"] * args.trust_pickle)
    if args.list:
        print(survey(training_images(replace(cfg.data, classes=sys.maxsize)), cfg.data))
        return
    folder = local_folder(cfg.data.shards)
    if args.verify:
        show(cfg, folder / "verify.png")
    else:
        make(cfg, args.pre_draw, args.rank, args.world)


def show(cfg: Config, out: Path) -> None:
    """Decode some of the finished shards of `cfg` to a PNG at `out`, by the codecs that made them."""
    manifest, device = read_manifest(cfg.data.shards), dist.find().device
    frozen = Frozen(cfg, {"vae": manifest.vae, "tokenizer": manifest.tokenizer})
    verify(cfg.data.shards, frozen.vae.to(device), frozen.tokenizer.to(device), out)
    print(out)


def make(cfg: Config, pre_draw: bool, rank: int, world: int) -> None:
    """Make the shards of `cfg`, and pre-drawn tokens beside them; all that they need is opened first."""
    images, device = training_images(cfg.data), dist.find().device
    vae, tokenizer = load_vae(cfg.vae, cfg.trust_pickle), load_tokenizer(cfg.tokenizer, cfg.trust_pickle)
    if pre_draw:
        planned = planned_manifest(cfg, images, vae, tokenizer)
        prior = Frozen(cfg, {"tokenizer": planned.tokenizer}).prior
        check_pre_draw(cfg, prior, planned)
    manifest = prepare(cfg, images, vae, tokenizer, device, rank, world)
    if pre_draw:
        predraw(cfg, prior, device, rank, world)
    skipped = f", {len(manifest.broken)} broken ones skipped" if manifest.broken else ""
    if manifest.skipped:
        skipped += f", left out: {', '.join(f'{count} {reason}' for reason, count in manifest.skipped.items())}"
    print(f"{manifest.count} images of {len(manifest.classes)} classes in {cfg.data.shards}{skipped}")
