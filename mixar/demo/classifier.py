"""The training of a small classifier, in whose features the demo is scored."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mixar.errors import UserError
from mixar.evaluation.classifier import Classifier, ClassifierConfig

TURNS = 4  # by 0, 90, 180 and 270 degrees


def train_classifier(
    images: Tensor,
    labels: Tensor,
    classes: int,
    *,
    steps: int = 400,
    width: int = 24,
    reach: int | None = None,
    flip: bool = False,
    batch: int = 64,
    lr: float = 3e-3,
    held_out: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Classifier, float]:
    """Train a classifier of the set; returns it with its accuracy on held-out images.

    Where all images have one class, it learns instead by how much an image was rotated (Gidaris et al. 2018): a single
    label would teach it nothing, and distances in its features would mean nothing.

    The time depends on `steps`, not on the size of the set. By default the only augmentation is a shift by up to a
    sixteenth of the side, which suits objects as well as digits, whose mirror images are other signs.

    Args:
        images: uint8 [n, 3, H, W], square.
        labels: int [n], in 0..classes-1.
        width: channels of the first stage; the second has twice, the later ones four times as many.
        reach: most pixels of a shift; default: a sixteenth of the side.
        flip: mirror half of the images.
        held_out: share of the images that is kept from training.
        seed: of the split, the initial weights, the batches, the shifts and the mirroring.

    Raises:
        UserError: too few images to hold some out, or a label out of range.
    """
    n_test = int(held_out * len(images))
    if n_test == 0:
        raise UserError(f"{len(images)} images are too few to train a classifier and hold {held_out:.0%} of them out")
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UserError(f"labels from {labels.min()} to {labels.max()}: {classes} classes need 0 to {classes - 1}")

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    test, train = order[:n_test], order[n_test:]
    rotations = bool((labels == labels[0]).all())
    if rotations:
        images, labels = _turned(images)
        test, train = (torch.cat([rows + turn * len(order) for turn in range(TURNS)]) for rows in (test, train))
    model = _new(TURNS if rotations else classes, images.shape[-1], width, seed, rotations).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)

    model.train()
    reach = images.shape[-1] // 16 if reach is None else reach
    for _ in range(steps):
        rows = train[torch.randint(len(train), (batch,), generator=generator)]
        shifts = torch.randint(-reach, reach + 1, (2, batch), generator=generator)
        seen = _shift(images[rows], shifts)
        if flip:
            seen = torch.where(torch.rand(batch, 1, 1, 1, generator=generator) < 0.5, seen.flip(-1), seen)
        logits = model(seen.to(device))
        loss = F.cross_entropy(logits, labels[rows].long().to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    return model.eval(), _accuracy(model, images[test], labels[test], device)


@torch.no_grad()
def _accuracy(model: Classifier, images: Tensor, labels: Tensor, device: torch.device | str) -> float:
    found = torch.cat([model(some.to(device)).argmax(1).cpu() for some in images.split(256)])
    return (found == labels).double().mean().item()


def _turned(images: Tensor) -> tuple[Tensor, Tensor]:
    """Square images [n, 3, H, W] in each of four rotations, [4n, 3, H, W], and the rotation's index [4n]."""
    turns = [images.rot90(turn, (2, 3)) for turn in range(TURNS)]
    return torch.cat(turns), torch.arange(TURNS).repeat_interleave(len(images))


def _new(classes: int, image_size: int, width: int, seed: int, rotations: bool) -> Classifier:
    # about 4x4 cells remain at any image size, so that each sees a good part of an object
    stages = max(3, round(math.log2(image_size / 4)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = [width, 2 * width] + [4 * width] * (stages - 2)
        return Classifier(ClassifierConfig(classes, image_size, widths, rotations=rotations))


def _shift(images: Tensor, shifts: Tensor) -> Tensor:
    """Images [B, 3, H, W], each moved by its column of `shifts` [2, B] (down, right), with edges repeated."""
    rows = (torch.arange(images.shape[2]) - shifts[0, :, None]).clamp(0, images.shape[2] - 1)
    columns = (torch.arange(images.shape[3]) - shifts[1, :, None]).clamp(0, images.shape[3] - 1)
    pixels = images[torch.arange(len(images))[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return rearrange(pixels, "b h w c -> b c h w")
