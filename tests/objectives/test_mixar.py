"""The training step of MixAR: what it computes, what it waits for, what it compiles."""

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from mixar.codecs import LatentNorm
from mixar.config import Config, PriorConfig, load_config, to_dict
from mixar.data.batch import Batch
from mixar.dist import Place
from mixar.engine import build_engine
from mixar.gpu.waits import ON_THE_HOST, Reads
from mixar.mixing import ground_truth_share
from mixar.objectives import MixARObjective
from mixar.objectives import mixar as module
from mixar.prior import Prior
from mixar.weights import write_export

ROOT = Path(__file__).parents[2]
PLACE = Place(0, 1, torch.device("cpu"))
BATCH = 32


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    """The demo's MixAR made small, its λ on the way from 1 to 0 between the epochs 0 and 1, and MAR's dropout."""
    prior = PriorConfig(width=32, depth=1, heads=2, mlp_width=64, bits=8, grid=4, classes=10)
    write_export(tmp_path / "prior", "prior", to_dict(prior), Prior(prior).state_dict())
    return load_config(
        ROOT / "configs/demo/mixar.yaml",
        [f"prior.weights={tmp_path / 'prior'}", "ti_mix.start_epoch=0", "ti_mix.duration_epochs=1", "train.batch=32",
         "model.encoder_width=32", "model.encoder_depth=2", "model.encoder_heads=2", "model.head_depth=2",
         "model.head_width=32", "model.dropout=0.1", "train.precision=fp32"],
    )  # fmt: skip


def objective_of(cfg: Config) -> MixARObjective:
    norm = LatentNorm(torch.zeros(cfg.vae.latent_channels), torch.ones(cfg.vae.latent_channels))
    return MixARObjective(cfg, norm, PLACE.device)


def batch_of(cfg: Config, step: int) -> Batch:
    index = torch.arange(step * BATCH, (step + 1) * BATCH)
    generator = torch.Generator().manual_seed(step)
    moments = torch.randn(BATCH, 2 * cfg.vae.latent_channels, 4, 4, generator=generator).half()
    codes = torch.randint(256, (BATCH, cfg.model.tokens), generator=generator)
    return Batch(index, index.tolist(), [str(i) for i in index], index % 10, moments=moments, codes=codes)


@pytest.mark.slow
def test_compiled_blocks_are_compiled_once(cfg: Config, quick_compiler: None) -> None:
    cfg.engine.compile = True
    cfg.model.encoder_depth = cfg.model.decoder_depth = cfg.model.head_depth = 1  # each block is compiled by itself
    torch.compiler.reset()
    counters.clear()
    engine = build_engine(cfg, objective_of(cfg), PLACE)
    for step in range(4):
        info = engine.step([batch_of(cfg, step)], step / 3)
    assert counters["stats"]["unique_graphs"] == 3, "a block of the encoder, one of the decoder, the head"
    assert info.finite and info.scalars["ti_mix/generated"][0] > 0, "λ has fallen, and the prior's tokens are mixed in"


def test_a_step_waits_for_no_device(cfg: Config) -> None:
    engine = build_engine(cfg, objective_of(cfg), PLACE)
    engine.step([batch_of(cfg, 0)], 0.5)  # tables are made in the first one
    batch = batch_of(cfg, 1)
    with Reads() as reads:
        engine.step([batch], 0.5)
    assert set(reads.sites) <= {*ON_THE_HOST}
    with reads:
        torch.ones(1).item(), torch.ones(2)[torch.ones(2) > 0]
    assert reads.sites["outside"] == 2, "the watch does see what reads a value"


@pytest.mark.parametrize("epoch", [0.01, 0.1, 0.6])
def test_the_prior_runs_for_the_images_that_take_its_tokens(cfg: Config, epoch: float, monkeypatch) -> None:
    objective, batch = objective_of(cfg), batch_of(cfg, 3)
    ran, fill = [], module.fill

    def noting(prior, codes, masked, labels, u):
        ran.append(len(codes))
        return fill(prior, codes, masked, labels, u)

    monkeypatch.setattr(module, "fill", noting)
    batch, masking = objective._mask(batch)
    codes, mixture, share, _ = objective._codes(batch, masking, epoch)
    assert share == ground_truth_share(cfg.ti_mix, epoch) < 1
    mixed = masking.masked & (mixture.rho >= share)
    assert sum(ran) == mixed.any(-1).sum() and (epoch > 0.05 or sum(ran) < BATCH)
    monkeypatch.setattr(objective, "_asking", lambda *_: list(range(BATCH)))
    everyone = objective._codes(batch, masking, epoch)[1]
    assert torch.equal(mixture.drawn[mixed], everyone.drawn[mixed]) and not torch.equal(mixture.drawn, codes)
