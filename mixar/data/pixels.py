"""Image files as 8-bit RGB, as a viewer shows them, and the crop of every image."""

from pathlib import Path

import numpy as np
from PIL import Image, features

from mixar.errors import UserError

# the usual formats of datasets; some others of Pillow's run programs, and some accept any bytes as an image
SUFFIXES = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".webp": "WEBP", ".bmp": "BMP",
    ".gif": "GIF", ".tif": "TIFF", ".tiff": "TIFF", ".jp2": "JPEG2000", ".ppm": "PPM", ".pgm": "PPM", ".pbm": "PPM",
    ".pnm": "PPM", **({".avif": "AVIF"} if features.check("avif") else {}),
}  # fmt: skip
FORMATS = sorted(set(SUFFIXES.values()))
DECODING = "turned by EXIF, over white, 16 bits scaled"  # what `read_rgb` does beyond Pillow; recorded in shards

ORIENTATION, BITS, PHOTOMETRIC = 0x0112, 258, 262  # of EXIF and TIFF
_TURNS = {  # EXIF's orientations
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
LONGEST = 16  # long side in short sides: a thinner image is cut to this before it is enlarged


class BrokenImageError(UserError):
    """An image that cannot be decoded."""


def read_rgb(path: Path) -> Image.Image:
    """The image in a file as 8-bit RGB: turned by its EXIF, and over white where it is transparent.

    16-bit grey and float grey from 0 to 1 are scaled to 8 bits. An animation gives its first frame.

    Raises:
        BrokenImageError: a file that cannot be read or decoded, or whose range of values is unknown.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            turn = _TURNS.get(orientation(image))
            rgb = to_rgb(image)
            return rgb if turn is None else rgb.transpose(turn)
    except Exception as error:  # on forged files, decoders raise errors of all kinds, even MemoryError
        reason = str(error) or type(error).__name__
        raise BrokenImageError(f"image {path} cannot be read ({reason}): replace it or remove it") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image as 8-bit RGB, over white where it is transparent.

    Raises:
        ValueError: grey values of an unknown range.
    """
    if image.mode.startswith(("I", "F")):
        grey = _eight_bits(image)
        if "transparency" in image.info:  # one of the grey values
            grey[np.asarray(image) == image.info["transparency"]] = 255
        image = Image.fromarray(grey)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def orientation(image: Image.Image) -> int:
    """The orientation number of an image's EXIF; 1, for upright, where the EXIF is missing or broken."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # viewers show such images as they are
        return 1


def _eight_bits(image: Image.Image) -> np.ndarray:
    """16-bit or float grey as uint8 [H, W]."""
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I" and tags:  # in other formats, this mode holds 16 bits
        raise ValueError("it has signed or 32-bit integers, whose white is unknown: save it with 8 or 16 bits")
    top = 1 if image.mode == "F" else 2 ** tags.get(BITS, (16,))[0] - 1
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= top:  # NaN fails too
        raise ValueError(f"its values go from {low:g} to {high:g}, but 0 for black to {top} for white is expected")
    grey = np.rint(values * (255 / top)).astype(np.uint8)
    return 255 - grey if tags.get(PHOTOMETRIC) == 0 else grey  # 0 is white there, which Pillow sees to in 8 bits only


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: halve by box filter while the short side is at least 2 * `size`, bicubic to `size`, crop.

    An image that has to be enlarged, and whose sides differ by more than a factor of `LONGEST`, is first cut to its
    middle, which saves gigabytes.
    """
    short = min(image.size)
    if short < size and max(image.size) > LONGEST * short:
        # the same at both ends, so that the centre stays
        cut = [(side - LONGEST * short) // 2 if side > LONGEST * short else 0 for side in image.size]
        image = image.crop((cut[0], cut[1], image.width - cut[0], image.height - cut[1]))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
