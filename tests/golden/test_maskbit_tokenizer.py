"""MaskBit's tokenizer against the reference's arrays, stage by stage."""

import pytest
import torch
from einops import rearrange
from fixtures import assert_close, load
from torch import Tensor

from mixar.codecs import Tokenizer, build_tokenizer
from mixar.config import TokenizerConfig
from mixar.ops import code_bits
from mixar.weights import load_strict

STRICT = 5e-6
LOSSES = 2e-4


@pytest.fixture(scope="module")
def golden():
    return load("maskbit_tokenizer")


@pytest.fixture(scope="module")
def tokenizer(golden) -> Tokenizer:
    config = golden.config
    tokenizer = build_tokenizer(
        TokenizerConfig(
            width=config["hidden_channels"],
            multipliers=config["channel_mult"],
            blocks=config["num_res_blocks"],
            decoder_blocks=config.get("num_res_blocks_decoder"),
            bits=config["token_size"],
            commitment_weight=config["commitment_cost"],
            entropy_weight=config["entropy_loss_weight"],
            entropy_temperature=config["entropy_loss_temperature"],
            entropy_gamma=config["entropy_gamma"],
        )
    )
    load_strict(tokenizer, golden.under("sd."), "the fixture")
    return tokenizer.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def passed(golden, tokenizer) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """The outputs of all modules in a pass over the images, the reconstruction and the losses."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.setdefault(name, output))
        for name, module in tokenizer.named_modules()
    ]
    reconstruction, losses = tokenizer(golden.tensors["in.image"])
    for hook in hooks:
        hook.remove()
    return seen, reconstruction, losses


def test_every_stage_of_the_pass(golden, passed) -> None:
    seen, out = passed[0], golden.under("out.")
    stages = {"enc_mid": "encoder.mid", "z_pre": "encoder", "dec_mid": "decoder.mid"}
    stages |= {
        name: name.replace("enc_stage", "encoder.down").replace("dec_stage", "decoder.up")
        for name in out
        if "_stage." in name
    }
    assert len(stages) == 3 + 2 * len(golden.config["channel_mult"])
    for name, module in stages.items():
        assert_close(seen[module], out[name], STRICT, name)
    assert_close(seen["quantize"][0], out["z_q_st"], STRICT, "z_q_st")


def test_the_reconstruction(golden, passed) -> None:
    assert_close(passed[1], golden.tensors["out.recon_forward"], STRICT, "reconstruction")


def test_the_training_losses(golden, passed) -> None:
    losses, expected = passed[2], golden.under("out.q.")
    assert set(losses) == set(expected)
    for name, value in expected.items():
        assert_close(losses[name], value, LOSSES, name)


def test_ids_and_bits_are_exact(golden, tokenizer) -> None:
    ids = tokenizer.encode(golden.tensors["in.image"])
    assert torch.equal(ids, golden.tensors["out.indices_out"].flatten(1))
    expected = rearrange(golden.tensors["out.bits"], "b h w k -> b (h w) k")
    assert torch.equal(code_bits(ids, golden.config["token_size"]), expected)


@pytest.mark.parametrize(("ids", "image"), [("in.indices", "decode_extra"), ("out.indices_out", "recon_tokens")])
def test_ids_decode_to_the_image(golden, tokenizer, ids: str, image: str) -> None:
    ours = tokenizer.decode(golden.tensors[ids].flatten(1))
    assert_close(ours, golden.tensors[f"out.{image}"], STRICT, image)
