"""Turn images into shards: both flips' latent moments and discrete tokens, label and key, and a manifest."""

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
    rank, world = (own if given is None else given for given, own in zip((args.rank, args.world), slurm_share()))
    if not 0 <= rank < world:
        last = world - 1
        raise UserError(f"no rank {rank} of {world}: write --rank 0 to {last}; of a Slurm array, --array=0-{last}")
    cfg = load_config(args.config, args.overrides + ["trust_pickle=true"] * args.trust_pickle)
    if args.list:
        print(survey(training_images(replace(cfg.data, classes=sys.maxsize)), cfg.data))
        return
    folder = local_folder(cfg.data.shards)
    if args.verify:
        show(cfg, folder / "verify.png")
    else:
        make(cfg, args.pre_draw, rank, world)


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
