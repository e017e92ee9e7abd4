import pytest
import torch

from mixar.data.image_batches import read_images
from mixar.demo.classifier import train_classifier
from mixar.evaluation.classifier import save_classifier
from mixar.evaluation.extractors import make_extractor


@pytest.fixture(scope="session")
def digits():
    """2,000 of the built-in digits, shuffled: uint8 [2000, 3, 32, 32] and their labels."""
    found = read_images("digits", batch=5000)
    chosen = torch.randperm(5000, generator=torch.Generator().manual_seed(0))[:2000]
    return next(iter(found))[chosen], found.labels[chosen]


@pytest.fixture(scope="session")
def export(digits, tmp_path_factory):
    """The export folder of a classifier trained for a moment on half of the digits."""
    folder = tmp_path_factory.mktemp("classifier") / "export"
    save_classifier(folder, *train_classifier(digits[0][:1000], digits[1][:1000], 10, steps=60))
    return folder


@pytest.fixture(scope="session")
def extractor(export):
    return make_extractor(str(export))
