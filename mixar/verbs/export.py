"""Write the EMA weights of a run's newest checkpoint as a release: safetensors, config.json, codecs and prior."""

import argparse
from pathlib import Path

import torch

from mixar.checkpoint import complete_checkpoints, load_ema, read_head
from mixar.config import Config, load_config
from mixar.errors import UserError
from mixar.objectives import MixARObjective, Objective
from mixar.tasks import build_objective, latent_norm, open_data
from mixar.weights import export_path, holds, loaded, read_public

CPU = torch.device("cpu")


def run(args: argparse.Namespace) -> None:
    overrides = args.overrides + ["trust_pickle=true"] * args.trust_pickle
    if args.weights is not None:
        release_public(load_config(args.run, overrides), args.weights, args.out)
        return
    run_dir = Path(args.run)
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"no run at {run_dir}: give the run_dir of a training, the folder with config.yaml")
    checkpoints = complete_checkpoints(run_dir)
    if not checkpoints:
        raise UserError(f"no complete checkpoint in {run_dir}: `mixar train {run_dir}/config.yaml` continues to one")
    images = int(checkpoints[-1].name)
    out = Path(args.out) if args.out else export_path(run_dir, images)
    if args.out is not None and out.exists():
        raise UserError(f"{out} exists and is never overwritten: remove it, or name another folder with --out")
    cfg = load_config(run_dir / "config.yaml", overrides)
    objective, count = open_objective(cfg, checkpoints[-1])
    objective.open()
    model = objective.bare()
    load_ema(checkpoints[-1], model)
    if holds(out, model.state_dict()) and not overrides:
        print(f"the run already has this export: {out}")
        return
    objective.export(model.eval(), out, {"images": images, "epochs": images / count, "weights": "ema"})
    print(f"the EMA weights after {images} images: {out}")


def open_objective(cfg: Config, checkpoint: Path) -> tuple[Objective, int]:
    """The objective of `cfg`, and the number of images in its set; from the checkpoint alone, if it describes its data.

    Raises:
        UserError: as `open_data`, for a checkpoint that does not.
    """
    data = read_head(checkpoint)[0].get("data", {})
    if "count" in data:  # of shards
        return build_objective(cfg, data, CPU), data["count"]
    source, data = open_data(cfg)
    return build_objective(cfg, data, CPU, source), sum(source.shard_sizes)


def release_public(cfg: Config, weights: str, out: str | None) -> None:
    """Write a public MAR checkpoint with the geometry of `cfg` as an export.

    Raises:
        UserError: no --out, or weights whose keys or shapes do not fit the config.
    """
    if out is None:
        raise UserError(f"--weights {weights} does not belong to a run: name the release's folder with --out DIR")
    objective = MixARObjective(cfg, latent_norm(cfg), CPU)
    objective.open()
    model = loaded(objective.build, read_public(weights, "mar", cfg.trust_pickle), weights)
    objective.export(model.eval(), Path(out), {"weights": Path(weights).name})
    print(f"the weights of {weights}: {out}")
