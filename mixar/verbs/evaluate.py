"""Score images against a reference: Frechet distance, Inception Score, precision and recall, with a JSON receipt."""

import argparse
import importlib
import os
from pathlib import Path

from mixar import dist
from mixar.data.image_batches import ImageBatches
from mixar.errors import UserError
from mixar.evaluation.extractors import make_extractor
from mixar.evaluation.grid import Points, run_grid, sample_sets
from mixar.evaluation.receipt import FID_IMAGES
from mixar.evaluation.scoring import Scorer, open_reference, open_samples
from mixar.files import check_writable
from mixar.sampling.sample_set import SampleSet, output_folder
from mixar.sampling_flags import as_flag, given_flags, parse_grid, request, spelling


def run(args: argparse.Namespace) -> None:
    check_flags(args)
    grid = [] if args.grid is None else parse_grid(args.grid, given_flags(args))
    if grid:
        importlib.import_module("matplotlib")  # it draws the plot: found missing now rather than after hours
    out, kept = (Path(name) if name else None for name in (args.out, args.save_statistics))
    for file in filter(None, (out, kept)):
        check_writable(file)
    # mistakes are found before the reference is read and before anything is sampled: both take long
    opened = open_reference(args.reference, args.crop)
    samples, points, images = None, [], None
    if args.path:
        with spelling(as_flag):
            samples = SampleSet.open(args.path, **request(args, FID_IMAGES))
        points = sample_sets(samples, grid, args.repeats or 1)
    elif args.samples:
        images, *_ = open_samples(Path(args.samples))
    extractor = make_extractor(args.extractor, dist.find().device)
    scorer = Scorer(extractor, opened, args.reference, args.crop, args.reconstructions)
    if samples is not None:
        sample_and_score(samples, points, scorer, out, kept)
    elif images is not None:
        score(Path(args.samples), images, scorer, out, kept)
    else:
        save(scorer, kept)


def sample_and_score(samples: SampleSet, points: Points, scorer: Scorer, out: Path | None, kept: Path | None) -> None:
    """Sample and score, at each point of a grid where there is one."""
    scorer.check((samples.pipeline.image_size,) * 2, samples.count)
    if points:
        save(scorer, kept)
        with spelling(as_flag):
            run_grid(samples, points, scorer, out)
        return
    with spelling(as_flag):
        samples.check()
    receipt = out or output_folder(samples.path, "eval") / f"{samples.name}.json"
    scorer.check_receipt(receipt)
    save(scorer, kept)
    with spelling(as_flag):
        samples.write(samples.folder)
    scorer.score(samples.folder, receipt)


def score(samples: Path, images: ImageBatches, scorer: Scorer, out: Path | None, kept: Path | None) -> None:
    """Score `images`, which lie at `samples`."""
    receipt = out or samples.with_name(f"{samples.name}.eval.json")
    scorer.check(next(iter(images)).shape[2:], images.count)
    scorer.check_receipt(receipt)
    save(scorer, kept)
    scorer.score(samples, receipt)


def save(scorer: Scorer, file: Path | None) -> None:
    """Write the reference's statistics where the user asked for them."""
    if file is not None:
        scorer.save_statistics(file)


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError where the flags together ask for nothing, or for two things at once."""
    if args.grid is not None and not args.path:
        raise UserError("--grid needs a run or an export to sample from: name it before --grid")
    if args.path and args.samples:
        raise UserError(f"score either samples of {args.path} or --samples {args.samples}: drop one of them")
    if not (args.path or args.samples or args.save_statistics):
        raise UserError("nothing to score: name a run or an export, or --samples, or only --save-statistics FILE")
    if (asked := given_flags(args)) and not args.path:
        raise UserError(f"{', '.join(asked)} say how to sample: name a run or an export, or drop them")
    if args.repeats is not None and args.grid is None:
        raise UserError(f"--repeats {args.repeats} repeats the points of a grid: add --grid, or drop --repeats")
    if args.repeats is not None and args.repeats < 1:
        raise UserError(f"--repeats {args.repeats} scores nothing: write --repeats 1 or more")
    if args.save_statistics and Path(args.save_statistics).suffix != ".npz":
        raise UserError(f"--save-statistics {args.save_statistics} could not be read again: name a file ending in .npz")
    if args.save_statistics and os.path.realpath(args.save_statistics) == os.path.realpath(args.reference):
        raise UserError(f"--save-statistics {args.save_statistics} is the reference itself: name another file")
    if args.grid is not None and args.out and Path(args.out).suffix != ".json":
        raise UserError(f"--out {args.out} is not a .json: name one, and the table and the plot are written beside it")
