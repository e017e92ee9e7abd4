"""Generate images from a run directory or an export folder."""

import argparse
from pathlib import Path

import torch
from torchvision.io import read_image
from torchvision.utils import save_image

from mixar.codecs import from_bytes
from mixar.errors import UserError
from mixar.files import check_writable, replacing
from mixar.sampling.record import RECORD
from mixar.sampling.sample_set import SampleSet
from mixar.sampling_flags import as_flag, request, spelling

GRID = 64  # images in a grid at most


def run(args: argparse.Namespace) -> None:
    if args.out:
        check_writable(Path(args.out, RECORD))  # before models are loaded
    with spelling(as_flag):
        samples = SampleSet.open(args.path, **request(args))
        out = Path(args.out) if args.out else samples.folder
        grid = out.with_name(f"{out.name}-grid.png")  # beside the samples: among them, it would be scored as one
        if args.grid:
            check_writable(grid)
        files = [samples.write_npz(out)] if args.npz else samples.write(out)
    if args.grid:
        draw_grid(files[:GRID], grid)
        print(f"grid: {grid}")
    written = files[0] if args.npz else out
    print(f"{samples.count} images: {written}")
    print(f"score them: mixar evaluate --samples {written} --reference <images or statistics>")


def draw_grid(files: list[Path], grid: Path) -> None:
    """Show PNGs in one picture, eight per row. UserError for one that is broken or of another size."""
    try:
        images = torch.stack([read_image(str(file)) for file in files])
    except RuntimeError as error:
        raise UserError(
            f"a PNG in {files[0].parent} has changed since it was written ({str(error).splitlines()[0]}): remove it, "
            "and the same command writes it again"
        ) from None
    with replacing(grid) as part:
        save_image(from_bytes(images), part, nrow=8, format="PNG")
