"""Features of images, and the scores computed from them: Fréchet distance, Inception score, precision, recall."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
from tqdm import tqdm

from mixar.data.npz import Npz
from mixar.errors import UserError, printable
from mixar.evaluation.extractors import INCEPTION, INCEPTION_FEATURES, Extractor
from mixar.files import replacing


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of a set's features: all that a Fréchet distance needs of a reference."""

    n: int | None  # None: unknown, as in published files
    mean: Tensor  # float64 [F]
    cov: Tensor  # float64 [F, F], unbiased
    label: str  # of the extractor
    digest: str  # sha256 of the images' pixels; of a published file, of its numbers

    def save(self, path: str | Path) -> None:
        """Write an npz whose `mu` and `sigma` other tools can read too. UserError where it cannot be written."""
        mu, sigma = self.mean.numpy(), self.cov.numpy()
        with replacing(path) as part, part.open("wb") as file:
            np.savez(file, mu=mu, sigma=sigma, n=self.n or 0, extractor=self.label, digest=self.digest)

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Read a file of `save`, or the `mu` and `sigma` of Inception features that ADM and others publish.

        Raises:
            UserError: no such file, a broken one, or one without statistics.
        """
        npz = Npz(path, "statistics")
        if not {"mu", "sigma"} <= set(npz.names):
            held = ", ".join(npz.names)
            raise UserError(f"{path} holds {held}, not `mu` and `sigma`: score against its images")
        shapes, kinds = zip(*(npz.header(name) for name in ("mu", "sigma")))
        width = shapes[0][:1]
        if shapes != (width, width * 2) or {kind.kind for kind in kinds} != {"f"}:
            raise UserError(f"{path} holds `mu` {shapes[0]} and `sigma` {shapes[1]}: expected numbers [F] and [F, F]")
        mean, cov = torch.from_numpy(npz.load("mu")).double(), torch.from_numpy(npz.load("sigma")).double()
        if not (mean.isfinite().all() and cov.isfinite().all()):
            raise UserError(f"the statistics in {path} are not finite: compute them again from their images")
        if {"n", "extractor", "digest"} <= set(npz.names):
            n, label, digest = (printable(str(npz.load(name))) for name in ("n", "extractor", "digest"))
            return cls(int(n) if n.isdecimal() and n != "0" else None, mean, cov, label, digest)
        if mean.shape != (INCEPTION_FEATURES,):
            raise UserError(f"{path} does not name its extractor, and {len(mean)} features are not Inception's")
        digest = hashlib.sha256(mean.numpy().tobytes() + cov.numpy().tobytes()).hexdigest()
        return cls(None, mean, cov, INCEPTION, digest)


@dataclass(frozen=True)
class Features:
    """The features of a set of images."""

    features: Tensor  # [n, F]
    logits: Tensor  # [n, K]
    label: str  # of the extractor
    digest: str  # sha256 of the images' pixels, in order

    @property
    def n(self) -> int:
        """The number of images."""
        return len(self.features)

    def statistics(self) -> Statistics:
        """Mean and covariance in float64. UserError for fewer than two images."""
        _require(self.n, 2, "a covariance")
        features = self.features.double()
        return Statistics(self.n, features.mean(0), torch.cov(features.T), self.label, self.digest)


def accumulate(batches: Iterable[Tensor], extractor: Extractor, progress: str | None = None) -> Features:
    """The features of images uint8 [B, 3, H, W].

    Args:
        progress: the caption of a progress bar; None shows none.

    Raises:
        UserError: no images, or images that the extractor cannot take.
    """
    features, logits, pixels = [], [], hashlib.sha256()
    for images in tqdm(batches, desc=progress, disable=progress is None, unit="batch"):
        pixels.update(images.cpu().contiguous().numpy().tobytes())
        outputs = extractor(images)
        if not outputs[0].isfinite().all():
            raise UserError(f"{extractor.label} gives features that are not finite: its weights are broken")
        features.append(outputs[0])
        logits.append(outputs[1])
    _require(len(features), 1, "a score")
    return Features(torch.cat(features), torch.cat(logits), extractor.label, pixels.hexdigest())


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) in float64 (Heusel et al. 2017, Eq. 6).

    The trace is taken of the symmetric (C_a^(1/2) C_b C_a^(1/2))^(1/2), whose trace is the same and whose
    eigenvalues are real; those that rounding leaves below zero are set to zero.

    Raises:
        UserError: statistics of different extractors.
    """
    _require_same(a, b)
    values, vectors = torch.linalg.eigh(a.cov)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ b.cov @ root).clamp_min(0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * trace
    return max(0.0, distance.item())  # for equal sets, rounding gives either sign


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Mean and deviation over ten splits of exp E[KL(p(y|x) || p(y))] (Salimans et al. 2016), of logits [n, K].

    Raises:
        UserError: fewer than two images.
    """
    _require(len(logits), 2, "an Inception score")
    # a split without images would make the score nan
    result = isc_features_to_metric(logits.double(), splits=min(10, len(logits)))
    return result[KEY_METRIC_ISC_MEAN], result[KEY_METRIC_ISC_STD]


def precision_recall(samples: Features, reference: Features) -> tuple[float, float]:
    """The share of samples near the reference, and of the reference near samples (Kynkäänniemi et al. 2019).

    Near means: closer to some image of the other set than its third nearest neighbour there, as in ADM's evaluation.

    Raises:
        UserError: features of different extractors, or fewer than four images in a set.
    """
    _require_same(samples, reference)
    _require(min(samples.n, reference.n), 4, "a third neighbour")
    # in parts: all distances between 50,000 images take 20 GB
    options = {"prc_neighborhood": 3, "prc_batch_size": 2048, "save_cpu_ram": True, "verbose": False}
    result = prc_features_to_metric(samples.features.double(), reference.features.double(), **options)
    return result[KEY_METRIC_PRECISION], result[KEY_METRIC_RECALL]


def _require(n: int, least: int, what: str) -> None:
    if n < least:
        raise UserError(f"{what} needs at least {least} image{'s' * (least > 1)}, but got {n}")


def _require_same(a: Statistics | Features, b: Statistics | Features) -> None:
    if a.label != b.label:
        raise UserError(f"features of {a.label} cannot be compared with those of {b.label}: use one extractor for both")
