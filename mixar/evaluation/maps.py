"""Feature maps of frozen classifiers, with gradient to the images, for a perceptual loss."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from mixar.errors import UserError
from mixar.evaluation.extractors import ClassifierExtractor, make_extractor
from mixar.weights import not_finite_in

Maps = Callable[[Tensor], list[Tensor]]  # float images [B, 3, H, W] in [0, 1] to maps [B, C, h, w]

# the last layers of Inception before each halving, and the very last
INCEPTION_STAGES = ("MaxPool_1", "MaxPool_2", "Mixed_5d", "Mixed_6e", "Mixed_7c")


def open_maps(path: str, image_size: int, device: torch.device) -> tuple[str, Maps]:
    """The label and the feature maps of a frozen classifier.

    Args:
        path: the folder of a classifier's export, or a file of torch-fidelity's InceptionV3.
        image_size: side of the images in pixels.

    Raises:
        UserError: weights that do not belong to one of these, are not finite, or are of images of another size.
    """
    extractor = make_extractor(path if Path(path).is_dir() else f"inception={path}", device)
    network = extractor.network
    if broken := not_finite_in(network.state_dict()):
        raise UserError(f"{path} has weights that are not finite, such as {broken}: name intact ones")
    if not isinstance(network, ClassifierExtractor):
        return extractor.label, partial(inception_maps, network)
    size = network.classifier.config.image_size
    if size != image_size:
        raise UserError(
            f"{path} is a classifier of {size}x{size} images, but data.image_size={image_size}: name one of images of "
            "this size, or a file of torch-fidelity's InceptionV3, which takes any"
        )
    return extractor.label, network.classifier.maps


def inception_maps(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Inception's maps at the end of each of its `INCEPTION_STAGES`, of images resized to the side that it knows."""
    side = FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE
    x = F.interpolate(images, (side, side), mode="bilinear", antialias=True) * 255
    x, found = (x - 128) / 128, list[Tensor]()
    for name, part in network.named_children():
        if len(found) == len(INCEPTION_STAGES):
            break
        x = part(x)
        if name in INCEPTION_STAGES:
            found.append(x)
    return found
