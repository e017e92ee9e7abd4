"""The training of the codecs: reconstruction, plus the VAE's KL divergence or the losses of a tokenizer's quantizer."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixar import rng
from mixar.codecs import VAE, Tokenizer, build_tokenizer, from_bytes, kl, posterior, to_bytes
from mixar.config import Config, to_dict
from mixar.data.batch import Batch
from mixar.engine import Scalars
from mixar.errors import not_finite
from mixar.objectives.base import RandomInit, mean_of
from mixar.rng import Stream
from mixar.weights import write_export


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute plus mean squared error, both in [0, 1] units of brightness."""
    return F.l1_loss(output, target) + F.mse_loss(output, target)


class CodecObjective(RandomInit):
    """The common part of both codecs: training on images, and reconstructions as the preview."""

    kind: str

    def __init__(self, cfg: Config, shown: Tensor) -> None:
        """`shown`: uint8 [k, 3, H, W], the images that a preview reconstructs."""
        self.cfg, self.seed = cfg, cfg.seed
        self.shown = shown

    def decays(self, name: str, parameter: Tensor) -> bool:
        return parameter.ndim > 1

    def reconstruct(self, model: nn.Module, images: Tensor) -> Tensor:
        """The codec's reconstruction of images [B, 3, H, W] in [0, 1]."""
        raise NotImplementedError

    @torch.no_grad()
    def preview(self, model: nn.Module) -> Tensor | None:
        device = next(model.parameters()).device
        output = self.reconstruct(model, from_bytes(self.shown.to(device)))
        if not output.isfinite().all():
            raise not_finite(self.kind)
        return torch.stack([self.shown, to_bytes(output).cpu()], 1).flatten(0, 1)

    def export(self, model: nn.Module, folder: Path, about: dict[str, Any]) -> None:
        section = getattr(self.cfg, self.kind)
        write_export(folder, self.kind, to_dict(section) | {"weights": None}, model.state_dict(), replace=True, **about)


class VAEObjective(CodecObjective):
    """Reconstruction plus `vae.kl_weight` times the KL divergence of the posterior, per image."""

    kind = "vae"

    def build(self) -> nn.Module:
        return VAE(self.cfg.vae)

    def loss(self, model: nn.Module, batch: Batch, epoch: float) -> tuple[Tensor, Scalars]:
        assert batch.images is not None
        images = from_bytes(batch.images)
        grid = self.cfg.latent_grid
        noise = rng.normal(self.cfg.seed, Stream.POSTERIOR, batch.index, self.cfg.vae.latent_channels, grid, grid)
        output, moments = model(images, noise)
        reconstruction = reconstruction_loss(output, images)
        divergence = kl(moments).mean()
        loss = reconstruction + self.cfg.vae.kl_weight * divergence
        parts = {"loss": loss, "loss/reconstruction": reconstruction, "loss/kl": divergence}
        return loss, {name: mean_of(value) for name, value in parts.items()}

    def reconstruct(self, model: nn.Module, images: Tensor) -> Tensor:
        assert isinstance(model, VAE)
        return model.decode(posterior(model.encode(images))[0])


class TokenizerObjective(CodecObjective):
    """Reconstruction plus the losses of the tokenizer's quantizer."""

    kind = "tokenizer"
    _assignment: Tensor | None = None  # the mean over a step's images; None if one pass has them all

    def build(self) -> nn.Module:
        return build_tokenizer(self.cfg.tokenizer)

    def survey(self, model: nn.Module, batches: Sequence[Batch], mean: Callable[[Tensor], Tensor]) -> None:
        # the entropy of the mean assignment is not a mean over images: a pass needs the assignments of all others
        found = [model(from_bytes(batch.images), survey=True)[0] for batch in batches if batch.images is not None]
        self._assignment = mean(torch.stack(found).mean(0))

    def loss(self, model: nn.Module, batch: Batch, epoch: float) -> tuple[Tensor, Scalars]:
        assert batch.images is not None
        images = from_bytes(batch.images)
        output, parts = model(images, self._assignment)
        reconstruction = reconstruction_loss(output, images)
        loss = reconstruction + parts.pop("quantizer_loss")
        named = {"loss": loss, "loss/reconstruction": reconstruction}
        named |= {f"loss/{name.removesuffix('_loss')}": value for name, value in parts.items()}
        return loss, {name: mean_of(value) for name, value in named.items()}

    def reconstruct(self, model: nn.Module, images: Tensor) -> Tensor:
        assert isinstance(model, Tokenizer)
        return model.decode(model.encode(images))
