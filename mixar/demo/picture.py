"""The demo's picture: rows of images, a caption before each."""

from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mixar.files import replacing

SCALE, GAP, CAPTION = 2, 4, 210  # enlargement, and pixels between images and of the captions' column


def draw_report(path: Path, rows: dict[str, Tensor]) -> None:
    """Write a PNG of `rows`, caption to uint8 images [k, 3, H, W]."""
    k, _, h, w = next(iter(rows.values())).shape
    cell_w, cell_h = w * SCALE + GAP, h * SCALE + GAP
    sheet = Image.new("RGB", (CAPTION + k * cell_w + GAP, len(rows) * cell_h + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for row, (caption, images) in enumerate(rows.items()):
        top = GAP + row * cell_h
        pen.text((CAPTION - 12, top + cell_h // 2), caption, "black", font, anchor="rm")
        for column, pixels in enumerate(rearrange(images, "k c h w -> k h w c").numpy()):
            image = Image.fromarray(np.ascontiguousarray(pixels)).resize(
                (w * SCALE, h * SCALE), Image.Resampling.NEAREST
            )
            sheet.paste(image, (CAPTION + column * cell_w, top))
    with replacing(path) as aside:
        sheet.save(aside, format="PNG")
