"""The codecs on their own: sizes, formulas, loading, precision."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mixar.codecs import (
    VAE,
    LatentNorm,
    Tokenizer,
    ids_from_bits,
    kl,
    load_tokenizer,
    load_vae,
    posterior,
    to_uint8,
)
from mixar.config import TokenizerConfig, VAEConfig, to_dict
from mixar.errors import UserError
from mixar.ops import code_bits
from mixar.weights import write_export

TINY_VAE = VAEConfig(width=32, multipliers=[1, 2], blocks=1, attention=[8], latent_channels=3, image_size=16)
TINY_TOKENIZER = TokenizerConfig(width=32, multipliers=[1, 2], blocks=1, decoder_blocks=2, bits=5, image_size=16)
CODECS = [("vae", VAE, TINY_VAE, load_vae), ("tokenizer", Tokenizer, TINY_TOKENIZER, load_tokenizer)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_totals_of_the_published_networks() -> None:
    with torch.device("meta"):
        assert parameters(VAE(VAEConfig(image_size=256))) == 69_836_067
        tokenizer = Tokenizer(TokenizerConfig(image_size=256))
    assert parameters(tokenizer) == 54_489_489
    assert parameters(tokenizer.encoder) == 25_126_286


def test_the_vae_keeps_its_grid_at_every_image_size() -> None:
    vae = VAE(TINY_VAE)
    for side in (16, 32):  # attention follows the nominal size, so 32 must neither fail nor change the network
        moments = vae.encode(torch.randn(2, 3, side, side))
        assert moments.shape == (2, 6, side // 2, side // 2)
        assert vae.decode(moments[:, :3]).shape == (2, 3, side, side)


def test_attention_lies_where_the_config_says() -> None:
    keys = VAE(TINY_VAE).state_dict()
    assert "encoder.down.1.attn.0.q.weight" in keys and "encoder.down.0.attn.0.q.weight" not in keys
    assert "decoder.up.1.attn.1.q.weight" in keys
    without = VAE(replace(TINY_VAE, decoder_attention=False)).state_dict()
    assert {key for key in keys if key not in without} == {key for key in keys if key.startswith("decoder.up.1.attn")}


def test_divergence_is_that_of_torchs_distributions() -> None:
    moments = torch.randn(4, 6, 2, 2)
    mean, std = posterior(moments)
    unit = torch.distributions.Normal(0, 1)
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(mean, std), unit).sum(dim=(1, 2, 3))
    assert torch.allclose(kl(moments), expected, atol=1e-5)
    assert torch.equal(kl(torch.zeros(1, 6, 2, 2)), torch.zeros(1))


def test_bytes_are_rounded_clamped_and_survive_the_round_trip() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    images = levels.float() / 127.5 - 1
    assert torch.equal(to_uint8(images), levels.permute(0, 2, 3, 1))
    assert torch.equal(to_uint8(images + 0.49 / 127.5), levels.permute(0, 2, 3, 1))
    assert to_uint8(torch.tensor([-3.0, 3.0]).view(1, 1, 1, 2)).flatten().tolist() == [0, 255]


def test_one_scale_is_mars_form() -> None:
    latents, norm = torch.randn(2, 4, 3, 3), LatentNorm.from_scale(0.2325, 4)
    assert torch.allclose(norm.normalise(latents), latents * 0.2325)
    assert torch.allclose(norm.denormalise(norm.normalise(latents)), latents, atol=1e-6)


def test_bits_and_ids_are_each_others_inverse() -> None:
    assert code_bits(torch.tensor(5), 4).tolist() == [1, -1, 1, -1]  # the least significant first
    ids = torch.arange(2**5).view(4, 8)
    assert torch.equal(ids_from_bits(code_bits(ids, 5)), ids)
    assert ids_from_bits(torch.tensor([0.0, -0.0, 1e-30])) == 4  # zero counts as -1


def test_the_tokenizer_covers_its_grid_and_accepts_its_own_ids() -> None:
    tokenizer = Tokenizer(TINY_TOKENIZER).eval()
    ids = tokenizer.encode(torch.rand(2, 3, 16, 16))
    assert ids.shape == (2, TINY_TOKENIZER.grid**2) and ids.dtype == torch.int64
    assert ids.min() >= 0 and ids.max() < 2**TINY_TOKENIZER.bits
    assert tokenizer.decode(ids).shape == (2, 3, 16, 16)


def test_an_odd_side_is_halved_upwards() -> None:
    assert Tokenizer(TINY_TOKENIZER).encoder(torch.rand(1, 3, 15, 16)).shape[-2:] == (8, 8)


def test_the_signs_pass_the_gradient_straight_through() -> None:
    tokenizer = Tokenizer(TINY_TOKENIZER)
    z = torch.randn(2, 5, 4, 4, requires_grad=True)
    codes, _ = tokenizer.quantize(z)
    assert torch.allclose(codes, torch.where(z > 0, 1.0, -1.0))
    slope = torch.randn_like(codes)
    (codes * slope).sum().backward()
    assert torch.equal(z.grad, slope)


def test_the_entropies_span_from_certainty_to_uniformity() -> None:
    quantize = Tokenizer(TINY_TOKENIZER).quantize
    each_code_once = code_bits(torch.arange(32), 5).T.reshape(1, 5, 4, 8)
    _, losses = quantize(each_code_once)
    assert losses["per_sample_entropy"].abs() < 1e-5
    assert losses["avg_entropy"].item() == pytest.approx(math.log(32), rel=1e-5)
    assert losses["commitment_loss"] == 0
    _, losses = quantize(torch.zeros(1, 5, 4, 8))
    assert losses["per_sample_entropy"].item() == pytest.approx(math.log(32), rel=1e-5)


def test_the_logarithm_is_clamped_as_in_the_reference() -> None:
    _, losses = Tokenizer(replace(TINY_TOKENIZER, bits=17)).quantize(torch.zeros(1, 17, 1, 1))  # 2^-17 < 1e-5
    assert losses["per_sample_entropy"].item() == pytest.approx(-math.log(1e-5), rel=1e-5)


def test_training_lowers_the_tokenizers_loss() -> None:
    tokenizer, images = Tokenizer(TINY_TOKENIZER), torch.rand(4, 3, 16, 16)
    optimizer = torch.optim.Adam(tokenizer.parameters(), 1e-3)
    values = []
    for _ in range(12):
        reconstruction, losses = tokenizer(images)
        loss = (reconstruction - images).square().mean() + losses["quantizer_loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert all(parameter.grad is not None for parameter in tokenizer.parameters())
    assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize(("kind", "build", "cfg", "load"), CODECS)
@pytest.mark.parametrize("form", ["export", "public"])
def test_saved_networks_come_back_frozen_and_equal(tmp_path: Path, kind, build, cfg, load, form: str) -> None:
    network = build(cfg)
    if form == "export":
        write_export(tmp_path / "e", kind, to_dict(cfg), network.state_dict())
        loaded = load(type(cfg)(weights=str(tmp_path / "e"), image_size=16))  # the geometry is the export's own
    else:
        torch.save(network.state_dict(), tmp_path / "w.pt")
        loaded = load(replace(cfg, weights=str(tmp_path / "w.pt")))
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded.encode(images), network.eval().encode(images))
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize(("kind", "build", "cfg", "load"), CODECS)
def test_what_cannot_be_loaded_says_what_to_write(tmp_path: Path, kind, build, cfg, load) -> None:
    with pytest.raises(UserError, match=rf"{kind}\.weights="):
        load(cfg)
    torch.save(build(cfg).state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"w\.pt does not fit .* missing: .* misshapen: "):
        load(replace(cfg, weights=str(tmp_path / "w.pt"), multipliers=[1, 1, 1]))
    write_export(tmp_path / "e", "prior", to_dict(cfg), {"a": torch.zeros(1)})
    with pytest.raises(UserError, match=f"expected '{kind}'"):
        load(replace(cfg, weights=str(tmp_path / "e")))
    write_export(tmp_path / "f", kind, to_dict(cfg) | {"widht": 3}, {"a": torch.zeros(1)})
    with pytest.raises(UserError, match=r"f/config\.json: unknown key 'widht'"):
        load(replace(cfg, weights=str(tmp_path / "f")))


def test_bfloat16_autocast_stays_near_float32() -> None:
    vae, tokenizer = VAE(TINY_VAE), Tokenizer(TINY_TOKENIZER)
    images = torch.rand(2, 3, 16, 16)
    plain = vae.encode(images), vae.decode(images[:, :, :8, :8]), *tokenizer(images)
    with torch.autocast("cpu", torch.bfloat16):
        moments, decoded = vae.encode(images), vae.decode(images[:, :, :8, :8])
        (mean, std), divergence = posterior(moments), kl(moments)
        reconstruction, losses = tokenizer(images)
        ids = tokenizer.encode(images)
        entropy = tokenizer.quantize(moments[:, :5])[1]["per_sample_entropy"]
    assert entropy == tokenizer.quantize(moments[:, :5])[1]["per_sample_entropy"]  # never in bfloat16
    assert moments.dtype == decoded.dtype == reconstruction.dtype == torch.bfloat16  # or autocast was not on
    assert mean.dtype == std.dtype == divergence.dtype == losses["quantizer_loss"].dtype == torch.float32
    assert ids.dtype == torch.int64
    for ours, expected in ((moments, plain[0]), (decoded, plain[1])):
        assert (ours - expected).abs().max() < 0.05 * expected.abs().max()
    assert losses["commitment_loss"].item() == pytest.approx(plain[3]["commitment_loss"].item(), rel=0.05)
