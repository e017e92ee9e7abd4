"""Score images against a reference: Frechet distance, Inception Score, precision and recall, with a JSON receipt."""

import argparse
import os
from pathlib import Path

from mixar.command_line import sampling_flags
from mixar.errors import UserError
from mixar.evaluation.receipt import FID_IMAGES
from mixar.verbs.drawing import Drawing, place
from mixar.verbs.grid import Drawings, grid_drawings, parse_grid, run_grid
from mixar.verbs.process import check_writable
from mixar.verbs.scoring import Scorer, open_reference, open_samples


def run(args: argparse.Namespace) -> None:
    check_flags(args)
    points = [] if args.grid is None else parse_grid(args.grid, sampling_flags(args))
    out, kept = (Path(name) if name else None for name in (args.out, args.save_statistics))
    for file in filter(None, (out, kept)):
        check_writable(file)
    # whatever may be wrong is found before the reference is read and before anything is drawn: both take long
    opened = open_reference(args.reference, args.crop)
    if args.path:
        drawing = Drawing.of(args, FID_IMAGES)
        drawings = grid_drawings(drawing, points, args.repeats or 1)
        score_drawing(drawing, drawings, Scorer.of(args, opened), out, kept)
    elif args.samples:
        samples = Path(args.samples)
        images, *_ = open_samples(samples)
        scorer = Scorer.of(args, opened)
        receipt = out or samples.with_name(f"{samples.name}.eval.json")
        scorer.check(next(iter(images)).shape[2:], images.count)
        scorer.check_receipt(receipt)
        save(scorer, kept)
        scorer.score(samples, receipt)
    else:
        save(Scorer.of(args, opened), kept)


def score_drawing(drawing: Drawing, drawings: Drawings, scorer: Scorer, out: Path | None, kept: Path | None) -> None:
    """Draw and score, at each point of a grid where there are any."""
    scorer.check((drawing.pipeline.image_size,) * 2, drawing.count)
    if drawings:
        save(scorer, kept)
        run_grid(drawing, drawings, scorer, out)
        return
    drawing.check()
    receipt = out or place(drawing.path, "eval") / f"{drawing.name}.json"
    scorer.check_receipt(receipt)
    save(scorer, kept)
    drawing.write(drawing.folder)
    scorer.score(drawing.folder, receipt)


def save(scorer: Scorer, file: Path | None) -> None:
    """Keep the reference's statistics where that was asked for."""
    if file is not None:
        scorer.save_statistics(file)


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
    if args.save_statistics and Path(args.save_statistics).suffix != ".npz":
        raise UserError(f"--save-statistics {args.save_statistics} could not be read again: name a file ending in .npz")
    if args.save_statistics and os.path.realpath(args.save_statistics) == os.path.realpath(args.reference):
        raise UserError(f"--save-statistics {args.save_statistics} is the reference itself: name another file")
    if args.grid is not None and args.out and Path(args.out).suffix != ".json":
        raise UserError(f"--out {args.out} is not where a grid goes, with a table and a plot beside: write a .json")
