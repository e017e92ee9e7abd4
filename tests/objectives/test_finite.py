"""Weights that are not finite are reported where they are read or shown, not as black pictures or any tokens."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixar.codecs import VAE, build_tokenizer
from mixar.config import Config, load_config
from mixar.errors import UserError
from mixar.objectives import PriorObjective, TokenizerObjective, VAEObjective
from mixar.objectives.frozen import Frozen
from mixar.prior import Prior
from mixar.weights import fingerprint
from tests.home import make_sources

NAN = float("nan")


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    return make_sources(tmp_path)


def test_previews_name_the_network(cfg: Config) -> None:
    shown = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    vae, tokenizer, prior = VAE(cfg.vae).eval(), build_tokenizer(cfg.tokenizer).eval(), Prior(cfg.prior).eval()
    cpu = torch.device("cpu")
    for network, objective in (
        (vae, VAEObjective(cfg, shown, cpu)), (tokenizer, TokenizerObjective(cfg, shown, cpu)),
    ):  # fmt: skip
        assert objective.preview(network).shape == (4, 3, 16, 16)
        network.decoder.conv_out.bias.data[0] = NAN
        with pytest.raises(UserError, match=f"the {objective.kind} gave values that are not finite"):
            objective.preview(network)
    drawn = PriorObjective(cfg, {})
    assert drawn.preview(prior).shape == (32, 3, 16, 16)
    drawn.frozen.tokenizer.decoder.conv_out.bias.data[0] = NAN
    with pytest.raises(UserError, match="the tokenizer gave values that are not finite"):
        drawn.preview(prior)
    prior.prediction_layer.bias.data[0] = NAN
    with pytest.raises(UserError, match="the prior gave values that are not finite"):
        drawn.preview(prior)


@pytest.mark.parametrize("kind", ["vae", "tokenizer", "prior"])
def test_frozen_networks_of_broken_weights_are_refused(tmp_path: Path, cfg: Config, kind: str) -> None:
    file = tmp_path / kind / "model.safetensors"
    state = load_file(file)
    known, name = fingerprint(state), next(iter(state))
    state[name].view(-1)[0] = NAN
    save_file(state, file)
    about = file.with_name("config.json")
    about.write_text(about.read_text().replace(known, fingerprint(state)))
    with pytest.raises(UserError, match=rf"{kind}\.weights=.* has weights that are not finite, such as {name}"):
        getattr(Frozen(load_config(tmp_path / "config.yaml"), {}), kind)
