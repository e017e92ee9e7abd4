"""Collections of images, read as uint8 batches: a folder, a built-in set, or the npz of ADM's evaluation."""

import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from mixar.config import DataConfig
from mixar.data.images import adm_crop, open_images
from mixar.data.npz import Npz, printable
from mixar.errors import UserError
from mixar.files import replacing


@dataclass(frozen=True)
class Images:
    """Images of one size. Iterating, as often as one likes, gives uint8 [B, 3, H, W]; the length is in batches.

    Raises, on iterating:
        UserError: an unreadable image, or one of another size than the first.
    """

    count: int
    labels: Tensor | None  # int64 [count]
    names: list[str] | None  # in a folder, the path of each image there
    read: Callable[[], Iterator[tuple[str, np.ndarray]]]  # each image's name and uint8 [H, W, 3]
    batch: int

    def __len__(self) -> int:
        return -(-self.count // self.batch)

    def __iter__(self) -> Iterator[Tensor]:
        images, shape = self.read(), None
        while chunk := list(islice(images, self.batch)):
            for name, image in chunk:
                shape = shape or image.shape
                if image.shape != shape:
                    raise UserError(
                        f"{printable(name)} is {image.shape[1]}x{image.shape[0]}, the first image "
                        f"{shape[1]}x{shape[0]}: scores need one size, give the one to crop all of them to"
                    )
            yield rearrange(torch.from_numpy(np.stack([image for _, image in chunk])), "b h w c -> b c h w")


def read_images(source: str | Path, size: int | None = None, batch: int = 64) -> Images:
    """The images in an npz of ADM's form, in a folder, or in a built-in set.

    A folder's are sorted by path, sub-folders included; where these are classes, their labels come along.

    Args:
        size: crop to this side as ADM does; None takes the images as they are. An npz is never cropped.
        batch: images a batch.

    Raises:
        UserError: no such collection, or nothing in it.
    """
    if Path(source).suffix == ".npz":
        return _open_npz(Path(source), batch)
    found = open_images(DataConfig(images=str(source), classes=sys.maxsize))

    def read() -> Iterator[tuple[str, np.ndarray]]:
        for index, key in enumerate(found.keys):
            image = found.load(index)
            yield key, np.asarray(image if size is None else adm_crop(image, size))

    labels = torch.tensor(found.labels) if len(found.classes) > 1 else None
    return Images(len(found), labels, found.keys, read, batch)


def _open_npz(path: Path, batch: int) -> Images:
    npz = Npz(path, "images")
    if "arr_0" not in npz.names:
        raise UserError(
            f"{path} holds {printable(', '.join(npz.names))}: images are expected in `arr_0`, uint8 [n, H, W, 3]"
        )
    shape, dtype = npz.header("arr_0")
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        raise UserError(f"`arr_0` of {path} is {dtype} {list(shape)}: images are expected, uint8 [n, H, W, 3]")

    def read() -> Iterator[tuple[str, np.ndarray]]:
        return ((f"{path}[{index}]", image) for index, image in enumerate(npz.rows("arr_0")))

    return Images(shape[0], _labels(npz, shape[0]), None, read, batch)


def _labels(npz: Npz, count: int) -> Tensor | None:
    if "arr_1" not in npz.names:
        return None
    shape, dtype = npz.header("arr_1")
    labels = npz.load("arr_1") if shape == (count,) and dtype.kind in "iu" else np.array([-1])
    if labels.min() < 0:
        raise UserError(f"`arr_1` of {npz.path} is {dtype} {list(shape)}: {count} labels are expected, from 0 on")
    return torch.from_numpy(labels.astype(np.int64))


def write_npz(path: str | Path, batches: Iterable[Tensor], count: int, labels: Tensor | None = None) -> None:
    """Write `count` images, from batches uint8 [B, 3, H, W], in the form of ADM's evaluation, a batch at a time.

    The npz holds `arr_0` uint8 [n, H, W, 3] and, with `labels` int [n], `arr_1`; no time, so the same images give the
    same bytes.

    Raises:
        UserError: nothing can be written there.
    """
    written = 0
    with replacing(path) as part, zipfile.ZipFile(part, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            for images in batches:
                rows = rearrange(images, "b c h w -> b h w c").cpu().contiguous().numpy()
                if written == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *rows.shape[1:])}
                    np.lib.format.write_array_header_1_0(member, header)
                member.write(rows.tobytes())
                written += len(rows)
        if labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
                np.lib.format.write_array(member, labels.cpu().long().numpy())
        assert written == count, f"{written} images came, {count} were announced"
