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
                        f"{name} is {image.shape[1]}x{image.shape[0]}, the first image {shape[1]}x{shape[0]}: "
                        "scores need one size, give the one to crop all of them to"
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

    return Images(len(found), torch.tensor(found.labels) if len(found.classes) > 1 else None, read, batch)


def _open_npz(path: Path, batch: int) -> Images:
    if not zipfile.is_zipfile(path):
        raise UserError(f"no images at {path}, or a broken file: name an npz that holds `arr_0`, or a folder of images")
    with np.load(path) as npz:
        names = npz.files
        labels = torch.from_numpy(npz["arr_1"]).long() if "arr_1" in names else None
    if "arr_0" not in names:
        raise UserError(f"{path} holds {', '.join(names)}: images are expected in `arr_0`, uint8 [n, H, W, 3]")
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
        shape, dtype = _header(member)
    if dtype != np.uint8 or len(shape) != 4 or shape[0] == 0 or shape[-1] != 3:
        raise UserError(f"`arr_0` of {path} is {dtype} {list(shape)}: images are expected, uint8 [n, H, W, 3]")

    def read() -> Iterator[tuple[str, np.ndarray]]:
        # row by row: numpy would load the 10 GB of 50,000 images of 256x256 at once
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            _header(member)
            for index in range(shape[0]):
                row = np.frombuffer(member.read(int(np.prod(shape[1:]))), np.uint8)
                yield f"{path}[{index}]", row.reshape(shape[1:])

    return Images(shape[0], labels, read, batch)


def _header(member) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(member)
    return shape, dtype


def write_npz(path: str | Path, batches: Iterable[Tensor], count: int, labels: Tensor | None = None) -> None:
    """Write `count` images, from batches uint8 [B, 3, H, W], in the form of ADM's evaluation, a batch at a time.

    The npz holds `arr_0` uint8 [n, H, W, 3] and, with `labels` int [n], `arr_1`.

    Raises:
        UserError: nothing can be written there.
    """
    written = 0
    with replacing(path) as part, zipfile.ZipFile(part, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            for images in batches:
                rows = rearrange(images, "b c h w -> b h w c").cpu().contiguous().numpy()
                if written == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *rows.shape[1:])}
                    np.lib.format.write_array_header_1_0(member, header)
                member.write(rows.tobytes())
                written += len(rows)
        if labels is not None:
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, labels.cpu().long().numpy())
        assert written == count, f"{written} images came, {count} were announced"
