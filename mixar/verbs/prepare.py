"""Turn images into shards: both flips' latent moments and discrete tokens, label and key, and a manifest.

    mixar prepare CONFIG data.images=DIR data.shards=OUT vae.weights=PATH tokenizer.weights=PATH

Several ranks share the work (SLURM_PROCID and SLURM_NTASKS, or --rank and --world). An interrupted run goes on where it
stopped.
"""

import argparse
import os
from pathlib import Path

from mixar import dist
from mixar.codecs import load_tokenizer, load_vae
from mixar.config import load_config
from mixar.data.images import training_images
from mixar.data.pre_draw import predraw
from mixar.data.shards import prepare, verify
from mixar.prior import load_prior


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="yaml file, such as configs/mixar_l.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.images=/data/imagenet/train")
    parser.add_argument(
        "--verify", action="store_true", help="decode 16 images of finished shards to <shards>/verify.png"
    )
    parser.add_argument(
        "--pre-draw", action="store_true", help="also draw TI-Mix's tokens beforehand, for ti_mix.source=shards"
    )
    parser.add_argument("--trust-pickle", action="store_true", help="read checkpoints that hold more than tensors")
    parser.add_argument("--rank", type=int, default=int(os.environ.get("SLURM_PROCID", "0")))
    parser.add_argument("--world", type=int, default=int(os.environ.get("SLURM_NTASKS", "1")))


def run(args: argparse.Namespace) -> None:
    cfg = load_config(args.config, args.overrides + ["trust_pickle=true"] * args.trust_pickle)
    device = dist.find().device
    vae, tokenizer = load_vae(cfg.vae, cfg.trust_pickle), load_tokenizer(cfg.tokenizer, cfg.trust_pickle)
    if args.verify:
        out = Path(cfg.data.shards) / "verify.png"
        verify(cfg.data.shards, vae.to(device), tokenizer.to(device), out)
        print(out)
        return
    manifest = prepare(cfg, training_images(cfg.data), vae, tokenizer, device, args.rank, args.world)
    if args.pre_draw and manifest is not None:
        predraw(cfg, load_prior(cfg.prior, cfg.trust_pickle), device, args.rank, args.world)
    if manifest is not None:
        broken = f", {len(manifest.broken)} broken ones skipped" if manifest.broken else ""
        print(f"{manifest.count} images of {len(manifest.classes)} classes in {cfg.data.shards}{broken}")
