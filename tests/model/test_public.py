"""The public MAR checkpoints load into `guidance: none` key for key."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from mixar.__main__ import main
from mixar.codecs import VAE
from mixar.config import load_config, to_dict
from mixar.errors import UserError
from mixar.model import MixAR, init_weights
from mixar.sampling import MixARPipeline
from mixar.weights import load_strict, read_public, write_export

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "data.image_size=16", "data.classes=3", "vae.width=16", "vae.multipliers=[1,2]", "vae.blocks=1", "vae.attention=[]",
    "vae.latent_channels=4", "vae.latent_scale=0.5", "model.guidance=none", "model.grid=8", "model.class_tokens=2",
    "model.encoder_width=32", "model.encoder_depth=1", "model.encoder_heads=2", "model.head_depth=1",
    "model.head_width=32", "sample.steps=2", "sample.diffusion_steps=3",
]  # fmt: skip


def manifest(size: str) -> dict[str, torch.Tensor]:
    """All keys of a published checkpoint at their full shapes, one value behind each, so that the file stays small."""
    entries = json.loads((ROOT / "tests" / "manifests" / f"mar_{size}.json").read_text())
    return {name: torch.zeros(1).expand(shape) for name, (shape, _) in entries.items()}


@pytest.mark.parametrize(("size", "config"), [("base", "mar_b"), ("large", "mar_l"), ("huge", "mar_h")])
def test_published_keys_fit(size: str, config: str, tmp_path) -> None:
    file = tmp_path / "checkpoint-last.pth"
    state = manifest(size)
    torch.save({"model": state, "model_ema": state, "args": argparse.Namespace(epochs=800)}, file)
    with pytest.raises(UserError, match="--trust-pickle"):
        read_public(file, "mar")
    found = read_public(file, "mar", trust_pickle=True)
    with torch.device("meta"):
        model = MixAR(load_config(ROOT / "configs" / f"{config}.yaml").model)
    assert {name: value.shape for name, value in model.state_dict().items()} == {n: v.shape for n, v in found.items()}
    del found["mask_token"]
    with pytest.raises(UserError, match="1 missing: mask_token"):
        load_strict(model, found, file)


def test_a_public_checkpoint_becomes_a_release(tmp_path, capsys) -> None:
    cfg = load_config(None, TINY)
    model = MixAR(cfg.model)
    init_weights(model, 1)
    live = {name: value + 1 for name, value in model.state_dict().items()}
    torch.save({"model": live, "model_ema": model.state_dict()}, tmp_path / "mar.pth")
    torch.manual_seed(0)
    write_export(tmp_path / "vae", "vae", to_dict(cfg.vae), VAE(cfg.vae).state_dict())
    (tmp_path / "config.yaml").write_text("{}\n")
    command = ["export", str(tmp_path / "config.yaml"), *TINY, f"vae.weights={tmp_path / 'vae'}", "--weights"]
    assert main([*command, str(tmp_path / "mar.pth")]) == 2 and "--out" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "mar.pth"), "--out", str(tmp_path / "out")]) == 0
    pipeline = MixARPipeline.from_pretrained(tmp_path / "out")
    for name, value in pipeline.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name  # the EMA, not the live weights
    assert pipeline.norm.std.tolist() == [2.0] * 4
    assert pipeline([0, 2], [0, 1]).shape == (2, 3, 16, 16)
