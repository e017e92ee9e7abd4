import shutil
import urllib.request

import pytest
import torch
import torch_fidelity
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from mixar.errors import UserError
from mixar.evaluation import evaluate
from mixar.evaluation.classifier import load_classifier
from mixar.evaluation.extractors import CLASSIFIER, INCEPTION, make_extractor
from mixar.evaluation.maps import open_maps
from mixar.weights import fingerprint


class Pixels(torch.utils.data.Dataset):
    """Images as torch-fidelity's own loop takes them."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """A file in the form of Inception's weights, with random values."""

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            """Keep the initial values."""

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    torch.save(Blank("blank", ["2048"], feature_extractor_weights_path=path).state_dict(), path)
    return path


def test_classifier_extractor_gives_what_the_classifier_does(digits, export, extractor):
    classifier, accuracy = load_classifier(export)
    features, logits = extractor(digits[0][:4])
    with torch.no_grad():
        assert torch.equal(logits, classifier(digits[0][:4]))
        assert torch.equal(features, classifier.embed(digits[0][:4]))
    assert extractor.label == f"classifier:{fingerprint(classifier.state_dict())}" and extractor.classes == 10
    assert f"{accuracy:.2%}" in extractor.description


def test_torch_fidelity_itself_takes_the_classifier(digits, export, extractor):
    a, b = digits[0][:300], digits[0][300:600]
    options = {"feature_extractor": CLASSIFIER, "feature_extractor_weights_path": str(export), "cuda": False}
    theirs = torch_fidelity.calculate_metrics(
        input1=Pixels(a), input2=Pixels(b), fid=True, isc=True, prc=True, verbose=False, save_cpu_ram=True, **options
    )
    ours = evaluate([a], [b], extractor)
    assert ours["distance"]["value"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)  # theirs: float32
    assert ours["score"]["mean"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert (ours["precision"], ours["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]), abs=0.01)


def test_images_of_another_size_are_refused(extractor):
    with pytest.raises(UserError, match="3x32x32 images, not 3x16x16"):
        extractor(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_inception_runs_from_a_file_and_only_the_published_weights_bear_its_name(inception_file):
    inception = make_extractor(f"inception={inception_file}")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    features, logits = inception(images)
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)
    assert torch.isfinite(features).all() and not torch.equal(features[0], features[1])
    assert inception.label != INCEPTION and "other weights" in inception.description
    assert inception.classes is None


def test_inception_s_last_map_is_what_its_features_are_the_mean_of(inception_file):
    images = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8)  # a side at which nothing is resized
    label, maps = open_maps(str(inception_file), 299, torch.device("cpu"))
    found = maps(images / 255)
    assert [tuple(x.shape[1:]) for x in found] == [
        (64, 73, 73), (192, 35, 35), (288, 35, 35), (768, 17, 17), (2048, 8, 8)
    ]  # fmt: skip
    inception = make_extractor(f"inception={inception_file}")
    torch.testing.assert_close(found[-1].mean((2, 3)), inception(images)[0], rtol=1e-4, atol=1e-5)
    assert label == inception.label


def test_maps_pass_the_gradient_to_images_of_any_size(inception_file, export):
    for path in (inception_file, export):
        images = torch.rand(1, 3, 32, 32, requires_grad=True)
        _, maps = open_maps(str(path), 32, torch.device("cpu"))
        sum(x.square().mean() for x in maps(images)).backward()
        assert images.grad.isfinite().all() and images.grad.abs().max() > 0


def test_maps_of_a_broken_classifier_are_refused(tmp_path, export):
    state = load_classifier(export)[0].state_dict()
    state["logits.bias"][0] = float("nan")
    folder = shutil.copytree(export, tmp_path / "broken")
    save_file(state, folder / "model.safetensors")
    about = folder / "config.json"
    about.write_text(about.read_text().replace(make_extractor(str(export)).label.partition(":")[2], fingerprint(state)))
    with pytest.raises(UserError, match=r"broken has weights that are not finite, such as .*logits\.bias"):
        open_maps(str(folder), 32, torch.device("cpu"))


def test_missing_inception_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there: as good as no network
    monkeypatch.setattr(urllib.request, "_opener", None)  # urllib may have looked at the proxies before
    with pytest.raises(UserError, match=r"hub/checkpoints/weights-inception-2015-12-05-6726825d\.pth.*inception=PATH"):
        make_extractor("inception")
    with pytest.raises(UserError, match=r"absent\.pth: download https://"):
        make_extractor(f"inception={tmp_path / 'absent.pth'}")


def test_other_files_are_not_inception(tmp_path, export):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"no pickle")
    torch.save({"weight": pytest.raises}, tmp_path / "code.pth")
    for file in (tmp_path / "other.pth", tmp_path / "broken.pth", tmp_path / "code.pth", export / "model.safetensors"):
        with pytest.raises(UserError, match=file.name):
            make_extractor(f"inception={file}")


def test_a_folder_without_a_classifier_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not an export"):
        make_extractor(str(tmp_path))
