"""The decoding loop against MaskBit's, step by step, on the same draws."""

import fixtures
import pytest
import torch
from prior_fixture import prior_from

from mixar.config import SampleConfig
from mixar.prior import sample_codes
from mixar.prior.sampling import decoding_steps

FIXTURE = fixtures.load("lfqbert_sample")


@pytest.fixture(scope="module")
def prior():
    return prior_from(FIXTURE, FIXTURE.config["model"])


@pytest.mark.parametrize("run", FIXTURE.config["runs"])
def test_every_step(prior, run):
    options = FIXTURE.config["runs"][run]
    settings = SampleConfig(
        prior_steps=options["num_steps"],
        prior_cfg_scale=options["guidance_scale"],
        prior_cfg_schedule=options["guidance_annealing"],
        prior_cfg_power=options["scale_pow"],
        prior_temperature=options["softmax_temperature"],
        prior_randomize=options["randomize_temperature"],
        prior_mask_schedule=options["mask_schedule_strategy"],
        prior_annealing=options["use_sampling_annealing"],
    )
    given, expected = FIXTURE.under(f"{run}.in."), FIXTURE.under(f"{run}.out.")
    arguments = (prior, given["labels"], settings, given["u"].__getitem__, given["gumbel"].__getitem__)
    steps = list(decoding_steps(*arguments))
    assert len(steps) == len(given["u"])
    for i, step in enumerate(steps):
        for name in ("masked_before", "draws", "pred"):
            assert torch.equal(getattr(step, name), expected[name][i]), f"{name} of step {i}"
        torch.testing.assert_close(step.probs, expected["probs"][i], rtol=0, atol=1e-4)
        torch.testing.assert_close(step.confidence.flatten(1), expected["confidence"][i], rtol=1e-4, atol=1e-4)
    assert torch.equal(sample_codes(*arguments), expected["ids"])
