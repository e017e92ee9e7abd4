import json
from datetime import datetime

import pytest
import torch

from mixar.config import SampleConfig, to_dict
from mixar.errors import UserError
from mixar.evaluation import accumulate, evaluate
from mixar.evaluation.extractors import INCEPTION
from mixar.evaluation.receipt import Provenance, distance_name, score_name, write_receipt


@pytest.mark.parametrize(
    "label, n, reconstructions, name",
    [
        (INCEPTION, 50_000, False, "FID"),
        (INCEPTION, 50_000, True, "rFID"),
        (INCEPTION, 49_999, False, "FID-49.999k"),
        (INCEPTION, 10_000, False, "FID-10k"),
        (INCEPTION, 500, True, "rFID-0.5k"),
        ("classifier:0a", 50_000, False, "FD-classifier:0a"),
        ("inception-v3:0a", 50_000, False, "FD-inception-v3:0a"),
        ("classifier:0a", 10, True, "rFD-classifier:0a"),
    ],
)
def test_only_inception_and_50k_make_an_fid(label, n, reconstructions, name):
    assert distance_name(label, n, reconstructions) == name
    assert score_name(label) == ("IS" if label == INCEPTION else f"IS-{label}")


def test_real_images_score_far_better_than_noise(digits, extractor):
    images, labels = digits
    held, reference = images[1000:1500], accumulate([images[1500:]], extractor)
    noise = torch.randint(0, 256, held.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    real = evaluate(held.split(128), reference, extractor, labels[1000:1500])
    fake = evaluate(noise.split(128), reference, extractor, labels[1000:1500])
    assert 20 * real["distance"]["value"] < fake["distance"]["value"]
    assert real["accuracy"] > 0.75 > 0.3 > fake["accuracy"]
    assert real["precision"] > 0.8 and real["recall"] > 0.8 and fake["precision"] < 0.1
    assert real["score"]["mean"] > 3 * fake["score"]["mean"]
    assert sum(real["per_class"].values()) == real["n"] == real["reference"]["n"] == 500


def test_reconstructions_score_by_their_damage(digits, extractor):
    originals = digits[0][1000:1400]
    blurred = torch.nn.functional.avg_pool2d(originals.float(), 5, 1, 2).to(torch.uint8)
    exact = evaluate([originals], [originals], extractor, reconstructions=True)
    damaged = evaluate([blurred], [originals], extractor, reconstructions=True)
    assert exact["distance"]["name"] == f"rFD-{extractor.label}"
    assert abs(exact["distance"]["value"]) < 1e-6 < 1e-3 < damaged["distance"]["value"]
    assert exact["digest"] == exact["reference"]["digest"] != damaged["digest"]


def test_statistics_alone_give_no_precision_and_recall(digits, extractor):
    reference = accumulate([digits[0][:100]], extractor).statistics()
    scores = evaluate([digits[0][100:200]], reference, extractor)
    assert "distance" in scores and not {"precision", "recall", "accuracy", "per_class"} & set(scores)


def test_labels_must_match_the_samples(digits, extractor):
    with pytest.raises(UserError, match="3 labels were given for 8 samples"):
        evaluate([digits[0][:8]], [digits[0][8:16]], extractor, torch.zeros(3, dtype=torch.long))


def test_receipt_holds_what_it_takes_to_measure_again(digits, extractor, tmp_path):
    scores = evaluate([digits[0][:50]], [digits[0][50:100]], extractor, digits[1][:50])
    provenance = Provenance(
        samples="runs/demo",
        reference="digits",
        sampling=to_dict(SampleConfig(cfg_scale=1.5)),
        seeds=(0, 49),
        weights={"model": "00", "vae": "01"},
        crop="adm 32",
        dtype="float32",
    )
    write_receipt(tmp_path / "eval" / "receipt.json", scores, provenance)
    receipt = json.loads((tmp_path / "eval" / "receipt.json").read_text())
    assert {name: receipt[name] for name in scores} == scores
    assert receipt["distance"]["name"].startswith("FD-classifier:") and receipt["score"]["name"].startswith("IS-class")
    assert receipt["extractor"]["label"] == extractor.label and receipt["n"] == 50
    assert receipt["provenance"]["sampling"]["cfg_scale"] == 1.5 and receipt["provenance"]["seeds"] == [0, 49]
    assert set(receipt["versions"]) == {"mixar", "torch", "torch-fidelity", "numpy", "python"}
    assert datetime.fromisoformat(receipt["date"]).tzinfo is not None
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["receipt.json"]
