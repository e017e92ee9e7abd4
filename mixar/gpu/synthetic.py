"""Runs without shards or public weights: batches of the config's sizes, networks with random weights."""

import dataclasses
import gc
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mixar import rng
from mixar.codecs import VAE, LatentNorm, Tokenizer, build_tokenizer
from mixar.config import GUIDANCES, Config, images_per_pass
from mixar.data.batch import Batch, PreDrawn
from mixar.dist import Place
from mixar.engine import Engine, build_engine
from mixar.mixing import ratio_quantile
from mixar.model.attention import prepare_attention
from mixar.objectives import MixARObjective
from mixar.objectives.frozen import Frozen
from mixar.ops import load
from mixar.prior import Prior
from mixar.rng import Stream

Network = TypeVar("Network", bound=nn.Module)
FEW = 2  # blocks that are enough to have a first and a last one


def changed(cfg: Config, **sections: dict[str, Any]) -> Config:
    """A copy of a config with other values in some sections."""
    parts = {name: dataclasses.replace(getattr(cfg, name), **values) for name, values in sections.items()}
    return dataclasses.replace(cfg, **parts)


def few_blocks(cfg: Config) -> Config:
    """The config at its widths, with at most `FEW` blocks in each network, so that compilation takes seconds."""
    model, prior = cfg.model, cfg.prior
    depths = {name: min(FEW, getattr(model, name)) for name in ("encoder_depth", "decoder_depth", "head_depth")}
    return changed(cfg, model=depths, prior={"depth": min(FEW, prior.depth)})


def modes(cfg: Config) -> dict[str, Config]:
    """The forms of a training step by name: that of the config, each guidance, one mask ratio a batch, TI-Mix.

    All have few blocks, and a batch of one micro-batch; λ falls from 1 to 0 between the epochs 0 and 1.
    """
    own = changed(few_blocks(cfg), train={"batch": images_per_pass(cfg, ranks=1)})
    plain = changed(own, ti_mix={"enabled": False})
    guided = changed(plain, model={"guidance": "dc_mix" if cfg.model.guidance == "none" else cfg.model.guidance})
    mixing = {"enabled": True, "start_epoch": 0.0, "duration_epochs": 1.0, "end": 0.0}
    others = {
        **{f"guidance {name}": changed(plain, model={"guidance": name}) for name in GUIDANCES},
        "ratio_scope batch": changed(guided, mask={"ratio_scope": "batch"}),
        "TI-Mix online": changed(guided, ti_mix=mixing | {"source": "online"}),
        "TI-Mix from shards": changed(guided, ti_mix=mixing | {"source": "shards"}),
    }
    return {"as configured": own} | {name: form for name, form in others.items() if form != own}


class RandomNetworks(Frozen):
    """The frozen networks of a config's sizes with random weights, in place of those that it names."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        super().__init__(cfg, {})
        self.device = device

    @cached_property
    def vae(self) -> VAE:
        return self._random(lambda: VAE(self.cfg.vae), self.device)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self._random(lambda: build_tokenizer(self.cfg.tokenizer), torch.device("cpu"))

    @cached_property
    def prior(self) -> Prior:
        return self._random(lambda: Prior(self.cfg.prior), self.device)

    def _random(self, build: Callable[[], Network], device: torch.device) -> Network:
        """A network with the same weights in each process."""
        with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
            torch.manual_seed(0)
            return build().eval().requires_grad_(False)


class SyntheticObjective(MixARObjective):
    """MixAR's objective with random frozen networks, and without weights of zero, so that everything has a gradient."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        channels = cfg.vae.latent_channels
        # an objective without TI-Mix opens no weights
        quiet = changed(cfg, ti_mix={"enabled": False})
        super().__init__(quiet, LatentNorm(torch.zeros(channels), torch.ones(channels)), device)
        self.cfg, self.frozen = cfg, RandomNetworks(cfg, device)
        if cfg.ti_mix.enabled and cfg.ti_mix.source == "online":
            self.prior = self.frozen.prior

    def initial(self, name: str, like: Tensor) -> Tensor:
        value = super().initial(name, like)
        generator = torch.Generator().manual_seed(len(name))
        return value if value.any() else torch.randn(value.shape, generator=generator) * 0.02


def batch_of(cfg: Config, images: int, number: int, device: torch.device) -> Batch:
    """Micro-batch `number` of `images` each; its values are a function of its number."""
    generator = torch.Generator().manual_seed(number)
    index = torch.arange(number * images, (number + 1) * images)
    model, n, side = cfg.model, cfg.model.tokens, cfg.model.grid * cfg.model.patch
    moments = torch.randn(images, 2 * model.latent_channels, side, side, generator=generator).half()
    codes, drawn = (torch.randint(2**model.code_bits, (images, n), generator=generator) for _ in range(2))
    pre = None
    if cfg.ti_mix.enabled and cfg.ti_mix.source == "shards":
        ratio = ratio_quantile(torch.rand(images, generator=generator), cfg.mask.minimum, cfg.mask.std)
        order = rng.permutation(cfg.seed, Stream.MASK_ORDER, index, n)
        pre = PreDrawn(order, torch.ceil(n * ratio).long().tolist(), drawn)
    keys, labels = [str(i) for i in index.tolist()], index % model.classes
    return Batch(index, index.tolist(), keys, labels, moments, codes, pre).to(device)


def engine_of(cfg: Config, place: Place) -> Engine:
    """The engine of a run with random weights, after what a run prepares before its first step."""
    prepare_attention(cfg.model.attention, place.device)
    load(place.device.type)
    return build_engine(cfg, SyntheticObjective(cfg, place.device), place)


def single_engine(cfg: Config, device: torch.device) -> Engine:
    """The engine of one process, for which that of an earlier check makes room."""
    gc.collect()  # engines are parts of circles
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return engine_of(changed(cfg, engine={"name": "ddp"}), Place(0, 1, device))


def synchronise(device: torch.device) -> None:
    """Wait for a card; a CPU has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
