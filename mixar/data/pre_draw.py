"""Pre-drawn tokens for TI-Mix: the prior's tokens drawn once, in shards of their own, one row per image."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from streaming import LocalDataset

from mixar import rng
from mixar.config import Config
from mixar.data.manifest import Manifest, check_manifest, read_manifest
from mixar.data.parts import SIZE, Parts, Row
from mixar.data.shards import code_dtype
from mixar.errors import UserError
from mixar.files import write_json
from mixar.mixing import Masking, ratio_quantile
from mixar.prior import Prior, fill
from mixar.rng import Stream
from mixar.weights import fingerprint

PRE_DRAWN = "ti_mix"  # the folder below the shards
RECIPE = "pre_drawn.json"  # written last: its presence makes the set complete
BATCH = 64  # images whose variants go through the prior together
ORDER_DTYPE = "uint16"  # grids of up to 256 x 256


def predraw(
    cfg: Config,
    prior: Prior,
    device: torch.device | str,
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
    part_size: int = SIZE,
) -> None:
    """Draw `ti_mix.variants` pairs of a mask and x̂_d (Eqs. 10-11) for every image of `cfg.data.shards`.

    A row holds `order` [V, N], of which the first `count` [V] positions are masked, and `drawn` [V, N]. With
    `data.flip`, odd variants belong to the mirrored image. Every draw is keyed by its row and variant. Ranks share the
    work and resume as in `prepare`.

    Raises:
        UserError: shards that are missing or cannot be written, or that `check_pre_draw` refuses.
        PassingError: as `prepare`.
    """
    settings, manifest = cfg.ti_mix, read_manifest(cfg.data.shards)
    check_pre_draw(cfg, prior, manifest)
    recipe = {
        "tokenizer": manifest.tokenizer,
        "prior": fingerprint(prior.state_dict()),
        "variants": settings.variants,
        "flip": cfg.data.flip,
        "draw": settings.draw,
        "mask": [cfg.mask.minimum, cfg.mask.std],
        "seed": cfg.seed,
        "count": manifest.count,
    }
    parts = Parts(Path(cfg.data.shards, PRE_DRAWN), recipe, manifest.count, part_size)
    shape = f"{settings.variants},{manifest.code_grid**2}"
    columns = {
        "order": f"ndarray:{ORDER_DTYPE}:{shape}",
        "count": f"ndarray:int32:{settings.variants}",
        "drawn": f"ndarray:{code_dtype(manifest.code_bits)}:{shape}",
    }
    rows = partial(_rows, cfg, prior.to(device), LocalDataset(cfg.data.shards))

    def rows_of(ranges: Iterator[range]) -> Iterator[tuple[range, Iterator[Row], dict[str, Any]]]:
        for indices in ranges:
            yield indices, rows(indices), {}

    parts.write(rank, world, columns, rows_of, progress and rank == 0)
    parts.close()
    write_json(parts.folder / RECIPE, parts.recipe)


def check_pre_draw(cfg: Config, prior: Prior, manifest: Manifest) -> None:
    """Refuse shards, made or planned, for which `prior` cannot draw tokens.

    Raises:
        UserError: shards that do not fit the config or the prior, or an odd number of variants for two flips.
    """
    variants = cfg.ti_mix.variants
    if cfg.data.flip and variants % 2:
        raise UserError(
            f"ti_mix.variants={variants} does not divide between the two flips: "
            f"write ti_mix.variants={variants + 1}, or data.flip=false"
        )
    check_manifest(manifest, cfg)
    known = {"bits": prior.config.bits, "grid": prior.config.grid, "classes": prior.config.classes}
    found = {"bits": manifest.code_bits, "grid": manifest.code_grid, "classes": len(manifest.classes)}
    if known != found:
        raise UserError(f"the prior has {known}, the shards {found}: write prior.weights=<a prior for these>")


@torch.inference_mode()
def _rows(cfg: Config, prior: Prior, dataset: LocalDataset, indices: range) -> Iterator[Row]:
    """The rows at `indices`; variant v of row i draws with the key i V + v."""
    variants, n, device = cfg.ti_mix.variants, prior.config.grid**2, next(prior.parameters()).device
    dtype = code_dtype(prior.config.bits)
    for start in range(indices.start, indices.stop, BATCH):
        rows = torch.arange(start, min(start + BATCH, indices.stop))
        images = [dataset[int(row)] for row in rows]
        index = (rows[:, None] * variants + torch.arange(variants)).flatten().to(device)
        flips = [v % 2 if cfg.data.flip else 0 for v in range(variants)]
        codes = torch.from_numpy(np.concatenate([image["codes"][flips] for image in images])).long().to(device)
        labels = torch.tensor([image["label"] for image in images], device=device).repeat_interleave(variants)
        order = rng.permutation(cfg.seed, Stream.MASK_ORDER, index, n)
        level = rng.uniform(cfg.seed, Stream.MASK_RATIO, index)
        count = torch.ceil(n * ratio_quantile(level, cfg.mask.minimum, cfg.mask.std)).int()
        sample = cfg.ti_mix.draw == "sample"
        u = rng.uniform(cfg.seed, Stream.PRIOR_FILL, index, n, prior.config.splits) if sample else None
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            drawn = fill(prior, codes, Masking.from_order(order, count.tolist()).masked, labels, u)
        table = zip(*(rearrange(x.cpu().numpy(), "(b v) ... -> b v ...", v=variants) for x in (order, count, drawn)))
        for orders, counts, tokens in table:
            yield {"order": orders.astype(ORDER_DTYPE), "count": counts, "drawn": tokens.astype(dtype)}
