"""Train what a config describes: config -> place -> data -> objective -> trainer. The same command again resumes.

python mixar/train.py CONFIG [key=value ...] [--dry-run]
"""

import sys
from pathlib import Path

if not __package__:
    # started as a file, python looks for packages in this folder, where `mixar` is not; look beside it instead
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse

import torch

from mixar import dist
from mixar.checkpoint import RunDirectory
from mixar.codecs import LatentNorm
from mixar.config import Config, load_config, to_yaml
from mixar.data.batch import Source
from mixar.data.images import ImageSource, training_images
from mixar.data.loader import ShardSource
from mixar.data.manifest import check_manifest, read_manifest
from mixar.errors import UserError
from mixar.metrics import log
from mixar.objectives import MixARObjective, Objective, PriorObjective, TokenizerObjective, VAEObjective
from mixar.plan import make_plan, render
from mixar.trainer import Trainer


def train(cfg: Config) -> Path:
    """Run a config to its end; returns the folder of its export.

    Raises:
        UserError: what the user can mend.
    """
    place = dist.start()
    run = RunDirectory(cfg)
    source = open_source(cfg)
    objective = build_objective(cfg, source, place)
    log.info("training %s on %s, %s, in %s", cfg.task, place.device, cfg.train.precision, run.path)
    log.info("%s", render(make_plan(cfg, sum(source.shard_sizes))))
    return Trainer(cfg, objective, source, place, run).run()


def open_source(cfg: Config) -> Source:
    """Images for the codecs, shards that fit the config for the prior and MixAR."""
    if cfg.task in ("vae", "tokenizer"):
        return ImageSource(training_images(cfg.data), cfg.data.image_size)
    check_manifest(read_manifest(cfg.data.shards, cfg.data.cache), cfg)
    pre_drawn = cfg.task == "mixar" and cfg.ti_mix.enabled and cfg.ti_mix.source == "shards"
    return ShardSource(cfg.data.shards, cfg.data.cache, pre_drawn)


def build_objective(cfg: Config, source: Source, place: dist.Place) -> Objective:
    """The objective that `task` names."""
    if cfg.task == "mixar":
        return MixARObjective(cfg, latent_norm(cfg), place.device)
    if cfg.task == "prior":
        return PriorObjective(cfg)
    assert isinstance(source, ImageSource)
    shown = torch.stack([source[i][0] for i in range(min(16, len(source)))])
    return VAEObjective(cfg, shown) if cfg.task == "vae" else TokenizerObjective(cfg, shown)


def latent_norm(cfg: Config) -> LatentNorm:
    """MAR's factor where `vae.latent_scale` is set, else the statistics in the shards' manifest."""
    if cfg.vae.latent_scale is not None:
        return LatentNorm.from_scale(cfg.vae.latent_scale, cfg.vae.latent_channels)
    manifest = read_manifest(cfg.data.shards, cfg.data.cache)
    return LatentNorm(torch.tensor(manifest.latent_mean), torch.tensor(manifest.latent_std))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="yaml file, such as configs/mixar_l.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.batch=256")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and start nothing")
    parser.add_argument("--trust-pickle", action="store_true", help="the same as trust_pickle=true")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it


def run(args: argparse.Namespace) -> None:
    cfg = load_config(args.config, args.overrides + ["trust_pickle=true"] * args.trust_pickle)
    if args.dry_run:
        print(to_yaml(cfg) + render(make_plan(cfg)))
    else:
        train(cfg)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    try:
        run(parser.parse_intermixed_args())
    except UserError as error:
        print(f"mixar train: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
