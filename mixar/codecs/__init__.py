"""The frozen networks between images in [0, 1] and tokens: the VAE (continuous) and the tokenizer (discrete).

And the discriminator that they are trained against.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch import nn

from mixar.codecs.discriminator import for_training
from mixar.codecs.images import from_bytes, to_bytes
from mixar.codecs.latents import LatentNorm
from mixar.codecs.maskbit import MaskBitTokenizer, ids_from_bits
from mixar.codecs.tokenizer import Tokenizer
from mixar.codecs.vae import VAE, kl, posterior
from mixar.codecs.vq import VQTokenizer
from mixar.config import TokenizerConfig, VAEConfig, section_from_dict
from mixar.errors import UserError
from mixar.weights import find_export, loaded, read_export, read_public

__all__ = [
    "TOKENIZERS",
    "VAE",
    "LatentNorm",
    "Tokenizer",
    "build_tokenizer",
    "for_training",
    "from_bytes",
    "ids_from_bits",
    "kl",
    "load_tokenizer",
    "load_vae",
    "posterior",
    "to_bytes",
]

TOKENIZERS: dict[str, Callable[[TokenizerConfig], Tokenizer]] = {
    "maskbit": MaskBitTokenizer,
    "vq": VQTokenizer,
}

Section = TypeVar("Section", VAEConfig, TokenizerConfig)
Network = TypeVar("Network", bound=nn.Module)


def load_vae(cfg: VAEConfig, trust_pickle: bool = False) -> VAE:
    """The frozen VAE of `cfg.weights`: an export, with its own geometry, or a public checkpoint of `cfg`'s geometry.

    Raises:
        UserError: no weights are named, they do not exist, or they are those of another network.
    """
    return _load("vae", VAE, cfg, trust_pickle)


def load_tokenizer(cfg: TokenizerConfig, trust_pickle: bool = False) -> Tokenizer:
    """The frozen tokenizer of `cfg.weights`; otherwise as `load_vae`."""
    return _load("tokenizer", build_tokenizer, cfg, trust_pickle)


def build_tokenizer(cfg: TokenizerConfig) -> Tokenizer:
    """The tokenizer that `cfg.kind` names, randomly initialised."""
    return TOKENIZERS[cfg.kind](cfg)


def _load(kind: str, build: Callable[[Section], Network], cfg: Section, trust_pickle: bool) -> Network:
    source = cfg.weights
    if source is None:
        raise UserError(f"no weights for the {kind}: write {kind}.weights=<export folder or public checkpoint file>")
    if Path(source).is_dir():
        source = str(find_export(source))
        description, state = read_export(source, kind)
        cfg = section_from_dict(type(cfg), description["config"], f"{source}/config.json")
    else:
        state = read_public(source, kind, trust_pickle)
    return loaded(lambda: build(cfg), state, source).eval().requires_grad_(False)
