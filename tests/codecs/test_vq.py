"""A tokenizer of learned codes in MaskBit's place, from its training to MixAR's samples."""

import json
from pathlib import Path

import pytest
import torch

from mixar.codecs import load_tokenizer
from mixar.config import Config, TokenizerConfig, load_config
from mixar.data.images import open_images
from mixar.data.shards import prepare
from mixar.errors import UserError
from mixar.objectives.frozen import Frozen
from mixar.sampling import MixARPipeline
from mixar.train import train
from mixar.weights import read_export

pytestmark = pytest.mark.slow  # as a whole: trainings, compilers or many bytes


@pytest.fixture(scope="module")
def make_config(home, tmp_path_factory):
    """The config of `home` for a VQ of 64 codes in 5 channels, with overrides; all that it makes is in one folder."""
    root = tmp_path_factory.mktemp("vq")

    def make(task: str, *overrides: str) -> Config:
        return load_config(home / "config.yaml", [
            f"task={task}", f"run_dir={root / task}", "tokenizer.kind=vq", "tokenizer.code_dim=5",
            f"tokenizer.weights={root / 'tokenizer'}", f"prior.weights={root / 'prior'}",
            f"data.shards={root / 'shards'}", *overrides,
        ])  # fmt: skip

    return make


@pytest.fixture(scope="module")
def made(make_config, home) -> Path:
    """The export of a MixAR with DC-Mix and TI-Mix, after the tokenizer, the shards and the prior that it needs."""
    train(make_config("tokenizer", "tokenizer.weights=null"))
    cfg = make_config("prior", "train.epochs=0.25")
    prepare(cfg, open_images(cfg.data), Frozen(cfg, {}).vae, load_tokenizer(cfg.tokenizer), "cpu", progress=False)
    train(cfg)
    return train(make_config("mixar", "train.epochs=1"))


def test_the_tokenizer_learns_and_is_exported(make_config, made) -> None:
    run = Path(make_config("tokenizer").run_dir)
    first, *_, last = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert last["loss"] < first["loss"] and {"loss/codebook", "loss/commitment", "loss/avg_entropy"} <= last.keys()
    about, state = read_export(run / "exports" / "160-ema", "tokenizer")
    assert (about["config"]["kind"], about["config"]["code_dim"]) == ("vq", 5)
    assert state["quantize.codebook"].shape == (64, 5)


def test_samples_go_by_its_codes(make_config, made) -> None:
    pipeline = MixARPipeline.from_pretrained(made, "cpu", "fp32")
    tokenizer = load_tokenizer(TokenizerConfig(weights=str(Path(made, "tokenizer"))))
    assert torch.equal(pipeline.model.code_proj.codebook, tokenizer.codebook())
    codes = pipeline.sample_codes([0, 1], [5, 6])
    assert codes.shape == (2, 16) and codes.min() >= 0 and codes.max() < 64
    images = pipeline([0, 1], [5, 6], codes)
    assert images.shape == pipeline.decode_codes(codes).shape == (2, 3, 16, 16)
    assert not torch.equal(images, pipeline([0, 1], [5, 6], codes.flip(0)))


def test_training_leaves_its_codes_alone_and_resumes(make_config, made) -> None:
    folder = train(make_config("mixar", "train.epochs=1.25"))
    before, after = (read_export(export, "mixar")[1] for export in (made, folder))
    assert torch.equal(before["code_proj.codebook"], after["code_proj.codebook"])
    assert not torch.equal(before["code_proj.weight"], after["code_proj.weight"])


def test_dc_mix_needs_its_weights(make_config, made, tmp_path) -> None:
    with pytest.raises(UserError, match=r"write tokenizer\.weights="):
        train(make_config("mixar", f"run_dir={tmp_path}", "tokenizer.weights=null"))
    with pytest.raises(UserError, match="has vq as its kind, but the config has maskbit"):
        train(make_config("mixar", f"run_dir={tmp_path / 'b'}", "tokenizer.kind=maskbit", "tokenizer.code_dim=null"))
