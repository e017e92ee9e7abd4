"""Generate images from a run directory or an export folder.

    mixar sample runs/mixar_l --labels 207,360 --count 16 --grid
    mixar sample runs/mixar_l --count 50000 --npz

PNGs are named <seed>-<label>.png. Image i is drawn from seed + i alone: the batch, the count and the order of the
others do not change it. The same command goes on where it stopped.
"""

import argparse
from pathlib import Path

import torch
from torchvision.io import read_image
from torchvision.utils import save_image

from mixar.errors import UserError
from mixar.files import replacing
from mixar.verbs.drawing import NPZ, RECORD, Drawing, add_sampling_arguments
from mixar.verbs.process import check_writable

GRID = 64  # images on a grid at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="run directory (its newest export) or export folder")
    add_sampling_arguments(parser, "one of each class in turn")
    parser.add_argument("--out", metavar="DIR", help="default: PATH/samples/<seed>-<count>, beside PATH for an export")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--grid", action="store_true", help=f"also show the first {GRID} in one picture, <out>-grid.png")
    form.add_argument("--npz", action="store_true", help=f"write {NPZ} in ADM's form instead of PNGs")


def run(args: argparse.Namespace) -> None:
    if args.out:
        check_writable(Path(args.out, RECORD))  # before models are loaded
    drawing = Drawing.of(args)
    out = Path(args.out) if args.out else drawing.folder
    grid = out.with_name(f"{out.name}-grid.png")  # beside the samples, or it would be scored as one
    if args.grid:
        check_writable(grid)
    if args.npz:
        written = drawing.write_npz(out)
    else:
        files, written = drawing.write(out), out
        if args.grid:
            draw_grid(files[:GRID], grid)
            print(f"grid: {grid}")
    print(f"{drawing.count} images: {written}")
    print(f"score them: mixar evaluate --samples {written} --reference <images or statistics>")


def draw_grid(files: list[Path], grid: Path) -> None:
    """Show PNGs in one picture, eight in a row. UserError for one that is broken or of another size."""
    try:
        images = torch.stack([read_image(str(file)) for file in files])
    except RuntimeError as error:
        raise UserError(
            f"a PNG in {files[0].parent} is not as it was drawn ({str(error).splitlines()[0]}): remove it, and the "
            "same command draws it again"
        ) from None
    with replacing(grid) as part:
        save_image(images / 255, part, nrow=8, format="PNG")
