"""The prior's forward, loss, gradients and training mask against MaskBit's."""

import fixtures
import pytest
import torch
from prior_fixture import prior_from

from mixar.prior import combine_ids, masked_loss, split_ids, training_mask

FIXTURE = fixtures.load("lfqbert_forward")
INPUT, OUTPUT = FIXTURE.under("in."), FIXTURE.under("out.")
SMOOTHING = 0.1


@pytest.fixture(scope="module")
def prior():
    return prior_from(FIXTURE, FIXTURE.config)


def test_input_bits(prior):
    assert torch.equal(prior.input_bits(INPUT["tokens"]), OUTPUT["input_bits"])


def test_logits(prior):
    drops = {"keep": None, "drop": torch.ones_like(INPUT["drop"]), "mixed": INPUT["drop"]}
    for name, drop in drops.items():
        logits = prior(INPUT["tokens"], INPUT["labels"], drop)
        fixtures.assert_close(logits, OUTPUT[f"logits_{name}"], 2e-5, name)


def test_loss_and_gradients(prior):
    logits = prior(INPUT["tokens"], INPUT["labels"])
    loss, masked_only = masked_loss(logits, INPUT["targets"], INPUT["masks"], SMOOTHING)
    fixtures.assert_close(loss, OUTPUT["mlm_loss"], 1e-5, "loss")
    fixtures.assert_close(masked_only, OUTPUT["masked_token_loss"], 1e-5, "loss where masked")
    assert not masked_only.requires_grad
    prior.zero_grad()
    loss.backward()
    gradients = FIXTURE.under("out.grad.")
    assert gradients
    for name, reference in gradients.items():
        fixtures.assert_close(prior.get_parameter(name).grad, reference, 1e-3, name)


def test_training_mask(prior):
    tokens, masked = training_mask(INPUT["targets"], INPUT["u_ratio"], INPUT["u_mask"], prior.mask_id)
    assert torch.equal(masked, OUTPUT["train_masks"])
    assert torch.equal(tokens, OUTPUT["train_masked_tokens"])


def test_ids(prior):
    bits, splits = prior.config.bits, prior.config.splits
    assert torch.equal(combine_ids(INPUT["targets"], bits), OUTPUT["ids"])
    assert torch.equal(split_ids(OUTPUT["ids"], bits, splits), INPUT["targets"])
