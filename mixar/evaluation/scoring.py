"""Scoring of samples against a reference, by the features of an extractor."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixar.data.image_batches import ImageBatches, read_images
from mixar.data.npz import Npz
from mixar.errors import UserError
from mixar.evaluation import Features, Statistics, accumulate, evaluate
from mixar.evaluation.extractors import Extractor
from mixar.evaluation.receipt import Provenance, write_receipt
from mixar.files import check_writable
from mixar.sampling.record import read_record, sample_names


@dataclass(frozen=True)
class Scorer:
    """An extractor and a reference, to score any number of samples against.

    Attributes:
        opened: the reference.
        source: the reference as the user named it.
        crop: side in pixels that the reference's images are cropped to.
        reconstructions: the samples are reconstructions of the reference.
    """

    extractor: Extractor
    opened: ImageBatches | Statistics
    source: str
    crop: int | None
    reconstructions: bool

    @cached_property
    def reference(self) -> Features | Statistics:
        """The features of the reference. To compute them takes long, so call `check` first."""
        if isinstance(self.opened, Statistics):
            return self.opened
        return accumulate(self.opened, self.extractor, "reference")

    def save_statistics(self, file: Path) -> None:
        """Write the reference's statistics to `file`. UserError where it cannot be written."""
        known = self.reference if isinstance(self.reference, Statistics) else self.reference.statistics()
        known.save(file)
        print(f"statistics{f' of {known.n} images' if known.n else ''}: {file}")

    def check(self, size: tuple[int, ...], count: int) -> None:
        """Find out whether scoring would be refused, before the reference is read or anything is sampled.

        Args:
            size: height and width of each image.
            count: the number of images.

        Raises:
            UserError: too few images, a size that the extractor does not take, or a reference of another extractor.
        """
        blank = torch.zeros(min(count, 4), 3, *size, dtype=torch.uint8)
        few = self.opened if isinstance(self.opened, Statistics) else [next(iter(self.opened))[:4]]
        evaluate([blank], few, self.extractor)

    def check_receipt(self, file: Path) -> None:
        """Check that a receipt can be written to `file` without losing another one.

        Raises:
            UserError: `file` cannot be written, or holds something else.
        """
        check_writable(file)
        if not file.exists():
            return
        try:
            before = json.loads(file.read_text())
            scored = before["extractor"]["label"], before["reference"]["digest"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{file} is not a receipt of scores: name another file with --out") from None
        if scored != (self.extractor.label, self.reference.digest):
            raise UserError(
                f"{file} holds scores against another reference or by another extractor: remove it, or name another "
                "file with --out"
            )

    def score(self, samples: Path, receipt: Path) -> dict[str, Any]:
        """Score the images at `samples`, print the scores, write the receipt.

        Raises:
            UserError: no samples, an incomplete set, or a reference of another extractor.
        """
        images, labels, record = open_samples(samples)
        crop = f"ADM centre crop to {self.crop}" if self.crop else None
        provenance = Provenance(str(samples), self.source, crop=crop)
        if record is not None:
            first = record["sampling"]["seed"]
            provenance = Provenance(
                record["export"], self.source, record["sampling"], (first, first + record["count"] - 1),
                record["weights"], crop, record["dtype"],
            )  # fmt: skip
        scores = evaluate(images, self.reference, self.extractor, labels, self.reconstructions, progress=True)
        print(table(scores, str(samples), f"{self.source}{f', {crop}' if crop else ''}"), flush=True)
        write_receipt(receipt, scores, provenance)
        print(f"receipt: {receipt}")
        return scores


def open_reference(source: str, crop: int | None) -> ImageBatches | Statistics:
    """The images at `source`, or the statistics in an npz.

    Raises:
        UserError: neither is there, or a crop of an npz is asked for.
    """
    path = Path(source)
    if crop is not None and path.suffix == ".npz":
        raise UserError(f"{source} is scored as it is: drop --crop, or name the folder of images")
    if path.suffix == ".npz" and "mu" in Npz(path, "reference").names:
        return Statistics.load(path)
    return read_images(source, crop)


def open_samples(path: Path) -> tuple[ImageBatches, Tensor | None, dict[str, Any] | None]:
    """Images to score, and where they are known, their labels and the record of how they were sampled.

    Raises:
        UserError: no images, an incomplete set of `mixar sample`, or foreign images in it.
    """
    images, record = read_images(path), read_record(path)
    if record is None:
        return images, images.labels, record
    if images.count < record["count"] or (images.names is None and images.count != record["count"]):
        raise UserError(f"{path} holds {images.count} of {record['count']} samples: `mixar sample` adds the rest")
    if images.names is None:
        return images, images.labels, record
    labels = sample_names(record)
    if foreign := [name for name in images.names if name not in labels]:
        raise UserError(
            f"{path} holds {len(foreign)} images that `mixar sample` did not write, such as {foreign[0]}: remove them"
        )
    return images, torch.tensor([labels[name] for name in images.names]), record


def table(scores: dict[str, Any], samples: str, reference: str) -> str:
    """The scores as lines of text, with the samples, the reference and the extractor."""
    lines = {
        scores["distance"]["name"]: f"{scores['distance']['value']:.3f}",
        scores["score"]["name"]: f"{scores['score']['mean']:.3f} +- {scores['score']['std']:.3f}",
    }
    lines |= {name: f"{scores[name]:.3f}" for name in ("precision", "recall", "accuracy") if name in scores}
    known = scores["reference"]["n"]
    lines |= {"samples": f"{scores['n']:,} images, {samples}"}
    lines |= {"reference": f"{'statistics' if known is None else f'{known:,} images'}, {reference}"}
    lines |= {"extractor": scores["extractor"]["description"]}
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())
