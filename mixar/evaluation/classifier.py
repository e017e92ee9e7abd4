"""A small image classifier, in whose features a set is scored where Inception's weights cannot be had."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixar.codecs import from_bytes
from mixar.config import section_from_dict
from mixar.weights import loaded, read_export, write_export

KIND = "classifier"


@dataclass
class ClassifierConfig:
    """The geometry of a classifier, stored with its weights."""

    classes: int
    image_size: int
    widths: list[int] = field(default_factory=lambda: [24, 48, 96])  # channels of each stage
    features: int = 64
    rotations: bool = False  # its classes are rotations of an image, not the set's own classes


class Classifier(nn.Module):
    """Stages of convolution, norm and activation, each halving the side; then the mean over positions; an embedding.

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
        """Features float32 [B, F] of images [B, 3, H, W]."""
        x = from_bytes(images) if images.dtype == torch.uint8 else images
        return self.embedding(self.stages(2 * x - 1).mean((2, 3)))

    def maps(self, images: Tensor) -> list[Tensor]:
        """The feature map of each stage, [B, width, h, w], of images [B, 3, H, W] in [0, 1]."""
        found, x = [], 2 * images - 1
        for halve, refine in zip(self.stages[::2], self.stages[1::2]):
            x = refine(halve(x))
            found.append(x)
        return found

    def classify(self, features: Tensor) -> Tensor:
        """Logits [B, classes] of features [B, F]."""
        return self.logits(F.relu(features))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, 3, H, W]."""
        return self.classify(self.embed(images))


def _conv(width_in: int, width: int, stride: int = 1) -> nn.Module:
    convolution = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


def save_classifier(folder: str | Path, classifier: Classifier, accuracy: float) -> None:
    """Write `classifier` and its held-out accuracy as an export folder."""
    write_export(folder, KIND, asdict(classifier.config), classifier.state_dict(), accuracy=accuracy)


def load_classifier(folder: str | Path) -> tuple[Classifier, float]:
    """The classifier in an export folder, in evaluation mode, and its held-out accuracy.

    Raises:
        UserError: no export of a classifier there, or one that does not fit its own config.
    """
    export, state = read_export(folder, KIND)
    cfg = section_from_dict(ClassifierConfig, export["config"], str(folder))
    return loaded(lambda: Classifier(cfg), state, folder).eval(), export["accuracy"]
