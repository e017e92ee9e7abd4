"""Image sets read as uint8 batches: a folder, a built-in set, or an npz in the form of ADM's evaluation."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from mixar.config import DataConfig
from mixar.data.images import adm_crop, open_images
from mixar.data.npz import Npz
from mixar.errors import UserError


@dataclass(frozen=True)
class ImageBatches:
    """Images of one size. Every iteration gives all of them as uint8 [B, 3, H, W]; the length is in batches.

    Raises, while iterating:
        UserError: an image that cannot be read, or whose size is not that of the first one.
    """

    count: int
    labels: Tensor | None  # int64 [count]
    names: list[str] | None  # of images in a folder: the path of each below it
    read: Callable[[], Iterator[tuple[str, np.ndarray]]]  # gives the name and uint8 [H, W, 3] of each image
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
                        f"{name} is {image.shape[1]}x{image.shape[0]}, the first image is {shape[1]}x{shape[0]}: "
                        "scores need images of one size, name the size to crop all of them to"
                    )
            yield rearrange(torch.from_numpy(np.stack([image for _, image in chunk])), "b h w c -> b c h w")


def read_images(source: str | Path, size: int | None = None, batch: int = 64) -> ImageBatches:
    """The images in an npz of ADM's form, in a folder, or in a built-in set.

    Images of a folder and its sub-folders are sorted by path; several classes give labels.

    Args:
        size: crop to this side as ADM does; None takes the images as they are. An npz is never cropped.
        batch: images per batch.

    Raises:
        UserError: no such set, or an empty one.
    """
    if Path(source).suffix == ".npz":
        return _open_npz(Path(source), batch)
    found = open_images(DataConfig(images=str(source), classes=sys.maxsize))

    def read() -> Iterator[tuple[str, np.ndarray]]:
        for index, key in enumerate(found.keys):
            image = found.load(index)
            yield key, np.asarray(image if size is None else adm_crop(image, size))

    labels = torch.tensor(found.labels) if len(found.classes) > 1 else None
    return ImageBatches(len(found), labels, found.keys, read, batch)


def _open_npz(path: Path, batch: int) -> ImageBatches:
    npz = Npz(path, "images")
    if "arr_0" not in npz.names:
        raise UserError(f"{path} holds {', '.join(npz.names)}: images are expected in `arr_0`, uint8 [n, H, W, 3]")
    shape, dtype = npz.header("arr_0")
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        raise UserError(f"`arr_0` of {path} is {dtype} {list(shape)}: images are expected, uint8 [n, H, W, 3]")

    def read() -> Iterator[tuple[str, np.ndarray]]:
        return ((f"{path}[{index}]", image) for index, image in enumerate(npz.rows("arr_0")))

    return ImageBatches(shape[0], _labels(npz, shape[0]), None, read, batch)


def _labels(npz: Npz, count: int) -> Tensor | None:
    if "arr_1" not in npz.names:
        return None
    shape, dtype = npz.header("arr_1")
    labels = npz.load("arr_1") if shape == (count,) and dtype.kind in "iu" else np.array([-1])
    if labels.min() < 0:
        raise UserError(f"`arr_1` of {npz.path} is {dtype} {list(shape)}: {count} labels are expected, from 0 on")
    return torch.from_numpy(labels.astype(np.int64))
