"""`mixar export`: the EMA weights of a run's newest complete checkpoint, without training it on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixar.config import load_config
from mixar.train import train
from mixar.weights import read_export

VAE_RUN = """
task: vae
data: {images: digits, image_size: 16, classes: 10, held_out: 4936, workers: 0}
vae: {width: 16, multipliers: [1, 2], blocks: 1, attention_levels: [], latent_channels: 4}
optim: {lr: 0.01, warmup_epochs: 0, ema: 0.5}
train: {epochs: 2, batch: 32, precision: fp32}
"""
MIXAR_RUN = """
data: {image_size: 16, classes: 3, workers: 0}
vae: {multipliers: [1, 2], latent_channels: 4}
tokenizer: {multipliers: [1, 2], bits: 4}
model: {grid: 8, class_tokens: 2, encoder_width: 32, encoder_depth: 1, encoder_heads: 2, head_depth: 1, head_width: 32}
mask: {group: 4}
optim: {lr: 0.01, warmup_epochs: 0, ema: 0.5}
train: {epochs: 2, batch: 12, precision: fp32}
sample: {steps: 2, diffusion_steps: "2", prior_steps: 2}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The directory of a small VAE's run over 64 digits, with checkpoints at 64 and 128 images and its export."""
    root = tmp_path_factory.mktemp("vae")
    (root / "vae.yaml").write_text(VAE_RUN)
    train(load_config(root / "vae.yaml", [f"run_dir={root}/run"]))
    return root / "run"


def test_equals_what_training_exports(mixar, finished, tmp_path):
    before = sorted(finished.rglob("*"))
    assert mixar("export", finished, "--out", tmp_path / "again")[0] == 0
    (about, state), (expected, trained) = (
        read_export(folder, "vae") for folder in (tmp_path / "again", finished / "exports" / "128-ema")
    )
    assert about == expected and about["images"] == 128
    assert state.keys() == trained.keys() and all(torch.equal(state[name], trained[name]) for name in state)
    assert sorted(finished.rglob("*")) == before


def test_says_where_the_export_is(mixar, refused, finished):
    status, said, _ = mixar("export", finished)
    assert status == 0 and "already" in said and str(finished / "exports" / "128-ema") in said
    assert "another folder" in refused("export", finished, "--out", finished / "exports" / "128-ema")


def test_takes_the_newest_complete_checkpoint(mixar, refused, finished, tmp_path):
    done = finished / "checkpoints" / "000000000128" / "DONE"
    done.unlink()
    assert mixar("export", finished, "--out", tmp_path / "older")[0] == 0
    done.touch()
    assert read_export(tmp_path / "older", "vae")[0]["images"] == 64
    (torn,) = (finished / "checkpoints" / "000000000128").glob("*.distcp")
    whole = torn.read_bytes()
    torn.write_bytes(whole[: len(whole) // 10])
    assert "cannot be read" in refused("export", finished, "--out", tmp_path / "torn")
    torn.write_bytes(whole)


def test_nothing_to_export(refused, finished, tmp_path):
    assert "config.yaml" in refused("export", tmp_path)
    (tmp_path / "config.yaml").write_text((finished / "config.yaml").read_text())
    assert "no complete checkpoint" in refused("export", tmp_path)


def test_refuses_weights_of_another_model(refused, finished, tmp_path):
    assert "cannot be read" in refused("export", finished, "vae.width=32", "--out", tmp_path / "wide")


def test_a_run_without_its_prior_gets_it_on_export(mixar, refused, release, tmp_path):
    for i in range(24):
        (tmp_path / f"images/{i % 3}").mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"images/{i % 3}/{i}.png")
    (tmp_path / "mixar.yaml").write_text(MIXAR_RUN)
    codecs = [f"vae.weights={release}/vae", f"tokenizer.weights={release}/tokenizer"]
    places = [f"data.images={tmp_path}/images", f"data.shards={tmp_path}/shards", f"run_dir={tmp_path}/run"]
    for verb in ("prepare", "train"):
        assert mixar(verb, tmp_path / "mixar.yaml", *codecs, *places)[0] == 0
    assert "prior.weights=PATH" in refused("sample", tmp_path / "run")
    prior = f"prior.weights={release}/prior"
    assert mixar("export", tmp_path / "run", prior, "--out", tmp_path / "whole")[0] == 0
    assert mixar("sample", tmp_path / "whole", "--count", 4)[0] == 0
    _, whole = read_export(tmp_path / "whole", "mixar")
    _, trained = read_export(tmp_path / "run" / "exports" / "48-ema", "mixar")
    assert whole.keys() == trained.keys() and all(torch.equal(whole[name], trained[name]) for name in whole)
