"""The prior beyond the golden fixtures: geometry, public weights, initialisation, sampling and TI-Mix's fill."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from mixar.config import PriorConfig, SampleConfig, to_dict
from mixar.errors import UserError
from mixar.prior import Prior, combine_ids, fill, keyed_draws, load_prior, masked_loss, sample_codes, split_ids
from mixar.prior.sampling import decoding_steps, guidance_weights, mask_counts
from mixar.weights import write_export

MANIFEST = json.loads((Path(__file__).parents[1] / "manifests/maskbit_generator_14bit.json").read_text())
FULL = PriorConfig(bits=14, grid=16, classes=1000)
TINY = PriorConfig(width=32, depth=2, heads=4, mlp_width=48, bits=6, splits=2, grid=4, classes=5)


def make_prior(**changes) -> Prior:
    """A tiny prior whose predictions are far from uniform."""
    torch.manual_seed(0)
    prior = Prior(dataclasses.replace(TINY, **changes))
    nn.init.normal_(prior.prediction_layer.weight, std=0.3)
    return prior.eval()


def save_zeros(path: Path, shapes: dict) -> Path:
    """A checkpoint of these shapes, one stored value a tensor."""
    zeros = {key: torch.zeros(1, dtype=getattr(torch, dtype)).expand(shape) for key, (shape, dtype) in shapes.items()}
    torch.save(zeros, path)
    return path


def test_geometry_is_the_published_one():
    with torch.device("meta"):
        prior = Prior(FULL)
    assert sum(p.numel() for p in prior.parameters()) == 304_929_024
    state = prior.state_dict().items()
    ours = {key: [list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in state}
    assert ours == MANIFEST


def test_published_checkpoint_loads_at_full_size(tmp_path):
    file = save_zeros(tmp_path / "maskbit_generator_14bit.bin", MANIFEST)
    prior = load_prior(dataclasses.replace(FULL, weights=str(file)))
    assert not prior.training and not any(p.requires_grad for p in prior.parameters())
    assert all(not value.any() for value in prior.state_dict().values())


@pytest.mark.parametrize("changes", [{"width": 64}, {"grid": 3}, {"depth": 3}])
def test_other_geometry_is_refused(tmp_path, changes):
    file = tmp_path / "generator.bin"
    torch.save(make_prior().state_dict(), file)
    with pytest.raises(UserError):
        load_prior(dataclasses.replace(TINY, weights=str(file), **changes))


def test_old_name_of_the_input_projection(tmp_path):
    prior = make_prior()
    old = {key.replace("input_proj", "token_emb"): value for key, value in prior.state_dict().items()}
    torch.save(old, tmp_path / "old.bin")
    loaded = load_prior(dataclasses.replace(TINY, weights=str(tmp_path / "old.bin")))
    assert torch.equal(loaded.input_proj.weight, prior.input_proj.weight)


def test_export_brings_its_geometry(tmp_path):
    prior = make_prior(prenorm=True, splits=3)
    write_export(tmp_path / "prior", "prior", to_dict(prior.config), prior.state_dict())
    loaded = load_prior(dataclasses.replace(FULL, weights=str(tmp_path / "prior")))
    assert loaded.config.splits == 3
    tokens, labels = torch.randint(5, (2, 16, 3)), torch.tensor([1, 2])
    assert torch.equal(loaded(tokens, labels), prior(tokens, labels))


def test_no_weights_names_the_key():
    with pytest.raises(UserError, match=r"prior\.weights="):
        load_prior(TINY)


@pytest.mark.parametrize("prenorm", [False, True])
def test_block_is_torchs_encoder_layer(prenorm):
    torch.manual_seed(0)
    prior = Prior(dataclasses.replace(TINY, prenorm=prenorm))
    attention, mlp = prior.transformer.layers[0]
    options = {"activation": "gelu", "layer_norm_eps": 1e-12, "batch_first": True, "norm_first": prenorm}
    reference = nn.TransformerEncoderLayer(TINY.width, TINY.heads, TINY.mlp_width, **options).eval()
    for theirs, ours in (
        (reference.self_attn, attention.mha),
        (reference.norm1, attention.norm),
        (reference.linear1, mlp.net[0]),
        (reference.linear2, mlp.net[2]),
        (reference.norm2, mlp.norm),
    ):
        theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 7, TINY.width)
    torch.testing.assert_close(prior.eval().transformer.layers[0](x), reference(x), rtol=1e-5, atol=1e-5)
    assert ("norm_after_transformer.weight" in prior.state_dict()) == prenorm


def test_initialisation():
    torch.manual_seed(0)
    prior = Prior(dataclasses.replace(TINY, width=128))
    mha = prior.transformer.layers[0][0].mha
    for weight in (mha.out_proj.weight, prior.pos_emb, prior.class_emb.weight, prior.last_layer[0].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    bound = math.sqrt(6 / (4 * 128))
    assert 0.98 * bound < mha.in_proj_weight.abs().max() <= bound
    assert not any(parameter.any() for name, parameter in prior.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_splits(splits):
    prior = make_prior(splits=splits)
    ids = torch.arange(64).view(4, 16)
    sub = split_ids(ids, 6, splits)
    assert sub.shape == (4, 16, splits) and torch.equal(combine_ids(sub, 6), ids)
    assert torch.equal(sub[..., 0], ids % 2 ** (6 // splits)), "split 0 holds the low bits"
    # the network reads the bits of the id itself, low bits first, at any number of splits
    assert torch.equal(prior.input_bits(sub), ((ids[..., None] >> torch.arange(6)) & 1) * 2.0 - 1)
    labels = torch.tensor([0, 1, 2, 3])
    assert prior(sub, labels).shape == (4, 16, splits, 2 ** (6 // splits))
    codes = sample_codes(prior, labels, SampleConfig(prior_steps=4), *keyed_draws(labels, 16, splits))
    assert codes.shape == (4, 16) and codes.min() >= 0 and codes.max() < 64


def test_labels_are_untouched_and_dropping_is_the_null_class():
    prior, labels = make_prior(), torch.tensor([1, 2, 3])
    tokens, drop = torch.randint(9, (3, 16, 2)), torch.tensor([True, False, True])
    dropped = prior(tokens, labels, drop)
    assert labels.tolist() == [1, 2, 3]
    assert torch.equal(dropped, prior(tokens, torch.tensor([5, 2, 5])))


def test_dropout_only_in_training():
    prior, tokens, labels = make_prior(), torch.randint(9, (2, 16, 2)), torch.tensor([0, 1])
    assert torch.equal(prior(tokens, labels), prior(tokens, labels))
    prior.train()
    assert not torch.equal(prior(tokens, labels), prior(tokens, labels))


def test_loss_without_a_masked_token_is_finite():
    logits, targets = torch.randn(2, 4, 2, 8), torch.randint(8, (2, 4, 2))
    loss, masked_only = masked_loss(logits, targets, torch.zeros(2, 4, 2, dtype=torch.bool), 0.1)
    assert torch.isfinite(loss) and masked_only == 0


def test_image_depends_on_its_own_seed_only():
    prior, settings = make_prior(), SampleConfig(prior_steps=8)
    seeds, labels = torch.tensor([11, 7, 3, 900, 42]), torch.tensor([0, 1, 2, 3, 4])
    batch = sample_codes(prior, labels, settings, *keyed_draws(seeds, 16, 2))
    for i in range(5):
        alone = sample_codes(prior, labels[i : i + 1], settings, *keyed_draws(seeds[i : i + 1], 16, 2))
        assert torch.equal(alone[0], batch[i])
    other = sample_codes(prior, labels, settings, *keyed_draws(seeds + 1, 16, 2))
    assert (other != batch).any(1).all()


def test_draws_differ_from_step_to_step():
    u, gumbel = keyed_draws(torch.tensor([1, 2]), 16, 2)
    for draw in (u, gumbel):
        values = torch.stack([draw(step) for step in range(4)])
        assert values.unique().numel() > 0.99 * values.numel()


@pytest.mark.parametrize("schedule", ["arccos", "cosine"])
def test_masked_as_counted_at_every_step(schedule):
    settings = SampleConfig(prior_steps=6, prior_mask_schedule=schedule)
    seeds = torch.tensor([1, 2])
    steps = list(decoding_steps(make_prior(), seeds, settings, *keyed_draws(seeds, 16, 2)))
    before = [(step.masked_before == 8).flatten(1).sum(1).tolist() for step in steps]
    assert before == [[count] * 2 for count in [32, *mask_counts(32, 6, schedule)[:-1]]]
    for step, following in itertools.pairwise(steps):
        fixed = following.masked_before != 8
        assert torch.equal(following.masked_before[fixed], step.pred[fixed])
        assert (step.pred < 8).all()


@pytest.mark.parametrize("schedule", ["arccos", "cosine"])
def test_more_steps_than_sub_tokens(schedule):
    """MaskBit's clamp then masks everything once more; the result is complete all the same."""
    prior, seeds = make_prior(), torch.tensor([1, 2])
    assert 32 not in mask_counts(32, 32, schedule)[:-1]
    assert 32 in mask_counts(32, 40, schedule)[:-1]
    settings = SampleConfig(prior_steps=40, prior_mask_schedule=schedule)
    steps = list(decoding_steps(prior, seeds, settings, *keyed_draws(seeds, 16, 2)))
    assert len(steps) == 40 and all((step.pred < 8).all() for step in steps)
    before = [int((step.masked_before[0] == 8).sum()) for step in steps]
    assert before == [32, *mask_counts(32, 40, schedule)[:-1]]


def test_guidance():
    assert guidance_weights(2.0, 4, "none", 3.0) == [2.0] * 4
    assert guidance_weights(2.0, 4, "linear", 3.0) == [0.0, 0.5, 1.0, 1.5]
    prior, seeds, labels = make_prior(), torch.arange(3), torch.tensor([0, 1, 2])
    passes = []
    prior.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    for scale, expected in ((0.0, [3, 3]), (4.0, [6, 6])):
        settings = SampleConfig(prior_steps=2, prior_cfg_scale=scale, prior_cfg_schedule="none")
        passes.clear()
        sample_codes(prior, labels, settings, *keyed_draws(seeds, 16, 2))
        assert passes == expected


def test_fill_keeps_what_is_visible_and_does_not_read_the_rest():
    prior, labels = make_prior(), torch.tensor([0, 1, 2])
    torch.manual_seed(1)
    codes, masked, u = torch.randint(64, (3, 16)), torch.rand(3, 16) < 0.7, torch.rand(3, 16, 2)
    filled = fill(prior, codes, masked, labels, u)
    assert torch.equal(filled[~masked], codes[~masked]) and (filled[masked] != codes[masked]).any()
    assert not filled.requires_grad
    hidden = torch.where(masked, 0, codes)
    assert torch.equal(fill(prior, hidden, masked, labels, u)[masked], filled[masked])
    likeliest = prior(split_ids(codes, 6, 2).masked_fill(masked[..., None], 8), labels).argmax(-1)
    assert torch.equal(fill(prior, codes, masked, labels, None)[masked], combine_ids(likeliest, 6)[masked])


def test_fill_draws_from_the_softmax():
    prior, count = make_prior(grid=2), 20_000
    torch.manual_seed(1)
    codes, masked = torch.tensor([[5, 60, 17, 33]]), torch.tensor([[True, False, True, False]])
    labels, u = torch.tensor([3]), torch.rand(count, 4, 2)
    tokens = split_ids(codes, 6, 2).masked_fill(masked[..., None], 8)
    probs = prior(tokens, labels).softmax(-1)[0, 0]  # [m, K] of position 0
    assert (probs - 1 / 8).abs().max() > 0.1, "too close to uniform to tell"
    drawn = fill(prior, codes.expand(count, -1), masked.expand(count, -1), labels.expand(count), u)
    for split, sub in enumerate(split_ids(drawn, 6, 2)[:, 0].unbind(-1)):
        share = sub.bincount(minlength=8) / count
        sigma = (probs[split] * (1 - probs[split]) / count).sqrt()
        assert ((share - probs[split]).abs() < 5 * sigma + 1e-6).all()


def test_bf16_autocast():
    prior, tokens, labels = make_prior(), torch.randint(9, (2, 16, 2)), torch.tensor([0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        logits = prior(tokens, labels)
        assert logits.dtype == torch.bfloat16
        loss, _ = masked_loss(logits, tokens.clamp_max(7), tokens == 8, 0.1)
        codes = sample_codes(prior, labels, SampleConfig(prior_steps=3), *keyed_draws(labels, 16, 2))
    torch.testing.assert_close(logits.float(), prior(tokens, labels), rtol=0.05, atol=0.1)
    loss.backward()
    assert loss.dtype == torch.float32 and all(torch.isfinite(p.grad).all() for p in prior.parameters())
    assert codes.max() < 64
