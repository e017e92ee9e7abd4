"""The training of the discrete prior: MaskBit's masked cross-entropy on the tokens of the shards."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixar import rng
from mixar.codecs import to_bytes
from mixar.config import Config, to_dict
from mixar.data.batch import Batch
from mixar.engine import Scalars
from mixar.errors import not_finite
from mixar.objectives.base import RandomInit, mean_of
from mixar.objectives.frozen import Frozen
from mixar.prior import Prior, keyed_draws, masked_loss, sample_codes, split_ids, training_mask
from mixar.rng import Stream
from mixar.weights import write_export


class PriorObjective(RandomInit):
    """LFQBert's loss, with random numbers keyed by the sample's global index."""

    def __init__(self, cfg: Config, made: dict[str, Any]) -> None:
        """`made`: the fingerprints of the codecs that made the shards, as in `Frozen`."""
        self.cfg, self.seed = cfg, cfg.seed
        self.frozen = Frozen(cfg, made)

    def build(self) -> nn.Module:
        return Prior(self.cfg.prior)

    def decays(self, name: str, parameter: Tensor) -> bool:
        return True  # MaskBit decays everything

    def loss(self, model: nn.Module, batch: Batch, epoch: float) -> tuple[Tensor, Scalars]:
        assert batch.codes is not None
        cfg, seed = self.cfg.prior, self.cfg.seed
        targets = split_ids(batch.codes, cfg.bits, cfg.splits)
        ratio = rng.uniform(seed, Stream.PRIOR_RATIO, batch.index, 1)[:, 0]
        where = rng.uniform(seed, Stream.PRIOR_MASK, batch.index, *targets.shape[1:])
        drop = rng.uniform(seed, Stream.CLASS_DROP, batch.index, 1)[:, 0] < cfg.class_drop_prob
        tokens, masked = training_mask(targets, ratio, where, 2 ** (cfg.bits // cfg.splits))
        loss, masked_only = masked_loss(model(tokens, batch.labels, drop), targets, masked, cfg.label_smoothing)
        return loss, {"loss": mean_of(loss), "loss/masked": mean_of(masked_only)}

    def open(self) -> None:
        self.frozen.open(["tokenizer"])

    @torch.no_grad()
    def preview(self, model: nn.Module) -> Tensor | None:
        if self.frozen.missing(["tokenizer"]):
            return None
        assert isinstance(model, Prior)
        device = next(model.parameters()).device
        seeds = torch.arange(32, device=device)
        u, gumbel = keyed_draws(seeds, self.cfg.prior.grid**2, self.cfg.prior.splits)
        codes = sample_codes(model, seeds % self.cfg.data.classes, self.cfg.sample, u, gumbel)
        images = self.frozen.tokenizer.to(device).decode(codes)
        self.frozen.rest(["tokenizer"])
        if not images.isfinite().all():
            raise not_finite("tokenizer")
        return to_bytes(images).cpu()

    def export(self, model: nn.Module, folder: Path, about: dict[str, Any]) -> None:
        section = to_dict(self.cfg.prior) | {"weights": None}
        made = {"tokenizer": self.frozen.made.get("tokenizer")}  # whose tokens it was trained on
        write_export(folder, "prior", section, model.state_dict(), replace=True, **made, **about)
