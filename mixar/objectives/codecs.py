"""Training the two codecs: reconstruction with the VAE's divergence, or with the tokenizer's lookup-free losses."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixar import draws
from mixar.codecs import VAE, Tokenizer, kl
from mixar.config import Config, to_dict
from mixar.data.batch import Batch
from mixar.draws import Stream
from mixar.engine import Scalars
from mixar.objectives.base import Drawn, mean_of
from mixar.weights import write_export


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute plus mean squared error, both in [0, 1] units of brightness."""
    return F.l1_loss(output, target) + F.mse_loss(output, target)


class CodecObjective(Drawn):
    """What both codecs share: images in, reconstructions to look at."""

    kind: str

    def __init__(self, cfg: Config, shown: Tensor) -> None:
        """`shown`: uint8 [k, 3, H, W], the images whose reconstructions a preview holds."""
        self.cfg, self.seed = cfg, cfg.seed
        self.shown = shown

    def decays(self, name: str, parameter: Tensor) -> bool:
        return parameter.ndim > 1

    def reconstruct(self, model: nn.Module, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] through the codec and back."""
        raise NotImplementedError

    @torch.no_grad()
    def preview(self, model: nn.Module) -> Tensor | None:
        device = next(model.parameters()).device
        output = self.reconstruct(model, self.shown.to(device) / 255)
        pairs = torch.stack([self.shown, (output.float().clamp(0, 1) * 255).round().byte().cpu()], 1)
        return pairs.flatten(0, 1)

    def export(self, model: nn.Module, folder: Path, about: dict[str, Any]) -> None:
        section = getattr(self.cfg, self.kind)
        write_export(folder, self.kind, to_dict(section) | {"weights": None}, model.state_dict(), replace=True, **about)


class VAEObjective(CodecObjective):
    """Reconstruction plus `vae.kl_weight` times the divergence of an image's posterior."""

    kind = "vae"

    def build(self) -> nn.Module:
        return VAE(self.cfg.vae)

    def loss(self, model: nn.Module, batch: Batch, epoch: float) -> tuple[Tensor, Scalars]:
        assert batch.images is not None
        images = batch.images / 255
        grid = self.cfg.vae.grid
        noise = draws.normal(self.cfg.seed, Stream.POSTERIOR, batch.index, self.cfg.vae.latent_channels, grid, grid)
        output, moments = model(images * 2 - 1, noise)
        reconstruction = reconstruction_loss(output.float() / 2 + 0.5, images)
        divergence = kl(moments).mean()
        loss = reconstruction + self.cfg.vae.kl_weight * divergence
        return loss, {"loss": mean_of(loss), "reconstruction": mean_of(reconstruction), "kl": mean_of(divergence)}

    def reconstruct(self, model: nn.Module, images: Tensor) -> Tensor:
        assert isinstance(model, VAE)
        mean = model.encode(images * 2 - 1).chunk(2, 1)[0]
        return model.decode(mean) / 2 + 0.5


class TokenizerObjective(CodecObjective):
    """Reconstruction plus MaskBit's commitment and entropy losses."""

    kind = "tokenizer"
    _assignment: Tensor | None = None  # the mean over a step's images; None where one pass sees them all

    def build(self) -> nn.Module:
        return Tokenizer(self.cfg.tokenizer)

    def survey(self, model: nn.Module, batches: Sequence[Batch], mean: Callable[[Tensor], Tensor]) -> None:
        # the entropy of the mean assignment is no mean over the images: a pass must know what the others assign
        found = [model(batch.images / 255, survey=True)[0] for batch in batches if batch.images is not None]
        self._assignment = mean(torch.stack(found).mean(0))

    def loss(self, model: nn.Module, batch: Batch, epoch: float) -> tuple[Tensor, Scalars]:
        assert batch.images is not None
        images = batch.images / 255
        output, parts = model(images, self._assignment)
        reconstruction = reconstruction_loss(output.float(), images)
        loss = reconstruction + parts.pop("quantizer_loss")
        scalars = {"loss": mean_of(loss), "reconstruction": mean_of(reconstruction)}
        return loss, scalars | {name: mean_of(value) for name, value in parts.items()}

    def reconstruct(self, model: nn.Module, images: Tensor) -> Tensor:
        assert isinstance(model, Tokenizer)
        return model.decode(model.encode(images))
