import shutil

import pytest
import torch
from safetensors.torch import save_file

from mixar.demo.classifier import _shift, train_classifier
from mixar.errors import UserError
from mixar.evaluation import evaluate
from mixar.evaluation.classifier import load_classifier, save_classifier
from mixar.evaluation.extractors import make_extractor
from mixar.weights import describe_export, fingerprint

pytestmark = pytest.mark.slow  # as a whole: trainings, compilers or many bytes


def test_training_is_a_function_of_the_seed(digits):
    images, labels = digits[0][:200], digits[1][:200]
    torch.manual_seed(1)
    first, accuracy = train_classifier(images, labels, 10, steps=3, seed=5)
    torch.manual_seed(2)
    again, accuracy_again = train_classifier(images, labels, 10, steps=3, seed=5)
    other, _ = train_classifier(images, labels, 10, steps=3, seed=6)
    assert accuracy == accuracy_again
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(first.logits.weight, other.logits.weight)


def test_it_learns_and_is_stored_whole(digits, export):
    classifier, accuracy = load_classifier(export)
    images, labels = digits[0][1000:], digits[1][1000:]
    with torch.no_grad():
        logits = classifier(images)
        assert torch.allclose(classifier(images.float() / 255), logits)
        assert classifier.embed(images[:2]).shape == (2, 64)
    unseen = (logits.argmax(1) == labels).double().mean().item()
    assert unseen > 0.85 and abs(unseen - accuracy) < 0.1


def test_it_takes_colour_objects_of_other_sizes():
    # four classes that differ in colour only: the weights must not see grey
    labels = torch.arange(400) % 4
    tint = torch.tensor([[200, 40, 40], [40, 200, 40], [40, 40, 200], [120, 120, 120]])[labels]
    noise = torch.randint(-40, 41, (400, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    images = (tint[:, :, None, None] + noise).clamp(0, 255).to(torch.uint8)
    classifier, accuracy = train_classifier(images, labels, 4, steps=40, batch=16)
    assert len(classifier.config.widths) == 4 and accuracy == 1.0


def test_shift_moves_down_and_right_and_repeats_edges():
    image = torch.arange(9).view(1, 1, 3, 3).expand(2, 3, 3, 3)
    moved = _shift(image, torch.tensor([[1, 0], [0, -1]]))
    assert moved[0, 2].tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5]]
    assert moved[1, 0].tolist() == [[1, 2, 2], [4, 5, 5], [7, 8, 8]]


@pytest.mark.parametrize("n, label, fault", [(5, 0, "too few"), (20, 10, "0 to 9"), (20, -1, "0 to 9")])
def test_impossible_sets_are_refused(n, label, fault):
    with pytest.raises(UserError, match=fault):
        train_classifier(torch.zeros(n, 3, 32, 32, dtype=torch.uint8), torch.full((n,), label), 10)


def test_one_class_is_told_apart_by_its_turns(digits, tmp_path):
    ones = digits[0][digits[1] == 7]
    torch.manual_seed(0)
    network, accuracy = train_classifier(ones, torch.zeros(len(ones), dtype=torch.long), 1, steps=60)
    assert network.config.classes == 4 and accuracy > 0.8
    save_classifier(tmp_path / "export", network, accuracy)
    extractor = make_extractor(str(tmp_path / "export"))
    assert extractor.label.startswith("rotations:") and extractor.classes is None
    assert "for a set of one class" in extractor.description
    # its features see what is wrong with an image, and labels say nothing
    noisy = (ones.int() + torch.randint(0, 120, ones.shape)).clamp(0, 255).byte()
    labels = torch.zeros(50, dtype=torch.long)
    real = evaluate([ones[:50]], [ones[50:]], extractor, labels)
    fake = evaluate([noisy[:50]], [ones[50:]], extractor, labels)
    assert real["distance"]["value"] < 0.2 * fake["distance"]["value"] and "accuracy" not in real


def test_a_classifier_of_broken_weights_scores_nothing(digits, export, tmp_path):
    classifier, accuracy = load_classifier(export)
    classifier.embedding.bias.data[0] = float("nan")
    with pytest.raises(UserError, match="weights that are not finite"):
        save_classifier(tmp_path / "export", classifier, accuracy)
    shutil.copytree(export, tmp_path / "export")
    save_file(classifier.state_dict(), tmp_path / "export" / "model.safetensors")  # as of a version that wrote them
    config, known = tmp_path / "export" / "config.json", describe_export(export)["fingerprint"]
    config.write_text(config.read_text().replace(known, fingerprint(classifier.state_dict())))
    with pytest.raises(UserError, match="features that are not finite"):
        evaluate([digits[0][:8]], [digits[0][8:16]], make_extractor(str(tmp_path / "export")))
