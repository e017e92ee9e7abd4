"""The VAE against the reference's arrays."""

import math

import pytest
import torch
from einops import rearrange
from fixtures import assert_close, load
from torch import Tensor

from mixar.codecs import VAE, LatentNorm, kl, posterior, to_bytes
from mixar.config import VAEConfig
from mixar.weights import load_strict

STRICT = 5e-6


@pytest.fixture(scope="module")
def golden():
    return load("vavae")


@pytest.fixture(scope="module")
def vae(golden) -> VAE:
    config = golden.config
    vae = VAE(
        VAEConfig(
            width=config["ch"],
            multipliers=config["ch_mult"],
            blocks=config["num_res_blocks"],
            attention_levels=[int(math.log2(config["resolution"] // side)) for side in config["attn_resolutions"]],
            latent_channels=config["embed_dim"],
        )
    )
    load_strict(vae, golden.under("sd."), "the fixture")
    return vae.eval().requires_grad_(False)


def test_the_encoder_gives_the_moments(golden, vae) -> None:
    hidden: list[Tensor] = []
    hook = vae.encoder.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    moments = vae.encode(golden.tensors["in.image"] / 2 + 0.5)  # the reference's images lie in [-1, 1]
    hook.remove()
    assert_close(hidden[0], golden.tensors["out.enc_h"], STRICT, "encoder")
    assert_close(moments, golden.tensors["out.moments"], STRICT, "moments")


def test_the_posterior_and_its_divergence(golden) -> None:
    moments, out = golden.tensors["out.moments"], golden.under("out.")
    mean, std = posterior(moments)
    assert_close(mean, out["mean"], STRICT, "mean")
    assert_close(std, out["std"], STRICT, "std")
    assert_close(2 * std.log(), out["logvar"], STRICT, "log-variance")
    assert_close(mean + std * golden.tensors["in.eps"], out["sample"], STRICT, "sample")
    assert_close(kl(moments), out["kl"], STRICT, "divergence")


def test_moments_beyond_the_range_are_clamped(golden) -> None:
    _, std = posterior(golden.tensors["in.moments_wide"])
    assert_close(std, golden.tensors["out.wide_std"], STRICT, "std")
    assert_close(2 * std.log(), golden.tensors["out.wide_logvar"], STRICT, "log-variance")


@pytest.mark.parametrize(("latent", "image"), [("in.latent", "out.decoded"), ("out.sample", "out.decoded_sample")])
def test_the_decoder_gives_the_image(golden, vae, latent: str, image: str) -> None:
    assert_close(vae.decode(golden.tensors[latent]) * 2 - 1, golden.tensors[image], STRICT, image)


def test_the_decoded_image_in_bytes(golden, vae) -> None:
    expected = rearrange(golden.tensors["out.uint8"], "b h w c -> b c h w")
    assert torch.equal(to_bytes(golden.tensors["out.decoded"] / 2 + 0.5), expected)
    ours = to_bytes(vae.decode(golden.tensors["in.latent"]))
    assert (ours.int() - expected.int()).abs().max() <= 1


def test_latents_are_normalised_and_brought_back(golden) -> None:
    scale = LatentNorm(golden.tensors["in.lat_mean"].flatten(), golden.tensors["in.lat_std"].flatten())
    normalised = scale.normalise(golden.tensors["out.sample"])
    assert_close(normalised, golden.tensors["out.normalised"], STRICT, "normalised")
    assert_close(scale.denormalise(normalised), golden.tensors["out.denormalised"], STRICT, "denormalised")
