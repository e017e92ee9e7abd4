"""Dropout that is a function of the image."""

import torch

from mixar import rng
from mixar.config import ModelConfig
from mixar.mixing import Masking
from mixar.model import MixAR, init_weights
from mixar.model.attention import Wanted
from mixar.model.dropout import drop, token_keys
from mixar.rng import Stream

KEYS = rng.bits(0, Stream.DROPOUT, torch.arange(4000), 1)[:, 0]


def test_so_much_is_dropped_and_the_mean_stays() -> None:
    for p in (0.1, 0.5):
        dropped = drop(torch.ones(4000, 64), KEYS, 0, p)
        assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
        deviation = 5 * (p * (1 - p) / dropped.numel()) ** 0.5
        assert abs((dropped == 0).float().mean() - p) < deviation
        assert (dropped == 0).float().mean(0).sub(p).abs().max() < 5 * (p * (1 - p) / 4000) ** 0.5  # at every place


def test_keys_sites_and_layers_drop_independently() -> None:
    x = torch.ones(4000, 64)
    masks = [drop(x, keys, site, 0.5) == 0 for keys, site in ((KEYS, 0), (KEYS, 1), (KEYS.flip(0), 0))]
    masks += [drop(x, token_keys(KEYS, 1, layer)[:, 0], 0, 0.5) == 0 for layer in (0, 1)]
    for i, a in enumerate(masks):
        assert torch.equal(a, masks[i])
        for b in masks[:i]:
            assert abs((a == b).float().mean() - 0.5) < 5 * 0.5 / a.numel() ** 0.5


def test_an_image_does_not_see_its_batch() -> None:
    cfg = ModelConfig(
        grid=4, latent_channels=3, code_bits=4, code_dim=None, classes=3, class_tokens=2, head_depth=1, head_width=32,
        dropout=0.3,
        encoder_width=32, encoder_depth=2, encoder_heads=2, decoder_width=32, decoder_depth=2, decoder_heads=2,
    )  # fmt: skip
    model = MixAR(cfg).train()
    init_weights(model, 0)
    index = torch.arange(6)
    keys, tokens = KEYS[:6], rng.normal(0, Stream.NOISE, index, 16, 3)
    codes, classes = rng.bits(0, Stream.PRIOR_TOKEN, index, 16) & 15, model.class_embedding(index % 3)
    order = rng.permutation(0, Stream.MASK_ORDER, index, 16)

    def condition(rows: list[int], keys: torch.Tensor | None) -> torch.Tensor:
        masking = Masking.from_order(order[rows], [12 if row % 2 else 9 for row in rows])
        every = Wanted(torch.arange(len(rows) * 16), (16,) * len(rows))
        return model.condition(tokens[rows], classes[rows], masking, codes[rows], every, keys).view(len(rows), 16, -1)

    whole = condition([0, 1, 2, 3, 4, 5], keys)
    for rows in ([4, 1], [3], [5, 0, 2]):
        torch.testing.assert_close(condition(rows, keys[rows]), whole[rows], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(condition([0], keys[[1]]), whole[[0]])
    assert not torch.allclose(condition([0], None), whole[[0]])
