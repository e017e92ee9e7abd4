"""Feature extractors for torch-fidelity: its InceptionV3, and a classifier from an export folder."""

import hashlib
import pickle
import socket
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from mixar.errors import UserError
from mixar.evaluation.classifier import load_classifier
from mixar.weights import fingerprint, read_state

INCEPTION = "inception-v3-compat"
INCEPTION_FEATURES = 2048
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
CLASSIFIER = "mixar-classifier"


class ClassifierExtractor(FeatureExtractorBase):
    """A `Classifier` in torch-fidelity's form; `feature_extractor_weights_path` is its export folder.

    Raises:
        UserError: no export of a classifier there, or images of another size than in its training.
    """

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_):
        super().__init__(name, features_list)
        self.classifier, self.accuracy = load_classifier(feature_extractor_weights_path)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """The requested features, float32 [B, F] and [B, classes], of images uint8 [B, 3, H, W]."""
        size = self.classifier.config.image_size
        if input.shape[1:] != (3, size, size):
            raise UserError(f"this classifier scores 3x{size}x{size} images, not {'x'.join(map(str, input.shape[1:]))}")
        embedding = self.classifier.embed(input)
        outputs = {"features": embedding, "logits": self.classifier.classify(embedding)}
        return tuple(outputs[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False


register_feature_extractor(CLASSIFIER, ClassifierExtractor)


@dataclass(frozen=True)
class Extractor:
    """A feature extractor of torch-fidelity on its device, and the label under which its scores are comparable."""

    label: str  # INCEPTION for the published weights only
    description: str
    classes: int | None  # of its logits, where they are the labels of the scored set
    network: FeatureExtractorBase
    device: torch.device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, F] and logits [B, K], float32 on the CPU, of images uint8 [B, 3, H, W]."""
        # TF32 would change an FID by more than the differences between papers
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features, logits = self.network(images.to(self.device))
        return features.cpu(), logits.cpu()


def make_extractor(spec: str, device: torch.device | str = "cpu") -> Extractor:
    """The extractor that `spec` names.

    Args:
        spec: `inception`, with weights from torch's hub cache, downloaded where they are missing; `inception=PATH`,
            with weights from a file; or the folder of a classifier's export.

    Raises:
        UserError: weights that cannot be found, or that do not belong to the extractor.
    """
    if spec == "inception":
        return _inception(_hub_weights(), torch.device(device))
    if spec.startswith("inception="):
        return _inception(Path(spec.removeprefix("inception=")), torch.device(device))
    network = _create(CLASSIFIER, spec, torch.device(device))
    assert isinstance(network, ClassifierExtractor)
    config = network.classifier.config
    kind, of = "classifier", f"{config.classes} classes"
    if config.rotations:
        kind, of = "rotations", "rotations by 0, 90, 180 and 270 degrees, for a set of one class"
    return Extractor(
        label=f"{kind}:{fingerprint(network.classifier.state_dict())}",
        description=f"classifier of {of}, {network.accuracy:.2%} right on held-out images, {spec}",
        classes=None if config.rotations else config.classes,
        network=network,
        device=torch.device(device),
    )


def _create(name: str, weights: str, device: torch.device) -> FeatureExtractorBase:
    layers = ["2048", "logits_unbiased"] if name == INCEPTION else ["features", "logits"]
    options = {"cuda": False, "verbose": False, "feature_extractor_weights_path": weights}
    return create_feature_extractor(name, layers, **options).to(device)


def _inception(weights: Path, device: torch.device) -> Extractor:
    if not weights.is_file():
        raise UserError(f"no Inception weights at {weights}: download {URL_INCEPTION_V3} to this path")
    read_state(weights)  # refuses code in the file, which torch-fidelity, reading full pickles, would run
    try:
        network = _create(INCEPTION, str(weights), device)
    except (RuntimeError, pickle.UnpicklingError):
        raise UserError(f"{weights} is not torch-fidelity's InceptionV3: download {URL_INCEPTION_V3}") from None
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    published = digest == INCEPTION_SHA256
    return Extractor(
        label=INCEPTION if published else f"inception-v3:{digest[:12]}",
        description=f"torch-fidelity's InceptionV3, {'published' if published else 'other'} weights, sha256 {digest}",
        classes=None,
        network=network,
        device=device,
    )


def _hub_weights() -> Path:
    """The path of Inception's weights in torch's hub cache, downloaded where they are missing."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name)
    if not path.is_file():
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(10)  # behind a firewall without answers, the download would wait forever
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"Inception's weights are not at {path}, and their download failed ({error}): copy {URL_INCEPTION_V3} "
                "to that path, or to another and write `inception=PATH` for the extractor; or name the folder of a "
                "classifier to score in its feature space"
            ) from None
        finally:
            socket.setdefaulttimeout(timeout)
    return path
