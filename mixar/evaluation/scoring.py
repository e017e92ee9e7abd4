"""Samples scored against a reference, in the eyes of an extractor."""

import argparse
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixar import dist
from mixar.data.image_batches import Images, read_images
from mixar.data.npz import Npz, printable
from mixar.errors import UserError
from mixar.evaluation import Features, Statistics, accumulate, evaluate
from mixar.evaluation.extractors import Extractor, make_extractor
from mixar.evaluation.receipt import Provenance, write_receipt
from mixar.process import check_writable
from mixar.sampling.sample_set import read_record, sample_names


@dataclass(frozen=True)
class Scorer:
    """A reference in the eyes of an extractor, to score any number of samples against."""

    extractor: Extractor
    opened: Images | Statistics  # the reference
    source: str  # of the reference
    crop: int | None
    reconstructions: bool

    @classmethod
    def of(cls, args: argparse.Namespace, opened: Images | Statistics) -> "Scorer":
        """As the flags name it; `opened` is the reference. UserError for an extractor that is not there."""
        extractor = make_extractor(args.extractor, dist.find().device)
        return cls(extractor, opened, args.reference, args.crop, args.reconstructions)

    @cached_property
    def reference(self) -> Features | Statistics:
        """What the extractor sees in the reference: it takes long, so `check` first."""
        if isinstance(self.opened, Statistics):
            return self.opened
        return accumulate(self.opened, self.extractor, "reference")

    def save_statistics(self, file: Path) -> None:
        """Keep the reference's statistics. UserError where nothing can be written there."""
        known = self.reference if isinstance(self.reference, Statistics) else self.reference.statistics()
        known.save(file)
        print(f"statistics{f' of {known.n} images' if known.n else ''}: {file}")

    def check(self, size: tuple[int, ...], count: int) -> None:
        """Find before the reference is read or anything is drawn what scoring `count` images would refuse.

        Args:
            size: height and width of each.

        Raises:
            UserError: too few images, or of another size than the extractor takes; a reference of another extractor.
        """
        blank = torch.zeros(min(count, 4), 3, *size, dtype=torch.uint8)
        few = self.opened if isinstance(self.opened, Statistics) else [next(iter(self.opened))[:4]]
        evaluate([blank], few, self.extractor)

    def check_receipt(self, file: Path) -> None:
        """See that `file` can take a receipt, and that none of other scores would be lost.

        Raises:
            UserError: it cannot, or it holds something else.
        """
        check_writable(file)
        if not file.exists():
            return
        try:
            before = json.loads(file.read_text())
            told = before["extractor"]["label"], before["reference"]["digest"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{file} is no receipt of scores: name another file with --out") from None
        if told != (self.extractor.label, self.reference.digest):
            raise UserError(
                f"{file} holds scores against another reference, or by another extractor: remove it, or name another "
                "file with --out"
            )

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
        print(table(scores, str(samples), f"{self.source}{f', {crop}' if crop else ''}"), flush=True)
        write_receipt(receipt, scores, provenance)
        print(f"receipt: {receipt}")
        return scores


def open_reference(source: str, crop: int | None) -> Images | Statistics:
    """Images, or the statistics that an npz holds.

    Raises:
        UserError: neither is there, or a crop of an npz.
    """
    path = Path(source)
    if crop is not None and path.suffix == ".npz":
        raise UserError(f"{source} is scored as it is: drop --crop, or name the folder of images")
    if path.suffix == ".npz" and "mu" in Npz(path, "reference").names:
        return Statistics.load(path)
    return read_images(source, crop)


def open_samples(path: Path) -> tuple[Images, Tensor | None, dict[str, Any] | None]:
    """Images to score, their labels, and how they were drawn, as far as that is known.

    Raises:
        UserError: nothing there, not all that `mixar sample` was to draw, or images of others among them.
    """
    images, record = read_images(path), read_record(path)
    if record is None:
        return images, images.labels, record
    if images.count < record["count"] or (images.names is None and images.count != record["count"]):
        raise UserError(f"{path} holds {images.count} of {record['count']} samples: `mixar sample` draws the rest")
    if images.names is None:
        return images, images.labels, record
    labels = sample_names(record)
    if foreign := [name for name in images.names if name not in labels]:
        raise UserError(
            f"{path} holds {len(foreign)} images that `mixar sample` did not draw there, such as "
            f"{printable(foreign[0])}: take them out"
        )
    return images, torch.tensor([labels[name] for name in images.names]), record


def table(scores: dict[str, Any], samples: str, reference: str) -> str:
    """The scores as lines to read, with what was scored against what."""
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
