"""A small image classifier: the feature space in which a set is scored when Inception's weights are out of reach."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mixar.codecs import from_bytes
from mixar.config import section_from_dict
from mixar.errors import UserError
from mixar.weights import loaded, read_export, write_export

KIND = "classifier"
TURNS = 4  # by 0, 90, 180 and 270 degrees


@dataclass
class ClassifierConfig:
    """What a classifier is built from, and stored with."""

    classes: int
    image_size: int
    widths: list[int] = field(default_factory=lambda: [24, 48, 96])  # channels of each stage
    features: int = 64
    rotations: bool = False  # its classes are an image's turns by 90 degrees, not the set's own


class Classifier(nn.Module):
    """Stages of convolution, norm and activation, each halving the side; a mean over what is left of it; an embedding.

    Input: [B, 3, H, W], uint8 or float in [0, 1]. The features [B, F] are the embedding before its activation.
    """

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        stages: list[nn.Module] = []
        for width_in, width in zip([3, *config.widths], config.widths):
            stages += [_conv(width_in, width, stride=2), _conv(width, width)]
        self.stages = nn.Sequential(*stages)
        self.embedding = nn.Linear(config.widths[-1], config.features)
        self.logits = nn.Linear(config.features, config.classes)

    def embed(self, images: Tensor) -> Tensor:
        """float32 [B, F], the features of images [B, 3, H, W]."""
        x = from_bytes(images) if images.dtype == torch.uint8 else images
        return self.embedding(self.stages(2 * x - 1).mean((2, 3)))

    def classify(self, features: Tensor) -> Tensor:
        """Logits [B, classes] of the features [B, F]."""
        return self.logits(F.relu(features))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, 3, H, W]."""
        return self.classify(self.embed(images))


def _conv(width_in: int, width: int, stride: int = 1) -> nn.Module:
    convolution = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


def train_classifier(
    images: Tensor,
    labels: Tensor,
    classes: int,
    *,
    steps: int = 400,
    batch: int = 64,
    lr: float = 3e-3,
    held_out: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Classifier, float]:
    """A classifier of the set, and the share of held-out images that it gets right.

    Where all images are of one class, it learns by how much an image was turned instead (Gidaris et al. 2018): a single
    label would teach it nothing, and distances in its features would mean nothing.

    The time depends on `steps`, not on the size of the set. The only augmentation is a shift by up to a sixteenth of
    the side: it suits digits, where a mirror image is another sign, as well as objects.

    Args:
        images: uint8 [n, 3, H, W], square.
        labels: int [n], in 0..classes-1.
        held_out: share of the images, drawn by `seed`, kept from training.
        seed: of the split, the initial weights, the batches and the shifts.

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
    model = _new(TURNS if rotations else classes, images.shape[-1], seed, rotations).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)

    model.train()
    reach = images.shape[-1] // 16
    for _ in range(steps):
        rows = train[torch.randint(len(train), (batch,), generator=generator)]
        shifts = torch.randint(-reach, reach + 1, (2, batch), generator=generator)
        logits = model(_shift(images[rows], shifts).to(device))
        loss = F.cross_entropy(logits, labels[rows].long().to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    return model.eval(), _share_right(model, images[test], labels[test], device)


@torch.no_grad()
def _share_right(model: Classifier, images: Tensor, labels: Tensor, device: torch.device | str) -> float:
    found = torch.cat([model(some.to(device)).argmax(1).cpu() for some in images.split(256)])
    return (found == labels).double().mean().item()


def _turned(images: Tensor) -> tuple[Tensor, Tensor]:
    """Square images [n, 3, H, W] in each turn, [4n, 3, H, W], and which one it is [4n]."""
    turns = [images.rot90(turn, (2, 3)) for turn in range(TURNS)]
    return torch.cat(turns), torch.arange(TURNS).repeat_interleave(len(images))


def _new(classes: int, image_size: int, seed: int, rotations: bool) -> Classifier:
    # about 4x4 cells are left at any image size, so that each sees a good part of an object
    stages = max(3, round(math.log2(image_size / 4)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(ClassifierConfig(classes, image_size, [24, 48] + [96] * (stages - 2), rotations=rotations))


def _shift(images: Tensor, shifts: Tensor) -> Tensor:
    """Each image of [B, 3, H, W] moved by its column of `shifts` [2, B] (down, right), its edges repeated."""
    rows = (torch.arange(images.shape[2]) - shifts[0, :, None]).clamp(0, images.shape[2] - 1)
    columns = (torch.arange(images.shape[3]) - shifts[1, :, None]).clamp(0, images.shape[3] - 1)
    pixels = images[torch.arange(len(images))[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return rearrange(pixels, "b h w c -> b c h w")


def save_classifier(folder: str | Path, classifier: Classifier, accuracy: float) -> None:
    """Write `classifier` and its held-out accuracy as an export folder."""
    write_export(folder, KIND, asdict(classifier.config), classifier.state_dict(), accuracy=accuracy)


def load_classifier(folder: str | Path) -> tuple[Classifier, float]:
    """The classifier in an export folder, in evaluation mode, and its held-out accuracy.

    Raises:
        UserError: no classifier's export there, or one that does not fit its own config.
    """
    export, state = read_export(folder, KIND)
    cfg = section_from_dict(ClassifierConfig, export["config"], str(folder))
    return loaded(lambda: Classifier(cfg), state, folder).eval(), export["accuracy"]
