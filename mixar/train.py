"""Train what a config describes: config -> place -> data -> objective -> trainer. The same command again resumes.

python mixar/train.py CONFIG [key=value ...] [--dry-run]
"""

import sys
from pathlib import Path

if not __package__:
    # started as a file, python looks for packages in this folder, where `mixar` is not; look beside it instead
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import os

import torch

from mixar import dist
from mixar.checkpoint import RunDirectory
from mixar.codecs import LatentNorm
from mixar.config import Config, images_a_pass, load_config, to_yaml
from mixar.data.batch import Source
from mixar.data.images import ImageSource, training_images
from mixar.data.loader import ShardSource
from mixar.data.manifest import check_manifest, read_manifest
from mixar.engine import choose_engine
from mixar.errors import UserError
from mixar.metrics import log
from mixar.model.attention import prepare_attention
from mixar.objectives import MixARObjective, Objective, PriorObjective, TokenizerObjective, VAEObjective
from mixar.ops import load
from mixar.plan import make_plan, render
from mixar.trainer import Stopped, Trainer


def train(cfg: Config) -> Path:
    """Run a config to its end; returns the folder of its export.

    Raises:
        UserError: what the user can mend.
        Stopped: a signal ended it, after a checkpoint.
    """
    images_a_pass(cfg, dist.find().world)  # what cannot be divided is told before anything is written
    kernels = load_kernels(cfg)
    place = dist.start(cfg.engine.timeout)
    run = RunDirectory(cfg, place)
    try:
        source = open_source(cfg)
        objective = build_objective(cfg, source, place)
        tell_start(cfg, source, place)
        for line in kernels:
            log.info("%s", line)
        return Trainer(cfg, objective, source, place, run).run()
    finally:
        run.close()


def load_kernels(cfg: Config) -> list[str]:
    """Take what a run's kernels are found in, and say in words what that is.

    Before the ranks join: the first build of the operators takes up to a minute, in which no rank may wait in a
    collective. On each node one rank builds, and the others wait for its file.

    Raises:
        UserError: `model.attention` needs another card or a package.
    """
    if cfg.task != "mixar":
        return []
    device = dist.find().device
    return [prepare_attention(cfg.model.attention, device), load(device.type)]


def tell_start(cfg: Config, source: Source, place: dist.Place) -> None:
    """Log where and how the run will be computed, and how long it is."""
    engine, why = choose_engine(cfg, place)
    micro = images_a_pass(cfg, place.world)
    log.info("training %s on %s, in %s", cfg.task, place.device, cfg.run_dir)
    log.info("engine %s, for %s; %d ranks on %d nodes, started by %s", engine, why, place.world, place.nodes,
             place.launcher)  # fmt: skip
    log.info("batch %d = %d a pass x %d ranks x %d passes", cfg.train.batch, micro, place.world,
             cfg.train.batch // (micro * place.world))  # fmt: skip
    log.info("%s", precision_table(cfg))
    log.info("%s", render(make_plan(cfg, sum(source.shard_sizes))))


def precision_table(cfg: Config) -> str:
    """What is kept, computed and sent in which format."""
    compute = "bfloat16 under autocast" if cfg.train.precision == "bf16" else "float32"
    rows = {
        "weights, gradients, moments, EMA": "float32, also on their way between ranks",
        "matrix products, attention": compute,
        "norms, diffusion, loss": "float32",
    }
    return "precision\n" + "\n".join(f"  {what:<34}{kind}" for what, kind in rows.items())


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
    overrides = args.overrides + ["trust_pickle=true"] * args.trust_pickle
    if args.dry_run:
        if dist.find().is_main:
            cfg = load_config(args.config, overrides)
            print(to_yaml(cfg) + render(make_plan(cfg)))
        return
    try:
        train(load_config(args.config, overrides))
        _tell("done")
    except Stopped:
        _tell("stopped")
    except UserError as error:
        if error.status == UserError.status:  # no passing error's, here or on another rank
            _tell("refused")
        dist.abandon(error.status)
        raise
    dist.leave()


def _tell(outcome: str) -> None:
    """Tell the job script that started this how it ended: done, stopped or refused.

    By a file, since a launcher makes of the exit statuses of its processes what it likes.
    """
    file = os.environ.get("MIXAR_OUTCOME")
    if file and (outcome == "refused" or dist.find().is_main):
        Path(file).write_text(outcome + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    try:
        run(parser.parse_intermixed_args())
    except UserError as error:
        if not isinstance(error, dist.ElsewhereError):
            print(f"mixar train: {error}", file=sys.stderr)
        sys.exit(error.status)
    except SystemExit as end:  # argparse's: after --help, or of a wrong flag
        if end.code:
            _tell("refused")
        raise


if __name__ == "__main__":
    main()
