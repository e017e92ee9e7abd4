"""The training mask and its packing (Eq. 8)."""

import pytest
import torch

from mixar import rng
from mixar.config import MaskConfig
from mixar.mixing import Masking, masked_counts
from mixar.rng import Stream


def test_every_micro_batch_holds_the_same_counts() -> None:
    cfg = MaskConfig(group=8)
    first = masked_counts(cfg, 256, 3, range(32), 64)
    for start in (32, 64, 4096):
        counts = masked_counts(cfg, 256, 3, range(start, start + 32), 64)
        assert sorted(counts) == sorted(first)
        assert counts != first  # but in another order


def test_counts_do_not_depend_on_how_images_are_split_over_ranks() -> None:
    cfg = MaskConfig(group=4)
    whole = masked_counts(cfg, 100, 0, range(48), 48)
    halves = masked_counts(cfg, 100, 0, range(24), 48) + masked_counts(cfg, 100, 0, range(24, 48), 48)
    assert whole == halves


def test_stratified_ratios_follow_the_reference_law() -> None:
    cfg = MaskConfig()
    counts = torch.tensor(masked_counts(cfg, 10_000, 0, range(1600), 1600)) / 10_000
    assert abs(counts.mean() - 0.8670) < 1e-3  # the law's mean and std, in closed form
    assert counts.min() >= 0.7 and counts.max() <= 1
    assert abs(counts.std() - 0.084) < 1.5e-3  # 16 midpoints lose a little of it


def test_an_image_takes_every_stratum_over_time() -> None:
    cfg = MaskConfig(group=4)
    first_of_group = [masked_counts(cfg, 1000, 0, range(i, i + 4), 4)[0] for i in range(0, 1600, 4)]
    values, times = torch.tensor(first_of_group).unique(return_counts=True)
    assert len(values) == 4 and times.min() > 60  # of 400, a quarter expected


def test_batch_scope_shares_one_ratio() -> None:
    cfg = MaskConfig(ratio_scope="batch")
    counts = masked_counts(cfg, 256, 0, range(64), 32)
    assert len(set(counts[:32])) == len(set(counts[32:])) == 1
    assert masked_counts(cfg, 256, 0, range(16, 32), 32) == counts[16:32]  # another rank's share of the batch
    spread = {masked_counts(cfg, 256, 0, [i], 1)[0] for i in range(200)}
    assert min(spread) >= 180 and len(spread) > 30


@pytest.mark.parametrize("prefix", [0, 3])
def test_packing(prefix: int) -> None:
    n, counts = 10, [4, 7, 7, 10]
    order = rng.permutation(0, Stream.MASK_ORDER, torch.arange(4), n)
    masking = Masking.from_order(order, counts)
    packed, masked = masking.packed_rows(prefix).tolist(), masking.masked_rows.tolist()
    expected_packed, expected_masked = [], []
    for b, count in enumerate(counts):
        hidden = sorted(order[b, :count].tolist())
        seen = [i for i in range(n) if i not in hidden]
        expected_packed += [b * (prefix + n) + i for i in [*range(prefix), *(prefix + s for s in seen)]]
        expected_masked += [b * n + i for i in hidden]
    assert packed == expected_packed
    assert masked == expected_masked
    assert masking.visible == (6, 3, 3, 0)
    assert torch.equal(masking.masked.flatten().nonzero()[:, 0], masking.masked_rows)


def test_row_weights_give_the_mean_of_image_means() -> None:
    order = rng.permutation(0, Stream.MASK_ORDER, torch.arange(3), 8)
    masking = Masking.from_order(order, [2, 5, 8])
    values = torch.randn(15, generator=torch.Generator().manual_seed(0))
    means = torch.stack([part.mean() for part in values.split([2, 5, 8])])
    torch.testing.assert_close((values * masking.row_weights).sum(), means.mean())


@pytest.mark.parametrize("prefix", [0, 3])
def test_slots_invert_packed_rows(prefix: int) -> None:
    masking = Masking.from_order(rng.permutation(0, Stream.MASK_ORDER, torch.arange(3), 8), [5, 8, 0])
    slots, rows = masking.slots(prefix), masking.packed_rows(prefix)
    assert torch.equal(slots.flatten()[rows], torch.arange(len(rows)))
    assert torch.equal(slots[:, prefix:] < 0, masking.masked) and (slots[:, :prefix] >= 0).all()
