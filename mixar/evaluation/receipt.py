"""The names of scores, and the receipt by which a score can be measured again."""

import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mixar
from mixar.evaluation.extractors import INCEPTION
from mixar.files import write_json

FID_IMAGES = 50_000  # the usual number of samples of an FID in papers


def distance_name(label: str, n: int, reconstructions: bool = False) -> str:
    """The name of a Fréchet distance of `n` samples, from the `label` of its extractor.

    `FID` needs Inception and 50,000 samples; `FID-10k` is Inception with fewer, `FD-<label>` any other extractor. A
    leading `r` marks reconstructions of the reference.
    """
    prefix = "r" if reconstructions else ""
    if label != INCEPTION:
        return f"{prefix}FD-{label}"
    return f"{prefix}FID" if n >= FID_IMAGES else f"{prefix}FID-{n / 1000:g}k"


def score_name(label: str) -> str:
    """The name of an Inception score, `IS` for Inception's logits only."""
    return "IS" if label == INCEPTION else f"IS-{label}"


@dataclass
class Provenance:
    """The origin of the scored images. Unknown values are None, and null in the receipt."""

    samples: str  # the folder or file, or the run or export that made them
    reference: str
    sampling: dict[str, Any] | None = None  # cfg scale, schedules, temperature, steps: the config's `sample` section
    seeds: tuple[int, int] | None = None  # of the first and the last image, one seed per image
    weights: dict[str, str] = field(default_factory=dict)  # fingerprint by network: model, vae, prior, tokenizer
    crop: str | None = None  # of the reference's images
    dtype: str | None = None  # of the sampling


def write_receipt(path: str | Path, scores: dict[str, Any], provenance: Provenance) -> None:
    """Write the scores of `evaluate` with their provenance, the versions of the software and the date as JSON.

    Raises:
        UserError: `path` cannot be written.
    """
    versions = {name: version(name) for name in ("torch", "torch-fidelity", "numpy")}
    receipt = {
        **scores,
        "provenance": asdict(provenance),
        "versions": {"mixar": mixar.__version__, **versions, "python": platform.python_version()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(path, receipt)
