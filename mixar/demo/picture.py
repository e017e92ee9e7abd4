"""The demo's picture: rows of images, a caption before each."""

from pathlib import Path

import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from mixar.files import replacing

SCALE, GAP, CAPTION = 2, 4, 210  # enlargement, and pixels between images and of the captions' column
DPI = 100


def draw_rows(path: Path, rows: dict[str, Tensor]) -> None:
    """Write a PNG of `rows`, from caption to uint8 images [k, 3, H, W]. UserError where it cannot be written."""
    from matplotlib.figure import Figure  # needed for pictures alone

    large = (repeat(images, "k c h w -> k c (h a) (w b)", a=SCALE, b=SCALE) for images in rows.values())
    cells = [rearrange(F.pad(images, (0, GAP, 0, GAP), value=255), "k c h w -> h (k w) c") for images in large]
    height, width = cells[0].shape[:2]
    total_height, total_width = GAP + height * len(rows), CAPTION + width
    figure = Figure((total_width / DPI, total_height / DPI), dpi=DPI)
    for row, (caption, cell) in enumerate(zip(rows, cells)):
        bottom = height * (len(rows) - 1 - row)
        figure.figimage(cell.numpy(), CAPTION, bottom)  # pixel for pixel
        middle = bottom + (height + GAP) / 2
        figure.text((CAPTION - 12) / total_width, middle / total_height, caption, size=11, ha="right", va="center")
    with replacing(path) as part:
        figure.savefig(part, format="png")
