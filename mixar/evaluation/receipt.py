"""What a score is called, and the receipt from which it can be measured again."""

import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mixar
from mixar.evaluation.extractors import INCEPTION
from mixar.files import write_json

FID_IMAGES = 50_000  # the number of samples that FIDs in papers are of


def distance_name(label: str, n: int, reconstructions: bool = False) -> str:
    """The only name that a Fréchet distance of `n` samples may bear, by the `label` of its extractor.

    `FID` is of Inception and 50,000 samples, `FID-10k` of Inception and fewer, `FD-<label>` of any other extractor;
    a leading `r` marks images reconstructed from the reference.
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
    """How the scored images came to be. What is not known stays None, and the receipt says null."""

    samples: str  # where they were read from, or the run or export that drew them
    reference: str
    sampling: dict[str, Any] | None = None  # guidance, schedules, temperature, steps: the config's `sample` section
    seeds: tuple[int, int] | None = None  # of the first and the last image, one seed an image
    weights: dict[str, str] = field(default_factory=dict)  # fingerprint by network: model, vae, prior, tokenizer
    crop: str | None = None  # of the reference's images
    dtype: str | None = None  # in which the samples were drawn


def write_receipt(path: str | Path, scores: dict[str, Any], provenance: Provenance) -> None:
    """Write what `evaluate` measured, on what, with what and when, as JSON, whole or not at all.

    Raises:
        UserError: nothing can be written there.
    """
    versions = {name: version(name) for name in ("torch", "torch-fidelity", "numpy")}
    receipt = {
        **scores,
        "provenance": asdict(provenance),
        "versions": {"mixar": mixar.__version__, **versions, "python": platform.python_version()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(path, receipt)
