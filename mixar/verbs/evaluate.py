"""Score images against a reference: Fréchet distance, Inception Score, precision and recall, with a JSON receipt.

    mixar evaluate runs/mixar_l --reference imagenet.npz                           draws 50,000 images and scores them
    mixar evaluate --samples DIR --reference DIR --crop 256                        scores what is there
    mixar evaluate --reference DIR --crop 256 --save-statistics imagenet.npz       keeps a reference for later
    mixar evaluate runs/mixar_l --reference imagenet.npz --sweep-guidance 1,2,3,4  the same seeds under each guidance

A distance is called FID only where it is one: published Inception weights and 50,000 samples. Samples are kept, so the
same command goes on where it stopped.
"""

import argparse
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixar import dist
from mixar.errors import UserError
from mixar.evaluation import Features, Statistics, accumulate, evaluate
from mixar.evaluation.extractors import Extractor, make_extractor
from mixar.evaluation.files import replacing
from mixar.evaluation.images import Images, read_images
from mixar.evaluation.receipt import FID_IMAGES, Provenance, write_receipt
from mixar.verbs.drawing import Drawing, add_sampling_arguments, place, read_record, sampling_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="?", metavar="PATH", help="run directory or export folder to draw samples from")
    parser.add_argument("--samples", metavar="PATH", help="folder of images, or npz, to score instead")
    parser.add_argument("--reference", required=True, help="images: folder, npz or built-in set; or npz of statistics")
    parser.add_argument("--crop", type=int, metavar="SIZE", help="crop a folder of reference images, as ADM does")
    parser.add_argument("--extractor", default="inception", help="inception, inception=FILE, or a classifier's export")
    parser.add_argument("--reconstructions", action="store_true", help="the samples are reconstructions: an rFID")
    parser.add_argument("--save-statistics", metavar="FILE", help="keep the reference's statistics as an npz")
    parser.add_argument("--out", metavar="FILE", help="the receipt; default: PATH/eval/<seed>-<count>.json")
    parser.add_argument("--sweep-guidance", metavar="G,G,...", help="score each of these guidances")
    add_sampling_arguments(parser, f"{FID_IMAGES}")


def run(args: argparse.Namespace) -> None:
    check_flags(args)
    # first whatever may be wrong with what is to be scored: reading the reference takes long
    guidances = parse_guidances(args.sweep_guidance) if args.sweep_guidance else []
    drawing = Drawing.of(args, FID_IMAGES) if args.path else None
    if args.samples:
        open_samples(Path(args.samples))

    scorer, out = Scorer.of(args), Path(args.out) if args.out else None
    if args.samples:
        samples = Path(args.samples)
        scorer.score(samples, out or samples.with_name(f"{samples.name}.eval.json"))
    if drawing is not None and guidances:
        sweep(drawing, guidances, scorer, out)
    elif drawing is not None:
        drawing.write(drawing.folder)
        scorer.score(drawing.folder, out or place(drawing.path, "eval") / f"{drawing.name}.json")


def check_flags(args: argparse.Namespace) -> None:
    """UserError where the flags together ask for nothing, or for two things at once."""
    if args.path and args.samples:
        raise UserError(f"score either what {args.path} draws or --samples {args.samples}: drop one of them")
    if not (args.path or args.samples or args.save_statistics):
        raise UserError("nothing to score: name a run or an export, or --samples, or only --save-statistics FILE")
    asked = [*sampling_flags(args), *(["--sweep-guidance"] if args.sweep_guidance else [])]
    if asked and not args.path:
        raise UserError(f"{', '.join(asked)} tell how to draw samples: name a run or an export, or drop them")
    if "--guidance" in asked and args.sweep_guidance:
        raise UserError("--sweep-guidance tries its own guidances: drop --guidance")


def sweep(drawing: Drawing, guidances: list[float], scorer: "Scorer", out: Path | None) -> None:
    """Score the same seeds under each guidance, a receipt each, and write the curve with its best."""
    eval_dir, curve = place(drawing.path, "eval"), []
    for guidance in guidances:
        drawn = drawing.with_settings(guidance=guidance)
        drawn.write(drawn.folder)
        receipt = eval_dir / f"{drawn.name}.json"
        scores = scorer.score(drawn.folder, receipt)
        curve.append({"guidance": guidance, "receipt": str(receipt), **{k: scores[k] for k in ("distance", "score")}})
    best = min(curve, key=lambda point: point["distance"]["value"])
    file = out or eval_dir / f"{drawing.name}-sweep.json"
    with replacing(file) as part:
        part.write_text(json.dumps({"best": best["guidance"], "curve": curve}, indent=2) + "\n")
    print(f"\nguidance  {best['distance']['name']}")
    for point in curve:
        print(f"{point['guidance']:>8g}  {point['distance']['value']:.3f}{'  best' if point is best else ''}")
    print(f"the curve: {file}")


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


def parse_guidances(text: str) -> list[float]:
    """`1,2,3.5` as numbers. UserError where it is none."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--sweep-guidance {text} is no list of numbers: write such as 1,2,3,4") from None


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
