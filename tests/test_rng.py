"""The draws: keyed by image alone, and of the law they claim."""

import math

import pytest
import torch

from mixar import rng
from mixar.rng import Stream


@pytest.mark.parametrize("draw", [rng.bits, rng.uniform, rng.normal, rng.gumbel])
def test_an_image_draws_the_same_in_any_batch(draw) -> None:
    index = torch.tensor([7, 0, 2**40, 3])
    together = draw(5, Stream.NOISE, index, 3, 5)
    assert together.shape == (4, 3, 5)
    for row, place in zip(together, index):
        assert torch.equal(row, draw(5, Stream.NOISE, place[None], 3, 5)[0])


@pytest.mark.parametrize("draw", [rng.bits, rng.uniform, rng.gumbel])
def test_start_continues_a_stream(draw) -> None:
    index = torch.arange(4)
    whole = draw(0, Stream.RHO, index, 10)
    assert torch.equal(whole[:, 6:], draw(0, Stream.RHO, index, 4, start=6))


def test_seeds_streams_and_images_differ() -> None:
    index = torch.arange(100)
    base = rng.bits(0, Stream.NOISE, index, 100)
    assert base.unique().numel() == base.numel()
    for other in (rng.bits(1, Stream.NOISE, index, 100), rng.bits(0, Stream.RHO, index, 100)):
        assert not torch.isin(base, other).any()


def test_laws() -> None:
    n = 200_000
    index = torch.arange(n)
    tolerance = 5 / math.sqrt(n)
    u = rng.uniform(1, Stream.RHO, index, 2).double()
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < tolerance and abs(u.var() - 1 / 12) < tolerance
    assert abs(torch.corrcoef(u.T)[0, 1]) < tolerance
    assert abs(torch.corrcoef(torch.stack([u[:-1, 0], u[1:, 0]]))[0, 1]) < tolerance
    normal = rng.normal(1, Stream.NOISE, index, 3).double()
    assert abs(normal.mean()) < tolerance and abs(normal.var() - 1) < 2 * tolerance
    assert abs(normal.pow(4).mean() - 3) < 10 * tolerance
    assert torch.corrcoef(normal.T).triu(1).abs().max() < tolerance
    gumbel = rng.gumbel(1, Stream.PRIOR_GUMBEL, index, 1).double()
    assert abs(gumbel.mean() - 0.5772156649) < 2 * tolerance and abs(gumbel.var() - math.pi**2 / 6) < 6 * tolerance


def test_the_largest_uniform_number_has_a_finite_gumbel() -> None:
    index, largest = torch.arange(1), 1 - 2.0**-24  # one in 2^24
    for start in range(0, 1 << 28, 1 << 22):
        found = (rng.uniform(0, Stream.PRIOR_GUMBEL, index, 1 << 22, start=start)[0] == largest).nonzero()
        if len(found):
            break
    place = start + int(found[0])
    assert rng.uniform(0, Stream.PRIOR_GUMBEL, index, 1, start=place).item() == largest
    assert 16 < rng.gumbel(0, Stream.PRIOR_GUMBEL, index, 1, start=place).item() < 17.4


def test_permutations_are_uniform() -> None:
    orders = rng.permutation(0, Stream.MASK_ORDER, torch.arange(60_000), 4)
    assert torch.equal(orders.sort(-1).values, torch.arange(4).expand_as(orders))
    codes = (orders * torch.tensor([64, 16, 4, 1])).sum(-1)
    counts = codes.unique(return_counts=True)[1]
    assert len(counts) == 24 and (counts - 2500).abs().max() < 5 * math.sqrt(2500)


def test_categorical_is_the_inverse_cdf() -> None:
    probs = torch.tensor([0.2, 0.0, 0.5, 0.3])
    u = torch.tensor([0.0, 0.1999, 0.2, 0.6999, 0.7001, 0.999999])
    assert rng.categorical(probs.expand(6, 4), u).tolist() == [0, 0, 2, 2, 3, 3]
    short = torch.tensor([[0.5, 0.49]])  # rounding may leave the sum below u
    assert rng.categorical(short, torch.tensor([0.995])).tolist() == [1]
