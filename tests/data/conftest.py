"""A small set of images, tiny codecs, and shards made of them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixar.codecs import VAE, Tokenizer, build_tokenizer
from mixar.config import Config, load_config
from mixar.data.images import open_images
from mixar.data.shards import prepare

torch.set_num_threads(1)  # so that a forked process may use torch


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """40 colour images of odd sizes in two classes of 25 and 15, and a text."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(40):
        path = root / ("cat" if i < 25 else "dog") / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        height, width = rng.integers(16, 70, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path)
    (root / "cat/notes.txt").write_text("")
    return root


@pytest.fixture
def make_config(folder, tmp_path) -> Callable[..., Config]:
    """A config of 4x4 latents and tokens; arguments are overrides."""

    def make(*overrides: str) -> Config:
        return load_config(None, [
            f"data.images={folder}", f"data.shards={tmp_path}/shards", "data.image_size=16", "data.classes=2",
            "data.workers=0", "vae.width=32", "vae.multipliers=[1,1,1]", "vae.blocks=1", "vae.attention_levels=[]",
            "vae.latent_channels=3", "tokenizer.width=32", "tokenizer.multipliers=[1,1,1]", "tokenizer.blocks=1",
            "tokenizer.bits=6", "model.grid=4", "prior.width=16", "prior.depth=1", "prior.heads=2",
            "prior.mlp_width=32", "sample.prior_steps=4", *overrides,
        ])  # fmt: skip

    return make


@pytest.fixture
def codecs(make_config) -> tuple[VAE, Tokenizer]:
    """A VAE and a tokenizer with random weights, the same ones in every test."""
    torch.manual_seed(0)
    return VAE(make_config().vae).eval(), build_tokenizer(make_config().tokenizer).eval()


@pytest.fixture(scope="session")
def made() -> dict:
    """Shards that were made once, by the test session."""
    return {}


@pytest.fixture
def shards(make_config, codecs, tmp_path, tmp_path_factory, made) -> str:
    """A test's own copy of the shards of `folder`: three parts of 16, 16 and 8 images."""
    if not made:
        config = make_config(f"data.shards={tmp_path_factory.mktemp('made')}")
        prepare(config, open_images(config.data), *codecs, "cpu", progress=False, part_size=16)
        made["path"] = config.data.shards
    shutil.copytree(made["path"], tmp_path / "shards")
    return str(tmp_path / "shards")
