"""Batches that are filled up to fixed numbers of tokens, so that compiled shapes do not change."""

import pytest
import torch

from mixar import rng
from mixar.config import GUIDANCES, MaskConfig, ModelConfig
from mixar.mixing import Masking, Room, masked_counts, rooms
from mixar.model import MixAR, init_weights
from mixar.rng import Stream

COUNTS = (12, 9, 16, 14, 10)


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("room", [Room(25, 70), Room(19, 61), Room(80, 80)])
def test_the_tokens_that_fill_a_batch_change_nothing(guidance: str, room: Room) -> None:
    cfg = ModelConfig(
        guidance=guidance, grid=4, latent_channels=3, code_bits=4, code_dim=None, classes=3, class_tokens=2,
        head_depth=1, head_width=32, dropout=0.0, encoder_width=32, encoder_depth=2, encoder_heads=2, decoder_width=32,
        decoder_depth=2, decoder_heads=2,
    )  # fmt: skip
    model, index = MixAR(cfg).train(), torch.arange(len(COUNTS))
    init_weights(model, 0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, parameter.mean().item(), 0.1)
    leaves = [p for name, p in model.named_parameters() if name != "fake_latent"]  # no class is dropped
    tokens, order = rng.normal(0, Stream.NOISE, index, 16, 3), rng.permutation(0, Stream.MASK_ORDER, index, 16)
    codes = None if guidance == "none" else rng.bits(0, Stream.PRIOR_TOKEN, index, 16) & 15
    rows = sum(COUNTS)
    t, noise = torch.randint(0, 1000, (2, rows)), torch.randn(2, rows, 3)

    def outcome(*known: Room) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        masking = Masking.from_order(order, COUNTS, known)
        assert masking.room == (known[0] if known else None)
        losses = model(tokens, index % 3, masking, codes, t, noise)
        return losses.loss, losses.rows, torch.autograd.grad(losses.loss, leaves)

    (loss, each, grads), (filled, filled_each, filled_grads) = outcome(), outcome(room)
    torch.testing.assert_close(filled, loss)
    torch.testing.assert_close(filled_each, each)
    for found, expected in zip(filled_grads, grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scope", ["image", "batch"])
def test_the_usual_room_is_enough_for_almost_all_batches(scope: str) -> None:
    cfg = MaskConfig(ratio_scope=scope, group=1)
    usual, most = rooms(cfg, 256, 64)
    assert usual.visible <= most.visible
    assert usual.masked <= most.masked == 64 * 256
    one = MaskConfig(ratio_scope="batch")  # a ratio per batch; with batches of one image, per image, as pre-drawn masks
    for batch in range(200):
        masked = sum(masked_counts(one, 256, 0, range(64 * batch, 64 * batch + 64), 64 if scope == "batch" else 1))
        assert 64 * 256 - masked <= usual.visible
        assert masked <= usual.masked
    if scope == "image":
        assert usual.masked < 0.95 * most.masked, "filling costs little where each image has its own ratio"


def test_the_first_room_that_is_enough_is_taken() -> None:
    order = torch.arange(8).repeat(2, 1)
    known = Room(7, 10), Room(16, 16)
    assert Masking.from_order(order, (5, 5), known).room == known[0]
    assert Masking.from_order(order, (5, 6), known).room == known[1]
    assert Masking.from_order(order, (4, 4), known).room == known[1]
