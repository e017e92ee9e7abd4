"""Files that nobody should trust: what they claim is held against what they are, before anything is loaded."""

import io
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mixar.data.image_batches import read_images
from mixar.errors import UserError
from mixar.evaluation.scores import Statistics

pytestmark = pytest.mark.slow  # as a whole: trainings, compilers or many bytes


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def write(file: Path, **members: tuple[tuple[int, ...], str, int]) -> Path:
    """An npz of zeros: a member's shape and type as it claims them, and how many bytes follow."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (shape, descr, size) in members.items():
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
            with archive.open(f"{name}.npy", "w") as member:
                member.write(header.getvalue())
                for _ in range(0, size, 1 << 24):
                    member.write(bytes(min(size, 1 << 24)))
    return file


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"arr_0": ((10**9, 512, 512, 3), "|u1", 1000)}, "not as long as its shape"),
        ({"arr_0": ((20, 2048, 8192, 3), "|u1", 20 * 2048 * 8192 * 3)}, "would grow from"),
        ({"arr_0": ((2, 8, 8, 3), "|u1", 384), "arr_1": ((2, 1 << 26), "<i8", 1 << 30)}, "would grow from"),
        ({"arr_0": ((2, 8, 8, 3), "|u1", 384), "arr_1": ((10**12,), "<i8", 16)}, "not as long as its shape"),
        ({"arr_0": ((2, 8, 8, 3), "|u1", 384), "arr_1": ((3,), "<i8", 24)}, "2 labels are expected"),
        ({"arr_0": ((2, 8, 8, 3), "|u1", 384), "arr_1": ((2,), "<f8", 16)}, "2 labels are expected"),
        ({"mu\x1b[31m\nforged": ((2,), "<f8", 16)}, r"holds mu\\x1b\[31m\\nforged: images"),
    ],
)
def test_images_that_are_not_what_they_claim(tmp_path, members, says) -> None:
    file = write(tmp_path / "bomb.npz", **members)
    assert file.stat().st_size < 2 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=says):
        list(read_images(file))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"mu": ((2048,), "<f8", 16384), "sigma": ((10**6, 10**6), "<f8", 100)}, "not as long as its shape"),
        ({"mu": ((2048,), "<f8", 16384), "sigma": ((8192, 8192), "<f8", 1 << 29)}, "would grow from"),
        ({"mu": ((4,), "<f8", 32), "sigma": ((4, 5), "<f8", 160)}, "expected numbers"),
    ],
)
def test_statistics_that_are_not_what_they_claim(tmp_path, members, says) -> None:
    with pytest.raises(UserError, match=says):
        Statistics.load(write(tmp_path / "bomb.npz", **members))


def test_nothing_in_a_file_runs(tmp_path) -> None:
    trap = np.array([Trap(tmp_path / "sprung")], dtype=object)
    np.savez(tmp_path / "images.npz", arr_0=trap)
    np.savez(tmp_path / "labels.npz", arr_0=np.zeros((1, 8, 8, 3), np.uint8), arr_1=trap)
    np.savez(tmp_path / "statistics.npz", mu=trap, sigma=trap)
    np.savez(tmp_path / "label.npz", mu=np.zeros(2), sigma=np.eye(2), n=1, digest="", extractor=trap)
    for read, name in ((read_images, "images"), (read_images, "labels"), (Statistics.load, "statistics"),
                       (Statistics.load, "label")):  # fmt: skip
        with pytest.raises(UserError, match="Python objects"):
            read(tmp_path / f"{name}.npz")
    assert not (tmp_path / "sprung").exists()


def test_images_that_would_be_read_wrongly(tmp_path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), np.uint8)
    np.savez(tmp_path / "columns.npz", np.asfortranarray(images))
    with pytest.raises(UserError, match="Fortran order"):
        list(read_images(tmp_path / "columns.npz"))
    np.savez(tmp_path / "unlabelled.npz", images, np.array([0, -1, 2, 3]))
    with pytest.raises(UserError, match="from 0 on"):
        read_images(tmp_path / "unlabelled.npz")
    np.savez(tmp_path / "flipped.npz", images)
    content = bytearray((tmp_path / "flipped.npz").read_bytes())
    content[200] ^= 1  # among the pixels
    (tmp_path / "flipped.npz").write_bytes(content)
    with pytest.raises(UserError, match="broken file"):
        list(read_images(tmp_path / "flipped.npz"))
    np.savez(tmp_path / "nan.npz", mu=np.full(2048, np.nan), sigma=np.eye(2048))
    with pytest.raises(UserError, match="not finite"):
        Statistics.load(tmp_path / "nan.npz")
