"""The codecs on their own: sizes, formulas, loading, precision."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mixar.codecs import (
    TOKENIZERS,
    VAE,
    LatentNorm,
    build_tokenizer,
    from_bytes,
    ids_from_bits,
    kl,
    load_tokenizer,
    load_vae,
    posterior,
    to_bytes,
)
from mixar.config import TokenizerConfig, VAEConfig, to_dict
from mixar.config.knobs import TOKENIZERS as NAMES
from mixar.errors import UserError
from mixar.ops import code_bits
from mixar.weights import write_export

TINY_VAE = VAEConfig(width=32, multipliers=[1, 2], blocks=1, latent_channels=3)
TINY_TOKENIZER = TokenizerConfig(width=32, multipliers=[1, 2], blocks=1, decoder_blocks=2, bits=5)
TINY_VQ = replace(TINY_TOKENIZER, kind="vq", code_dim=6)
CODECS = [("vae", VAE, TINY_VAE, load_vae), ("tokenizer", build_tokenizer, TINY_TOKENIZER, load_tokenizer),
          ("tokenizer", build_tokenizer, TINY_VQ, load_tokenizer)]  # fmt: skip
EACH_TOKENIZER = pytest.mark.parametrize("cfg", [TINY_TOKENIZER, TINY_VQ], ids=["maskbit", "vq"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_norm_groups_divide_the_channels_and_keep_colour_apart_from_contrast() -> None:
    """32 groups in 16 channels are of one channel each: what such a norm returns has no mean, which is the colour."""
    narrow = replace(TINY_VAE, width=16)
    flat = torch.full((1, 16, 4, 4), 0.5) * torch.arange(16).view(1, 16, 1, 1)
    for groups, kept in ((32, False), (4, True)):
        last = VAE(replace(narrow, norm_groups=groups)).decoder.norm_out
        assert last.num_groups == min(groups, 16)
        assert bool(last(flat).abs().max() > 0.1) == kept
        tokenizer = build_tokenizer(replace(TINY_TOKENIZER, width=16, norm_groups=groups))
        counts = {module.num_groups for module in tokenizer.modules() if isinstance(module, nn.GroupNorm)}
        assert counts == ({16, 32} if groups == 32 else {4})


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_totals_of_the_published_networks() -> None:
    with torch.device("meta"):
        assert parameters(VAE(VAEConfig())) == 69_836_067
        tokenizer = build_tokenizer(TokenizerConfig())
    assert parameters(tokenizer) == 54_489_489
    assert parameters(tokenizer.encoder) == 25_126_286


@pytest.mark.parametrize("side", [16, 32])
@pytest.mark.parametrize("cfg", [TINY_VAE, TINY_TOKENIZER, TINY_VQ], ids=["vae", "maskbit", "vq"])
def test_images_go_in_and_come_out_in_one_form(cfg, side: int) -> None:
    """The contract of the codecs: float [B, 3, H, W] in [0, 1] both ways, at any size that the stride divides."""
    network = VAE(cfg) if isinstance(cfg, VAEConfig) else build_tokenizer(cfg)
    network.eval().requires_grad_(False)
    shown = from_bytes(torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8))
    encoded = network.encode(shown)
    if isinstance(network, VAE):
        assert encoded.shape == (2, 6, side // 2, side // 2)
        encoded = posterior(encoded)[0]
    else:
        assert encoded.shape == (2, (side // 2) ** 2) and encoded.dtype == torch.int64
        assert encoded.min() >= 0 and encoded.max() < 2**cfg.bits
    images = network.decode(encoded)
    assert images.shape == shown.shape and images.dtype == torch.float32


@torch.no_grad()
def test_the_vaes_own_range_stays_inside() -> None:
    vae, seen = VAE(TINY_VAE), []
    vae.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    grey = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    vae.encode(grey)
    assert torch.equal(seen[0], grey * 2 - 1)
    vae.decoder.conv_out.weight.zero_()
    vae.decoder.conv_out.bias.copy_(torch.tensor([-1.0, 0.0, 1.0]))
    assert torch.equal(vae.decode(torch.zeros(1, 3, 8, 8)), grey)


def test_each_tokenizer_has_its_name_in_the_config() -> None:
    assert tuple(TOKENIZERS) == NAMES


def test_attention_lies_where_the_config_says() -> None:
    keys = VAE(TINY_VAE).state_dict()
    assert "encoder.down.1.attn.0.q.weight" in keys and "encoder.down.0.attn.0.q.weight" not in keys
    assert "decoder.up.1.attn.1.q.weight" in keys
    assert keys.keys() == VAE(replace(TINY_VAE, attention_levels=[1])).state_dict().keys()
    assert "encoder.down.0.attn.0.q.weight" in VAE(replace(TINY_VAE, attention_levels=[0])).state_dict()
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
    images = from_bytes(levels)
    assert images.dtype == torch.float32 and images.min() == 0 and images.max() == 1
    for shift in (-0.49, 0, 0.49):
        assert torch.equal(to_bytes(images + shift / 255), levels)
    assert to_bytes(torch.tensor([-3.0, 3.0]).view(1, 1, 1, 2)).flatten().tolist() == [0, 255]
    assert torch.equal(to_bytes(images.bfloat16()), to_bytes(images.bfloat16().float()))  # bfloat16 has no 256 levels


def test_one_scale_is_mars_form() -> None:
    latents, norm = torch.randn(2, 4, 3, 3), LatentNorm.from_scale(0.2325, 4)
    assert torch.allclose(norm.normalise(latents), latents * 0.2325)
    assert torch.allclose(norm.denormalise(norm.normalise(latents)), latents, atol=1e-6)


def test_bits_and_ids_are_each_others_inverse() -> None:
    assert code_bits(torch.tensor(5), 4).tolist() == [1, -1, 1, -1]  # the least significant first
    ids = torch.arange(2**5).view(4, 8)
    assert torch.equal(ids_from_bits(code_bits(ids, 5)), ids)
    assert ids_from_bits(torch.tensor([0.0, -0.0, 1e-30])) == 4  # zero counts as -1


def test_an_odd_side_is_halved_upwards() -> None:
    assert build_tokenizer(TINY_TOKENIZER).encoder(torch.rand(1, 3, 15, 16)).shape[-2:] == (8, 8)


def test_the_signs_pass_the_gradient_straight_through() -> None:
    tokenizer = build_tokenizer(TINY_TOKENIZER)
    z = torch.randn(2, 5, 4, 4, requires_grad=True)
    codes, _ = tokenizer.quantize(z)
    assert torch.allclose(codes, torch.where(z > 0, 1.0, -1.0))
    slope = torch.randn_like(codes)
    (codes * slope).sum().backward()
    assert torch.equal(z.grad, slope)


def test_a_learned_code_is_the_nearest_and_all_have_one_norm() -> None:
    quantize = build_tokenizer(TINY_VQ).quantize
    codes = quantize.codes()
    assert torch.allclose(codes.square().mean(1), torch.ones(32))  # as MaskBit's ±1
    z = quantize.scaled(torch.randn(2, 6, 4, 4))
    points = z.permute(0, 2, 3, 1).reshape(-1, 6)
    assert torch.equal(quantize.ids(z).flatten(), torch.cdist(points, codes).argmin(1))
    assert torch.equal(quantize.ids(codes.T[None, :, :, None]).flatten(), torch.arange(32))


def test_the_gradients_of_a_learned_code_by_hand() -> None:
    """Of one position and two codes: straight through, commitment to the code, the code to the position."""
    quantize = build_tokenizer(replace(TINY_VQ, bits=1, code_dim=2, entropy_weight=0.0, commitment_weight=0.5)).quantize
    quantize.codebook.data = torch.tensor([[3.0, 0.0], [0.0, 5.0]])
    z = torch.tensor([0.8, 0.6]).view(1, 2, 1, 1).requires_grad_()
    slope = torch.tensor([0.3, -0.2])
    found, losses = quantize(z)
    root = 2**0.5  # the radius: z becomes root (0.8, 0.6), and its code is the first, root (1, 0)
    assert torch.allclose(found.flatten(), torch.tensor([root, 0.0]))
    distance = torch.tensor([0.8 - 1, 0.6]) * root
    assert losses["codebook_loss"].item() == pytest.approx(distance.square().mean().item())
    assert losses["commitment_loss"].item() == pytest.approx(0.5 * distance.square().mean().item())
    assert losses["quantizer_loss"].item() == pytest.approx(1.5 * distance.square().mean().item())
    (losses["quantizer_loss"] + (found.flatten() * slope).sum()).backward()
    across = lambda unit: torch.eye(2) - torch.outer(unit, unit)  # what a normalisation lets through
    at_z = slope + 0.5 * distance  # of 0.5 mean(distance²), over two channels
    assert torch.allclose(z.grad.flatten(), root * across(torch.tensor([0.8, 0.6])) @ at_z, atol=1e-6)
    at_code = across(torch.tensor([1.0, 0.0])) @ -distance * root / 3
    assert torch.allclose(quantize.codebook.grad, torch.stack([at_code, torch.zeros(2)]), atol=1e-6)


def test_the_entropies_span_from_certainty_to_uniformity() -> None:
    quantize = build_tokenizer(TINY_TOKENIZER).quantize
    each_code_once = code_bits(torch.arange(32), 5).T.reshape(1, 5, 4, 8)
    _, losses = quantize(each_code_once)
    assert losses["per_sample_entropy"].abs() < 1e-5
    assert losses["avg_entropy"].item() == pytest.approx(math.log(32), rel=1e-5)
    assert losses["commitment_loss"] == 0
    _, losses = quantize(torch.zeros(1, 5, 4, 8))
    assert losses["per_sample_entropy"].item() == pytest.approx(math.log(32), rel=1e-5)


def test_the_logarithm_is_clamped_as_in_the_reference() -> None:
    _, losses = build_tokenizer(replace(TINY_TOKENIZER, bits=17)).quantize(torch.zeros(1, 17, 1, 1))  # 2^-17 < 1e-5
    assert losses["per_sample_entropy"].item() == pytest.approx(-math.log(1e-5), rel=1e-5)


@EACH_TOKENIZER
def test_training_lowers_the_tokenizers_loss(cfg) -> None:
    tokenizer, images = build_tokenizer(cfg), torch.rand(4, 3, 16, 16)
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
        loaded = load(type(cfg)(weights=str(tmp_path / "e")))  # the geometry is the export's own
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
    vae, tokenizer = VAE(TINY_VAE), build_tokenizer(TINY_TOKENIZER)
    images = torch.rand(2, 3, 16, 16)
    plain = vae.encode(images), vae.decode(images[:, :, :8, :8]), *tokenizer(images)
    with torch.autocast("cpu", torch.bfloat16):
        moments, decoded = vae.encode(images), vae.decode(images[:, :, :8, :8])
        (mean, std), divergence = posterior(moments), kl(moments)
        reconstruction, losses = tokenizer(images)
        ids = tokenizer.encode(images)
        entropy = tokenizer.quantize(moments[:, :5])[1]["per_sample_entropy"]
    assert entropy == tokenizer.quantize(moments[:, :5])[1]["per_sample_entropy"]  # never in bfloat16
    assert moments.dtype == torch.bfloat16  # or autocast was not on
    assert decoded.dtype == reconstruction.dtype == torch.float32
    assert mean.dtype == std.dtype == divergence.dtype == losses["quantizer_loss"].dtype == torch.float32
    assert ids.dtype == torch.int64
    for ours, expected in ((moments, plain[0]), (decoded, plain[1])):
        assert (ours - expected).abs().max() < 0.05 * expected.abs().max()
    assert losses["commitment_loss"].item() == pytest.approx(plain[3]["commitment_loss"].item(), rel=0.05)
