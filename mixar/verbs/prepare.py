"""Turn images into shards: both flips' latent moments and discrete tokens, label and key, and a manifest."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from mixar import dist
from mixar.config import Config, load_config
from mixar.data.images import training_images
from mixar.data.manifest import read_manifest
from mixar.data.parts import local_folder
from mixar.data.pre_draw import check_pre_draw, predraw
from mixar.data.shards import planned_manifest, prepare, verify
from mixar.data.survey import survey
from mixar.errors import UserError
from mixar.objectives.frozen import Frozen


def run(args: argparse.Namespace) -> None:
    rank, world = (own if given is None else given for given, own in zip((args.rank, args.world), dist.share()))
    if not 0 <= rank < world:
        last = world - 1
        raise UserError(f"no rank {rank} of {world}: write --rank 0 to {last}; for a Slurm array, --array=0-{last}")
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
    """Decode some images of the finished shards of `cfg` to a PNG at `out`, with the codecs that made them."""
    manifest, device = read_manifest(cfg.data.shards), dist.find().device
    frozen = Frozen(cfg, {"vae": manifest.vae, "tokenizer": manifest.tokenizer})
    verify(cfg.data.shards, frozen.vae.to(device), frozen.tokenizer.to(device), out)
    print(out)


def make(cfg: Config, pre_draw: bool, rank: int, world: int) -> None:
    """Make the shards of `cfg`, and pre-drawn tokens beside them; everything that they need is opened first."""
    images, device = training_images(cfg.data), dist.find().device
    frozen = Frozen(cfg, {})
    vae, tokenizer = frozen.vae, frozen.tokenizer
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
