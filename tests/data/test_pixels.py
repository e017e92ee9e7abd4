"""Files as cameras, scanners and strangers write them."""

import multiprocessing
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from mixar.data.pixels import BrokenImageError, adm_crop, read_rgb

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (5, 8, 3), np.uint8)


def saved(path: Path, image: Image.Image, **options) -> np.ndarray:
    """What is read of `image` once it is saved."""
    image.save(path, **options)
    return np.asarray(read_rgb(path))


def tiff(bits: int, size: tuple[int, int], data: bytes, offset_kind: int = 4, photometric: int = 1) -> bytes:
    """A grey TIFF as its format's specification has it."""
    at = 8 + 2 + 12 * 8 + 4
    tags = [(256, 4, size[0]), (257, 4, size[1]), (258, 3, bits), (259, 3, 1), (262, 3, photometric),
            (273, offset_kind, at), (278, 4, size[1]), (279, 4, len(data))]  # fmt: skip
    fields = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + fields + bytes(4) + data


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bits_become_8(tmp_path, suffix):
    grey = np.linspace(0, 65535, 300).reshape(10, 30).astype(np.uint16)
    read = saved(tmp_path / f"a.{suffix}", Image.fromarray(grey))
    assert np.array_equal(read, np.repeat(np.rint(grey / 257)[..., None], 3, -1))


def test_12_bits_of_a_tiff_become_8(tmp_path):
    grey = [0, 4095, 2048, 16]
    (tmp_path / "a.tif").write_bytes(tiff(12, (4, 1), int("".join(f"{v:012b}" for v in grey), 2).to_bytes(6, "big")))
    assert np.asarray(read_rgb(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 255, 128, 1]


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_whose_zero_is_white(tmp_path, bits):
    top = 2**bits - 1
    data = np.array([0, top, top // 5], f"<u{bits // 8}").tobytes()
    (tmp_path / "a.tif").write_bytes(tiff(bits, (3, 1), data, photometric=0))
    assert np.asarray(read_rgb(tmp_path / "a.tif"))[0, :, 0].tolist() == [255, 0, 204]


def test_a_transparent_grey_of_16_bits_is_white(tmp_path):
    read = saved(tmp_path / "a.png", Image.fromarray(np.uint16([[0, 30000, 65535]])), transparency=0)
    assert read[0, :, 0].tolist() == [255, 117, 255]


def test_floats_from_0_to_1_are_black_to_white(tmp_path):
    grey = RNG.random((6, 7), np.float32)
    read = saved(tmp_path / "a.tiff", Image.fromarray(grey))
    assert np.array_equal(read[..., 0], np.rint(grey * 255))


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (np.float32([[0, 200]]), "from 0 to 200, but 0 for black to 1 for white"),
        (np.float32([[-1, 1]]), "from -1 to 1"),
        (np.float32([[0, np.nan]]), "from nan"),
        (np.int32([[0, 200]]), "32-bit integers"),
    ],
)
def test_values_of_an_unknown_range_are_refused(tmp_path, values, why):
    with pytest.raises(BrokenImageError, match=why):
        saved(tmp_path / "a.tiff", Image.fromarray(values))


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_stand_upright(tmp_path, suffix, orientation):
    image, exif = Image.fromarray(PIXELS), Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    read = saved(tmp_path / f"a.{suffix}", image, exif=exif, **options)
    image.getexif()[0x0112] = orientation
    assert np.array_equal(read, np.asarray(ImageOps.exif_transpose(image)))


def test_a_broken_exif_turns_nothing(tmp_path):
    assert np.array_equal(saved(tmp_path / "a.png", Image.fromarray(PIXELS), exif=b"Exif\0\0MM\0*\xff\xff"), PIXELS)


def test_what_is_transparent_lies_on_white(tmp_path):
    alpha = np.array([[0, 255, 51]], np.uint8)
    red = np.dstack([np.full_like(alpha, 255), np.zeros_like(alpha), np.zeros_like(alpha), alpha])
    expected = [[[255, 255, 255], [255, 0, 0], [255, 204, 204]]]
    assert saved(tmp_path / "a.png", Image.fromarray(red)).tolist() == expected
    grey = saved(tmp_path / "b.png", Image.fromarray(np.dstack([np.zeros_like(alpha), alpha]), "LA"))
    assert grey[..., 0].tolist() == [[255, 0, 204]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    for suffix in ("png", "gif"):
        assert saved(tmp_path / f"c.{suffix}", palette, transparency=0).tolist() == [[[255, 255, 255], [0, 0, 255]]]
    colours = Image.fromarray(np.uint8([[[255, 0, 0], [0, 0, 255]]]))
    assert saved(tmp_path / "d.png", colours, transparency=(255, 0, 0)).tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_forged_files_are_broken_images(tmp_path):
    forged = {
        "type.tif": tiff(8, (4, 2), bytes(range(1, 9)), offset_kind=10),  # a TypeError in Pillow
        "huge.ppm": b"P6 60000 60000 255\n" + bytes(100),
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",  # Pillow would run ghostscript
        "empty.gif": b"",
    }
    for name, data in forged.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BrokenImageError, match=f"{name} cannot be read"):
            read_rgb(tmp_path / name)


def crop_in_little_memory(image: Image.Image) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)
    assert adm_crop(image, 256).size == (256, 256)


@pytest.mark.parametrize("size", [(2, 20000), (20000, 2)])
def test_thin_images_need_little_memory(size):
    process = multiprocessing.get_context("fork").Process(target=crop_in_little_memory, args=[Image.new("RGB", size)])
    process.start()
    process.join()
    assert process.exitcode == 0


def test_the_middle_of_a_thin_image_is_the_same():
    pixels = RNG.integers(0, 256, (401, 2, 3), np.uint8)
    whole = Image.fromarray(pixels).resize((16, 3208), Image.Resampling.BICUBIC).crop((0, 1596, 16, 1612))
    assert np.array_equal(adm_crop(Image.fromarray(pixels), 16), whole)
