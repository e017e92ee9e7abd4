"""What a set of images and a number of minutes make of a demo: the kind of its networks, and how long each trains."""

import io
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mixar.config import Config
from mixar.data.image_set import ImageSet
from mixar.data.pixels import adm_crop
from mixar.errors import UserError
from mixar.metrics import read_metrics
from mixar.train import train

# shares of the minutes, chosen on the photographs of docs/demo.md; what a stage leaves over, the later ones share
SHARES = {
    "classifier": 0.07, "vae": 0.14, "tokenizer": 0.14, "shards": 0.02, "prior": 0.20, "mixar": 0.36, "samples": 0.05,
    "scores": 0.02,
}  # fmt: skip
LEAST = 3.0  # minutes in which every stage sees enough images to be more than noise
START = 6.0  # seconds in which a stage starts, writes its export and ends
PROBE = 40  # steps that measure the pace of a training
SURVEYED = 2000  # images that are looked at
COLOUR = 2.0  # spread of the channels in levels of brightness; below it a set counts as grey
ONE_SIDED = 0.02  # share of the difference between images and their mirrors that all of a class have; 0.22 for digits


@dataclass(frozen=True)
class Survey:
    """What a demo's networks depend on.

    Attributes:
        enlarged: share of the images that are smaller than the demo's.
        colour: mean standard deviation over the channels of a pixel, in levels of brightness from 0 to 255.
        one_sided: the part of the difference between images and their mirrors that the images of a class share, from
            about 0 (a mirrored image is as likely as the image) to 1.
    """

    enlarged: float
    colour: float
    one_sided: float

    @classmethod
    def of(cls, images: ImageSet, size: int) -> "Survey":
        """The survey of up to `SURVEYED` images of a set, evenly chosen, cropped to `size` pixels.

        Raises:
            UserError: all images are alike, or one cannot be read.
        """
        rows = torch.linspace(0, len(images) - 1, min(SURVEYED, len(images))).long().tolist()
        opened = [images.load(row) for row in rows]
        cropped = torch.from_numpy(np.stack([np.asarray(adm_crop(image, size)) for image in opened]))
        pixels = cropped.permute(0, 3, 1, 2).float()
        if pixels.std(0).max() < 1:
            raise UserError(
                f"the {len(images)} images are all alike at {size}x{size} pixels, so that there is nothing to learn: "
                "name a folder of different images"
            )
        small = sum(min(image.size) < size for image in opened) / len(opened)
        return cls(small, pixels.std(1).mean().item(), _one_sided(pixels, torch.tensor(images.labels)[rows]))

    def __str__(self) -> str:
        kind = f"in colour (the channels differ by {self.colour:.1f} of 255)" if self.colour >= COLOUR else "in grey"
        sides = "not mirrored, which would make other images"
        if self.mirrored:
            sides = "mirrored too, since their classes prefer no side"
        small = f"; {self.enlarged:.0%} are enlarged, and will be blurred" if self.enlarged else ""
        return f"{kind}, {sides}{small}"

    @property
    def photographs(self) -> bool:
        """Whether the networks for photographs are taken, rather than those for signs in black and white."""
        return self.colour >= COLOUR or self.mirrored

    @property
    def mirrored(self) -> bool:
        """Whether mirrored images are as good to train on."""
        return self.one_sided < ONE_SIDED


def _one_sided(pixels: Tensor, labels: Tensor) -> float:
    """`Survey.one_sided` of images [n, 3, H, W] with labels [n], without the bias of classes with few images."""
    shared = total = 0.0
    for label in labels.unique():
        odd = (pixels - pixels.flip(-1))[labels == label]
        if len(odd) > 1:
            variance = odd.var(0).mean().item()
            shared += odd.mean(0).square().mean().item() - variance / len(odd)
            total += variance
    return shared / total if total else 0.0


def seconds_of(stage: str, minutes: float, finished: dict[str, float]) -> float:
    """The seconds for `stage` of what the `finished` stages have left of `minutes`, at least `START`."""
    left = {name: share for name, share in SHARES.items() if name not in finished}
    return max(START, (60 * minutes - sum(finished.values())) * SHARES[stage] / sum(left.values()))


def rate_of(count: int, work: Callable[[], object]) -> float:
    """The units per second of `work`, which does `count` of them."""
    begun = time.monotonic()
    work()
    return count / (time.monotonic() - begun)


def pace(cfg: Config) -> float:
    """Images per second of a short training, which is done in a folder beside its own and removed."""
    folder = Path(f"{cfg.run_dir}-pace")
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted demo
    with redirect_stderr(io.StringIO()):  # its log is that of a run that nobody asked for
        train(replace(cfg, run_dir=str(folder), train=replace(cfg.train, log_every=4)))
    seconds = [record["speed/seconds_per_step"] for record in read_metrics(folder)]
    shutil.rmtree(folder)
    return cfg.train.batch / statistics.mean(seconds[2:])  # the first steps are slower
