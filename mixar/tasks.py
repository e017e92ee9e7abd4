"""The data and the objective of each task, for training and for export."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixar.codecs import LatentNorm
from mixar.config import Config
from mixar.data.batch import Source
from mixar.data.images import ImageSource, training_images
from mixar.data.loader import ShardSource
from mixar.data.manifest import Manifest, check_manifest, check_pre_drawn, read_manifest
from mixar.objectives import MixARObjective, Objective, PriorObjective, TokenizerObjective, VAEObjective

SHOWN = 32  # images that a codec's preview reconstructs

# arguments as in `build_objective`
OBJECTIVES: dict[str, Callable[[Config, dict[str, Any], torch.device, Source | None], Objective]] = {
    "vae": lambda cfg, data, device, source: VAEObjective(cfg, _shown_images(source), device),
    "tokenizer": lambda cfg, data, device, source: TokenizerObjective(cfg, _shown_images(source), device),
    "prior": lambda cfg, data, device, source: PriorObjective(cfg, data),
    "mixar": lambda cfg, data, device, source: MixARObjective(cfg, LatentNorm.from_dict(data["latents"]), device, data),
}


def build_objective(cfg: Config, data: dict[str, Any], device: torch.device, source: Source | None = None) -> Objective:
    """The objective of `cfg.task`, whose `build` gives its network.

    Args:
        data: the description of the data that `open_data` returns and checkpoints contain.
        device: the device of frozen networks.
        source: the images of a codec; not needed for the other tasks.
    """
    return OBJECTIVES[cfg.task](cfg, data, device, source)


def open_data(cfg: Config) -> tuple[Source, dict[str, Any]]:
    """The training data: images for the codecs, shards that fit the config for the prior and MixAR.

    Returns:
        the source, and its description in plain values: digests of the data and of the networks that made it, and the
        normalisation. A resumed run must match it. Checkpoints contain it, so that `mixar export` does not need shards.

    Raises:
        UserError: the data is missing, is damaged or does not fit the config.
    """
    if cfg.task in ("vae", "tokenizer"):
        images = training_images(cfg.data)
        return ImageSource(images, cfg.data.image_size), {"images": images.fingerprint}
    manifest = read_manifest(cfg.data.shards, cfg.data.cache)
    check_manifest(manifest, cfg)
    pre_drawn = cfg.task == "mixar" and cfg.ti_mix.enabled and cfg.ti_mix.source == "shards"
    source = ShardSource(cfg.data.shards, cfg.data.cache, pre_drawn)
    data = {"shards": source.digest, "vae": manifest.vae, "tokenizer": manifest.tokenizer, "count": manifest.count}
    if source.recipe is not None:
        check_pre_drawn(source.recipe, manifest, cfg)
        data["pre_drawn"] = source.recipe
    if cfg.task == "mixar":
        data["latents"] = latent_norm(cfg, manifest).to_dict()
    return source, data


def latent_norm(cfg: Config, manifest: Manifest | None = None) -> LatentNorm:
    """MAR's factor if `vae.latent_scale` is set, else the statistics in the shards' manifest."""
    if cfg.vae.latent_scale is not None:
        return LatentNorm.from_scale(cfg.vae.latent_scale, cfg.vae.latent_channels)
    manifest = manifest or read_manifest(cfg.data.shards, cfg.data.cache)
    return LatentNorm(torch.tensor(manifest.latent_mean), torch.tensor(manifest.latent_std))


def _shown_images(source: Source | None) -> Tensor:
    """The images of a codec's preview, uint8 [k, 3, H, W]: of all classes in turn, or evenly of more than `SHOWN`."""
    assert isinstance(source, ImageSource)
    labels = np.asarray(source.images.labels)
    order = labels.argsort(kind="stable")
    classes, first = np.unique(labels[order], return_index=True)
    turn = np.arange(len(order)) - first[np.searchsorted(classes, labels[order])]  # of each image within its class
    rows = order[np.lexsort((labels[order], turn))][: max(SHOWN, len(classes))]
    spread = np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).astype(int)
    return torch.stack([source[i][0] for i in rows[spread].tolist()])
