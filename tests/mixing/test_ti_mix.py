"""TI-Mix (Eq. 12) and its λ."""

from itertools import pairwise

import pytest
import torch

from mixar.config import TIMixConfig
from mixar.mixing import ground_truth_share, ti_mix


def test_equation_12() -> None:
    codes, drawn = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[5, 6, 7, 8]])
    masked = torch.tensor([[True, True, False, True]])
    rho = torch.tensor([[0.2, 0.6, 0.9, 0.5]])
    assert ti_mix(codes, drawn, masked, rho, 0.5).tolist() == [[1, 6, 3, 8]]
    assert ti_mix(codes, drawn, masked, rho, 1.0).tolist() == codes.tolist()
    assert ti_mix(codes, drawn, masked, rho, 0.0).tolist() == [[5, 6, 3, 8]]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_share_falls_from_one_to_the_end(schedule: str) -> None:
    cfg = TIMixConfig(enabled=True, start_epoch=10, duration_epochs=20, end=0.25, schedule=schedule)
    shares = [ground_truth_share(cfg, epoch) for epoch in range(40)]
    assert shares[:10] == [1.0] * 10
    assert all(a >= b for a, b in pairwise(shares))
    assert shares[30:] == [0.25] * 10
    if schedule != "constant":
        assert ground_truth_share(cfg, 20) == pytest.approx(0.625)


def test_off_is_ground_truth() -> None:
    assert ground_truth_share(TIMixConfig(enabled=False, start_epoch=0), 1000) == 1.0
