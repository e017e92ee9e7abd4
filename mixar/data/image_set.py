"""Labelled images in a fixed order, and their split into training and held-out images."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mixar import rng
from mixar.data.pixels import read_rgb
from mixar.errors import printable
from mixar.rng import Stream


@dataclass(frozen=True)
class ImageSet:
    """Labelled images in a fixed order.

    Attributes:
        classes: class names; label i is `classes[i]`.
        labels: one per image.
        keys: one per image, unique: the path below the folder, or the index in a built-in set.
        items: one per image, decoded by `load`: a path, or a uint8 array [H, W] or [H, W, 3].
        skipped: names in the folder that are left out, by reason.
    """

    classes: list[str]
    labels: list[int]
    keys: list[str]
    items: Sequence[Path | NDArray[np.uint8]]
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over classes, keys and labels; not over pixels, since reading all files would take hours."""
        return hashlib.sha256(repr((self.classes, self.keys, self.labels)).encode()).hexdigest()[:16]

    def load(self, i: int) -> Image.Image:
        """Image `i` in RGB, as `read_rgb` gives it.

        Raises:
            BrokenImageError: a file that cannot be read or decoded.
        """
        item = self.items[i]
        return Image.fromarray(item).convert("RGB") if isinstance(item, np.ndarray) else read_rgb(item)

    def subset(self, indices: Sequence[int]) -> "ImageSet":
        """The images at `indices`, in that order, with all classes."""
        return replace(
            self,
            labels=[self.labels[i] for i in indices],
            keys=[self.keys[i] for i in indices],
            items=[self.items[i] for i in indices],
        )

    def left_out(self) -> str:
        """A line about the `skipped` names, with an example for each reason; empty where there are none."""
        kinds = self.skipped.items()
        parts = [f"{len(keys)} {reason} ({keys[0]}{', ...' * (len(keys) > 1)})" for reason, keys in kinds]
        return printable(f"left out: {'; '.join(parts)}") if parts else ""


def split(images: ImageSet, held_out: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """(train, held): `held_out` images are held out, from each class its share. Depends on the arguments alone."""
    chance = rng.uniform(seed, Stream.DATA_ORDER, torch.arange(len(images))).numpy()
    labels = np.asarray(images.labels)
    quantile = np.empty(len(images))  # of each image in a random order of its class: the lowest ones are held out
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        quantile[members] = (chance[members].argsort().argsort() + 0.5) / len(members)
    order = np.lexsort((chance, quantile))
    return images.subset(np.sort(order[held_out:]).tolist()), images.subset(np.sort(order[:held_out]).tolist())
