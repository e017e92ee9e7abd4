"""What a run will be, computed from its config alone: parameters, length, memory."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mixar.codecs import VAE, Tokenizer
from mixar.config import Config
from mixar.data.manifest import read_manifest
from mixar.errors import UserError
from mixar.mixing import masked_counts
from mixar.model import MixAR
from mixar.prior import Prior

_COPIES = {"weights": 1, "gradients": 1, "adam": 2, "ema": 1}  # float32 values held for each parameter


def parameter_count(cfg: Config) -> int:
    """Trained parameters of the run, counted on the meta device: nothing is allocated."""
    with torch.device("meta"):
        model: nn.Module = {
            "mixar": lambda: MixAR(cfg.model), "prior": lambda: Prior(cfg.prior),
            "vae": lambda: VAE(cfg.vae), "tokenizer": lambda: Tokenizer(cfg.tokenizer),
        }[cfg.task]()  # fmt: skip
    return sum(p.numel() for p in model.parameters())


def make_plan(cfg: Config, images: int | None = None) -> dict[str, Any]:
    """Figures of a run.

    Args:
        images: of the set; by default what the shards' manifest says, else `data.count`.

    Returns:
        plain values; `memory` in bytes for one process, without activations.
    """
    parameters = parameter_count(cfg)
    images = images or _images(cfg)
    plan: dict[str, Any] = {
        "task": cfg.task,
        "parameters": parameters,
        "images": images,
        "epochs": cfg.train.epochs,
        "batch": cfg.train.batch,
        "steps": None if images is None else -int(-cfg.train.epochs * images // cfg.train.batch),
        "memory": {name: 4 * copies * parameters for name, copies in _COPIES.items()},
    }
    plan["memory"]["total"] = sum(plan["memory"].values())
    if cfg.task == "mixar":
        n, s = cfg.model.tokens, cfg.model.class_tokens
        prefix = s + (n if cfg.model.guidance == "dc_sa" else 0)
        fine = replace(cfg.mask, ratio_scope="image", group=1024)
        visible = n - sum(masked_counts(fine, n, 0, range(1024), 1024)) / 1024
        plan["guidance"] = cfg.model.guidance
        plan |= {"encoder_tokens": round(prefix + visible, 1), "decoder_tokens": prefix + n}
    return plan


def render(plan: dict[str, Any]) -> str:
    """A plan as lines to read."""
    lines = []
    for name, value in plan.items():
        if name == "memory":
            parts = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in value.items())
            value = f"{parts} GiB in one process, without activations"
        elif value is None:
            value = "unknown: write data.count=<images>, or prepare the shards first"
        elif isinstance(value, int):
            value = f"{value:,}"
        lines.append(f"  {name:<15} {value}")
    return "plan\n" + "\n".join(lines)


def _images(cfg: Config) -> int | None:
    try:
        return read_manifest(cfg.data.shards, cfg.data.cache).count
    except UserError:
        return cfg.data.count  # no shards yet
