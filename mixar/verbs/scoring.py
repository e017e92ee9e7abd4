"""Samples scored against a reference, in the eyes of an extractor."""

import argparse
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixar import dist
from mixar.errors import UserError
from mixar.evaluation import Features, Statistics, accumulate, evaluate
from mixar.evaluation.extractors import Extractor, make_extractor
from mixar.evaluation.images import Images, read_images
from mixar.evaluation.receipt import Provenance, write_receipt
from mixar.verbs.drawing import read_record


@dataclass(frozen=True)
class Scorer:
    """A reference in the eyes of an extractor, to score any number of samples against."""

    extractor: Extractor
    reference: Features | Statistics
    source: str  # of the reference
    crop: int | None
    reconstructions: bool

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Scorer":
        """As the flags name it; keeps the statistics where they ask for that.

        Raises:
            UserError: no such reference or extractor, or a crop of what is never cropped.
        """
        extractor = make_extractor(args.extractor, dist.find().device)
        found = open_reference(args.reference, args.crop)
        reference = found if isinstance(found, Statistics) else accumulate(found, extractor, "reference")
        if args.save_statistics:
            known = reference if isinstance(reference, Statistics) else reference.statistics()
            known.save(args.save_statistics)
            print(f"statistics of {known.n} images: {args.save_statistics}")
        return cls(extractor, reference, args.reference, args.crop, args.reconstructions)

    def check(self, size: int, count: int) -> None:
        """Find before anything is drawn what scoring `count` images of size x size would refuse.

        Raises:
            UserError: too few images, or of another size than the extractor takes; a reference of another extractor.
        """
        blank, reference = torch.zeros(min(count, 4), 3, size, size, dtype=torch.uint8), self.reference
        if isinstance(reference, Features):  # a few of them: among all, neighbours take long to find
            reference = replace(reference, features=reference.features[:4], logits=reference.logits[:4])
        evaluate([blank], reference, self.extractor)

    def score(self, samples: Path, receipt: Path) -> dict[str, Any]:
        """Score the images at `samples`, print the scores, write the receipt.

        Raises:
            UserError: no samples, fewer than were to be drawn, or a reference of another extractor.
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
        write_receipt(receipt, scores, provenance)
        print(table(scores) + f"\nreceipt: {receipt}")
        return scores


def open_reference(source: str, crop: int | None) -> Images | Statistics:
    """Images, or the statistics that an npz holds.

    Raises:
        UserError: neither is there, or a crop of an npz.
    """
    path = Path(source)
    if crop is not None and path.suffix == ".npz":
        raise UserError(f"{source} is scored as it is: drop --crop, or name the folder of images")
    if path.suffix == ".npz" and zipfile.is_zipfile(path) and "mu.npy" in zipfile.ZipFile(path).namelist():
        return Statistics.load(path)
    return read_images(source, crop)


def open_samples(path: Path) -> tuple[Images, Tensor | None, dict[str, Any] | None]:
    """Images to score, their labels, and how they were drawn, as far as that is known.

    Raises:
        UserError: nothing there, or not all that `mixar sample` was to draw.
    """
    images, record = read_images(path), read_record(path)
    if record is None or path.is_file():
        return images, images.labels, record
    if images.count != record["count"]:
        raise UserError(f"{path} holds {images.count} of {record['count']} samples: `mixar sample` draws the rest")
    stems = sorted(file.stem for file in path.glob("*.png"))  # in the order of the images
    return images, torch.tensor([int(stem.rpartition("-")[2]) for stem in stems]), record


def table(scores: dict[str, Any]) -> str:
    """The scores as lines to read."""
    lines = {
        scores["distance"]["name"]: f"{scores['distance']['value']:.3f}",
        scores["score"]["name"]: f"{scores['score']['mean']:.3f} ± {scores['score']['std']:.3f}",
    }
    lines |= {name: f"{scores[name]:.3f}" for name in ("precision", "recall", "accuracy") if name in scores}
    lines |= {"samples": f"{scores['n']}", "extractor": scores["extractor"]["description"]}
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())
