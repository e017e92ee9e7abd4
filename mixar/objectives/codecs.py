"""The training of the codecs: reconstruction, and the VAE's KL divergence or the losses of a tokenizer's quantizer.

A perceptual and an adversarial loss can be added to either.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixar import rng
from mixar.codecs import VAE, Tokenizer, build_tokenizer, for_training, from_bytes, kl, posterior, to_bytes
from mixar.config import CodecLosses, Config, to_dict
from mixar.data.batch import Batch
from mixar.engine import Scalars
from mixar.errors import UserError, not_finite
from mixar.evaluation.maps import Maps, open_maps
from mixar.objectives.base import RandomInit, mean_of
from mixar.rng import Stream
from mixar.weights import write_export

Parts = dict[str, Tensor]  # scalar losses by their names in reports


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute plus mean squared error, both in [0, 1] units of brightness."""
    return F.l1_loss(output, target) + F.mse_loss(output, target)


def perceptual_loss(maps: Maps, output: Tensor, target: Tensor) -> Tensor:
    """The distance of images [B, 3, H, W] in a classifier's maps: LPIPS (Zhang et al. 2018) without learned weights.

    At each position the channels are normalised to unit length; their squared distance, from 0 to 4, is averaged over
    the positions and images of a map, then over the maps, so that it does not grow with the number of stages.
    """
    with torch.no_grad():
        targets = [F.normalize(x.float(), dim=1) for x in maps(target)]
    found = [F.normalize(x.float(), dim=1) for x in maps(output)]
    return torch.stack([(x - y).square().sum(1).mean() for x, y in zip(found, targets)]).mean()


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss, from its logits of real images and of reconstructions."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


class CodecObjective(RandomInit, ABC):
    """The common part of both codecs: losses of their reconstructions, which are also the preview."""

    kind: str

    def __init__(self, cfg: Config, shown: Tensor, device: torch.device) -> None:
        """`shown`: uint8 [k, 3, H, W], the images that a preview reconstructs; `device`: of the frozen classifier."""
        self.cfg, self.seed, self.device = cfg, cfg.seed, device
        self.section: CodecLosses = getattr(cfg, self.kind)
        self.shown = shown
        self.maps: Maps | None = None

    def build(self) -> nn.Module:
        return for_training(self.bare(), self.section)

    @abstractmethod
    def bare(self) -> nn.Module:
        """The codec alone."""

    def load_frozen(self) -> dict[str, str]:
        path = self.section.perceptual_features
        if self.section.perceptual_weight == 0 or path is None:
            return {}
        try:
            label, self.maps = open_maps(path, self.cfg.data.image_size, self.device)
        except UserError as error:
            raise UserError(f"{self.kind}.perceptual_features={path}: {error}") from None
        return {"features": label}

    def decays(self, name: str, parameter: Tensor) -> bool:
        return parameter.ndim > 1

    @abstractmethod
    def inputs(self, batch: Batch) -> Tensor | None:
        """What the codec's pass takes beside the images."""

    @abstractmethod
    def own_loss(self, found: Any) -> tuple[Tensor, Parts]:
        """The codec's own loss beside reconstruction, from what its pass returns beside images; and its parts."""

    def loss(self, model: nn.Module, batch: Batch, epoch: float) -> tuple[Tensor, Scalars]:
        assert batch.images is not None
        images, cfg = from_bytes(batch.images), self.section
        output, found, *logits = model(images, self.inputs(batch))
        reconstruction = reconstruction_loss(output, images)
        own, parts = self.own_loss(found)
        loss, parts = reconstruction + own, {"loss/reconstruction": reconstruction} | parts
        if self.maps is not None:
            parts["loss/perceptual"] = perceptual_loss(self.maps, output, images)
            loss = loss + cfg.perceptual_weight * parts["loss/perceptual"]
        total = loss
        if logits:
            judged, fake, real = logits[0].chunk(3)
            weight = cfg.discriminator_weight if epoch >= cfg.discriminator_start else 0.0
            parts |= {"loss/adversarial": -judged.mean(), "loss/discriminator": hinge_loss(real, fake)}
            loss = loss + weight * parts["loss/adversarial"]
            # the adversarial loss again with the opposite sign and without gradient to the codec: the discriminator is
            # left with the gradient of its own loss, in the same backward pass
            total = loss + weight * fake.mean() + parts["loss/discriminator"]
        return total, {name: mean_of(value) for name, value in ({"loss": loss} | parts).items()}

    @abstractmethod
    def reconstruct(self, model: nn.Module, images: Tensor) -> Tensor:
        """The codec's reconstruction of images [B, 3, H, W] in [0, 1]."""

    @torch.no_grad()
    def preview(self, model: nn.Module) -> Tensor | None:
        device = next(model.parameters()).device
        output = self.reconstruct(model, from_bytes(self.shown.to(device)))
        if not output.isfinite().all():
            raise not_finite(self.kind)
        return torch.stack([self.shown, to_bytes(output).cpu()], 1).flatten(0, 1)

    def export(self, model: nn.Module, folder: Path, about: dict[str, Any]) -> None:
        section = to_dict(self.section) | {"weights": None, "perceptual_features": None}  # paths of this machine
        write_export(folder, self.kind, section, model.state_dict(), replace=True, **about)


class VAEObjective(CodecObjective):
    """Reconstruction plus `vae.kl_weight` times the KL divergence of the posterior, per image."""

    kind = "vae"

    def bare(self) -> nn.Module:
        return VAE(self.cfg.vae)

    def inputs(self, batch: Batch) -> Tensor:
        grid = self.cfg.latent_grid
        return rng.normal(self.cfg.seed, Stream.POSTERIOR, batch.index, self.cfg.vae.latent_channels, grid, grid)

    def own_loss(self, found: Tensor) -> tuple[Tensor, Parts]:
        divergence = kl(found).mean()
        return self.cfg.vae.kl_weight * divergence, {"loss/kl": divergence}

    def reconstruct(self, model: nn.Module, images: Tensor) -> Tensor:
        assert isinstance(model, VAE)
        return model.decode(posterior(model.encode(images))[0])


class TokenizerObjective(CodecObjective):
    """Reconstruction plus the losses of the tokenizer's quantizer."""

    kind = "tokenizer"
    _assignment: Tensor | None = None  # the mean over a step's images; None if one pass has them all

    def bare(self) -> nn.Module:
        return build_tokenizer(self.cfg.tokenizer)

    def survey(self, model: nn.Module, batches: Sequence[Batch], mean: Callable[[Tensor], Tensor]) -> None:
        # the entropy of the mean assignment is not a mean over images: a pass needs the assignments of all others
        found = [model(from_bytes(batch.images), survey=True)[0] for batch in batches if batch.images is not None]
        self._assignment = mean(torch.stack(found).mean(0))

    def inputs(self, batch: Batch) -> Tensor | None:
        return self._assignment

    def own_loss(self, found: Parts) -> tuple[Tensor, Parts]:
        parts = {f"loss/{name.removesuffix('_loss')}": value for name, value in found.items()}
        return parts.pop("loss/quantizer"), parts

    def reconstruct(self, model: nn.Module, images: Tensor) -> Tensor:
        assert isinstance(model, Tokenizer)
        return model.decode(model.encode(images))
