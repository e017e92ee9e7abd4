import hashlib

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from mixar.errors import UserError
from mixar.evaluation.extractors import INCEPTION
from mixar.evaluation.scores import (
    Features,
    Statistics,
    accumulate,
    frechet_distance,
    inception_score,
    precision_recall,
)


def _features(n: int, width: int, seed: int, label: str = "some", dtype=torch.float64) -> Features:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    features = torch.randn(n, width, generator=generator, dtype=torch.float64) @ mix + seed
    return Features(features.to(dtype), torch.zeros(n, 3), label, "")


def _fidelity(a: Features, b: Features) -> float:
    both = [fid_features_to_statistics(each.features.double()) for each in (a, b)]
    return fid_statistics_to_metric(*both, verbose=False)[KEY_METRIC_FID]


@pytest.mark.parametrize("n, width", [(500, 64), (300, 48), (2, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_distance_equals_torch_fidelity(n, width, dtype):
    a, b = _features(n, width, 1, dtype=dtype), _features(n + 7, width, 2, dtype=dtype)
    ours = frechet_distance(a.statistics(), b.statistics())
    assert ours == pytest.approx(_fidelity(a, b), rel=1e-6)
    assert ours == pytest.approx(frechet_distance(b.statistics(), a.statistics()), rel=1e-7)


def test_distance_of_gaussians_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    std_a, std_b = torch.arange(6) + 0.5, torch.arange(6).flip(0) * 0.3  # one direction of b has no spread
    offset = torch.linspace(-1, 1, 6, dtype=torch.float64)
    a = Statistics(9, torch.zeros(6, dtype=torch.float64), basis * std_a.square() @ basis.T, "some", "")
    b = Statistics(9, offset, basis * std_b.square() @ basis.T, "some", "")
    expected = offset.square().sum() + (std_a - std_b).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-6)


def test_distance_to_itself_is_zero_with_fewer_images_than_features():
    few = _features(20, 128, 3)
    assert abs(frechet_distance(few.statistics(), few.statistics())) < 1e-6 * few.statistics().cov.trace()


def test_statistics_do_not_lose_small_spreads_in_float32():
    # a spread of 1e-3 about 1,000: float32 sums would make it noise
    features = (1000 + 1e-3 * torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))).float()
    statistics = Features(features, features, "some", "").statistics()
    assert statistics.cov.dtype == torch.float64
    assert statistics.cov.diagonal().numpy() == pytest.approx(np.var(features.double().numpy(), 0, ddof=1), rel=1e-9)


def test_statistics_round_trip(tmp_path):
    written = _features(50, 8, 4).statistics()
    written.save(tmp_path / "deep" / "reference.npz")
    read = Statistics.load(tmp_path / "deep" / "reference.npz")
    assert torch.equal(read.mean, written.mean) and torch.equal(read.cov, written.cov)
    assert (read.n, read.label, read.digest) == (50, "some", "")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["reference.npz"]


def test_published_statistics_are_of_inception(tmp_path):
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048, np.float32), sigma=np.eye(2048, dtype=np.float32))
    read = Statistics.load(tmp_path / "adm.npz")
    assert (read.n, read.label, read.cov.dtype) == (None, INCEPTION, torch.float64)
    assert len(read.digest) == 64


def test_files_that_hold_no_statistics_are_refused(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros(3))
    np.savez(tmp_path / "small.npz", mu=np.zeros(5), sigma=np.eye(5))
    for name, fault in (("images", "arr_0, not `mu`"), ("small", "5 features"), ("absent", "no statistics at")):
        with pytest.raises(UserError, match=fault):
            Statistics.load(tmp_path / f"{name}.npz")


def test_extractors_are_not_compared():
    a, b = _features(9, 4, 1, "inception-v3-compat"), _features(9, 4, 1, "classifier:00")
    with pytest.raises(UserError, match="classifier:00"):
        frechet_distance(a.statistics(), b.statistics())
    with pytest.raises(UserError, match="classifier:00"):
        precision_recall(a, b)


def test_too_few_images_are_refused(extractor):
    with pytest.raises(UserError, match="at least 2 images"):
        _features(1, 4, 1).statistics()
    with pytest.raises(UserError, match="at least 2 images"):
        inception_score(torch.zeros(1, 3))
    with pytest.raises(UserError, match="at least 4 images"):
        precision_recall(_features(3, 4, 1), _features(9, 4, 1))
    with pytest.raises(UserError, match="at least 1 image"):
        accumulate([], extractor)


def test_inception_score_counts_the_classes_that_are_told_apart():
    sure = 50 * torch.eye(5).repeat(200, 1)
    assert inception_score(torch.zeros(1000, 5)) == pytest.approx((1, 0))
    assert inception_score(sure)[0] == pytest.approx(5, rel=0.02)
    assert inception_score(sure[:3])[0] == pytest.approx(1)  # a split an image


def test_precision_and_recall_of_a_narrow_and_a_distant_set():
    wide = _features(400, 2, 1)
    narrow = Features(wide.features[0] + 1e-6 * wide.features[:40], wide.logits, "some", "")
    precision, recall = precision_recall(narrow, wide)
    assert precision == 1 and recall < 0.01
    assert precision_recall(wide, wide) == (1, 1)
    assert precision_recall(Features(wide.features + 1e3, wide.logits, "some", ""), wide) == (0, 0)


def test_features_do_not_depend_on_the_batches(digits, extractor):
    images = digits[0][:70]
    whole, parts = accumulate([images], extractor), accumulate(images.split(32), extractor)
    assert torch.allclose(whole.features, parts.features, atol=1e-4)
    assert whole.digest == parts.digest == hashlib.sha256(images.numpy().tobytes()).hexdigest()
    assert whole.logits.shape == (70, 10) and whole.label == extractor.label
