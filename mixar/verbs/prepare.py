"""Turn images into shards: both flips' latent moments and discrete tokens, label and key, and a manifest.

    mixar prepare CONFIG data.images=DIR data.shards=OUT vae.weights=PATH tokenizer.weights=PATH

Several ranks share the work: the elements of a Slurm array, the tasks of an srun step, or --rank and --world. An
interrupted run goes on where it stopped.
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
from mixar.errors import UserError
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
        element, first, step = (int(given[f"ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "STEP"))
        rank, world = (element - first) // step * world + rank, int(given["ARRAY_TASK_COUNT"]) * world
    return rank, world


def run(args: argparse.Namespace) -> None:
    if not 0 <= args.rank < args.world:
        last = args.world - 1
        raise UserError(
            f"no rank {args.rank} of {args.world}: write --rank 0 to {last}; of a Slurm array, --array=0-{last}"
        )
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
