"""A preview of what `prepare` would make of a set of images, from their headers."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mixar.config import DataConfig
from mixar.data.image_set import ImageSet
from mixar.data.pixels import FORMATS, orientation
from mixar.errors import printable

THREADS = 16  # they wait for the disk


def survey(images: ImageSet, config: DataConfig) -> str:
    """Classes with their counts, sizes, modes, and images that would be skipped, as lines of text.

    Only headers are read: a file that is damaged further on is found when it is decoded.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        headers = list(pool.map(_header, images.items))
    read = [header for header in headers if isinstance(header, tuple)]
    broken = [f"{key} ({header})" for key, header in zip(images.keys, headers) if isinstance(header, str)]
    modes, sizes, turned, clear = zip(*read) if read else ((), (), (), ())
    counts = Counter(images.labels)
    lines = [f"{'label':>7}{'images':>10}  class"]
    lines += [f"{label:>7}{counts[label]:>10}  {printable(name)}" for label, name in enumerate(images.classes)]
    lines += [f"{len(images)} images of {len(images.classes)} classes in {config.images}"]
    if len(images.classes) != config.classes:
        lines += [f"the config is for {config.classes} classes: write data.classes={len(images.classes)}"]
    if read:
        small = sum(min(size) < config.image_size for size in sizes)
        smallest, largest = (f"{width}x{height}" for width, height in (min(sizes, key=_area), max(sizes, key=_area)))
        lines += [
            f"sizes: {smallest} to {largest}, {small} to be enlarged to data.image_size={config.image_size}",
            "modes: " + ", ".join(f"{count} {mode}" for mode, count in Counter(modes).most_common()),
            f"turned by their EXIF: {sum(turned)}; transparent, laid over white: {sum(clear)}",
        ]
    lines += [images.left_out() or "nothing is left out"]
    if broken:
        lines += [printable(f"{len(broken)} cannot be read and would be skipped: {', '.join(broken[:5])}")]
    if len(broken) > config.max_broken * len(images):
        lines += [f"that is more than data.max_broken={config.max_broken:g} of the set: prepare would stop"]
    return "\n".join(lines)


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _header(item: Path | NDArray[np.uint8]) -> tuple[str, tuple[int, int], bool, bool] | str:
    """Mode, (width, height), whether it is turned, whether it is transparent; or why it cannot be read."""
    if isinstance(item, np.ndarray):
        return "L" if item.ndim == 2 else "RGB", (item.shape[1], item.shape[0]), False, False
    try:
        with Image.open(item, formats=FORMATS) as image:
            shown = image.format != "PNG" or "exif" in image.info  # else Pillow decodes the image to find it
            return image.mode, image.size, shown and orientation(image) != 1, image.has_transparency_data
    except Exception as error:  # on forged files, decoders raise errors of all kinds
        return str(error) or type(error).__name__
