"""Generate images from a run directory or an export folder."""

import argparse
from pathlib import Path

import torch
from torchvision.io import read_image
from torchvision.utils import save_image

from mixar.codecs import from_bytes
from mixar.errors import UserError
from mixar.files import replacing
from mixar.verbs.drawing import RECORD, Drawing
from mixar.verbs.process import check_writable

GRID = 64  # images on a grid at most


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
        save_image(from_bytes(images), part, nrow=8, format="PNG")
