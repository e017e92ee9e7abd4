"""Score images against a reference: Fréchet distance, Inception Score, precision and recall, with a JSON receipt.

    mixar evaluate runs/mixar_l --reference imagenet.npz                           draws 50,000 images and scores them
    mixar evaluate --samples DIR --reference DIR --crop 256                        scores what is there
    mixar evaluate --reference DIR --crop 256 --save-statistics imagenet.npz       keeps a reference for later
    mixar evaluate runs/mixar_l --reference imagenet.npz --grid steps=8,64 guidance=2,3 --repeats 3
                                                                                   speed against quality, at each point

A distance is called FID only where it is one: published Inception weights and 50,000 samples. Samples are kept, so the
same command goes on where it stopped. A grid draws the same seeds and labels at each point, in the folders of `mixar
sample`, and writes PATH/eval/<name>-grid.json with a table (.md) and a plot (.png).
"""

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
from mixar.evaluation.receipt import FID_IMAGES, Provenance, write_receipt
from mixar.verbs.drawing import AXES, Drawing, add_sampling_arguments, place, read_record, sampling_flags
from mixar.verbs.grid import DEFAULT, grid_drawings, parse_grid, run_grid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="?", metavar="PATH", help="run directory or export folder to draw samples from")
    parser.add_argument("--samples", metavar="PATH", help="folder of images, or npz, to score instead")
    parser.add_argument("--reference", required=True, help="images: folder, npz or built-in set; or npz of statistics")
    parser.add_argument("--crop", type=int, metavar="SIZE", help="crop a folder of reference images, as ADM does")
    parser.add_argument("--extractor", default="inception", help="inception, inception=FILE, or a classifier's export")
    parser.add_argument("--reconstructions", action="store_true", help="the samples are reconstructions: an rFID")
    parser.add_argument("--save-statistics", metavar="FILE", help="keep the reference's statistics as an npz")
    parser.add_argument("--out", metavar="FILE", help="the receipt or grid; default: PATH/eval/<seed>-<count>.json")
    axes = f"{', '.join(AXES)} (default: {' '.join(DEFAULT)}, and the presets)"
    parser.add_argument("--grid", nargs="*", metavar="NAME=V,V", help=f"draw and score each point of a grid: {axes}")
    parser.add_argument("--repeats", type=int, metavar="N", help="score each point of the grid on N ranges of seeds")
    add_sampling_arguments(parser, f"{FID_IMAGES}")


def run(args: argparse.Namespace) -> None:
    check_flags(args)
    # first whatever may be wrong with what is to be scored: reading the reference takes long
    points = [] if args.grid is None else parse_grid(args.grid, sampling_flags(args))
    drawing = Drawing.of(args, FID_IMAGES) if args.path else None
    drawings = grid_drawings(drawing, points, args.repeats or 1) if drawing is not None else []
    if args.samples:
        open_samples(Path(args.samples))

    scorer, out = Scorer.of(args), Path(args.out) if args.out else None
    if args.samples:
        samples = Path(args.samples)
        scorer.score(samples, out or samples.with_name(f"{samples.name}.eval.json"))
    if drawing is not None and drawings:
        run_grid(drawing, drawings, scorer, out)
    elif drawing is not None:
        drawing.write(drawing.folder)
        scorer.score(drawing.folder, out or place(drawing.path, "eval") / f"{drawing.name}.json")


def check_flags(args: argparse.Namespace) -> None:
    """UserError where the flags together ask for nothing, or for two things at once."""
    if args.grid is not None and not args.path:
        raise UserError("--grid draws its samples from a run or an export: name it before --grid")
    if args.path and args.samples:
        raise UserError(f"score either what {args.path} draws or --samples {args.samples}: drop one of them")
    if not (args.path or args.samples or args.save_statistics):
        raise UserError("nothing to score: name a run or an export, or --samples, or only --save-statistics FILE")
    if (asked := sampling_flags(args)) and not args.path:
        raise UserError(f"{', '.join(asked)} tell how to draw samples: name a run or an export, or drop them")
    if args.repeats is not None and args.grid is None:
        raise UserError(f"--repeats {args.repeats} repeats the points of a grid: add --grid, or drop --repeats")
    if args.repeats is not None and args.repeats < 1:
        raise UserError(f"--repeats {args.repeats} scores nothing: write --repeats 1 or more")
    if args.grid is not None and args.out and Path(args.out).suffix != ".json":
        raise UserError(f"--out {args.out} is not where a grid goes, with a table and a plot beside: write a .json")


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
