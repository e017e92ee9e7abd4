"""`mixar evaluate`, in the feature space of a small classifier of digits."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mixar.config import DataConfig
from mixar.data.images import adm_crop, open_images
from mixar.evaluation.classifier import save_classifier, train_classifier


@pytest.fixture(scope="session")
def digits():
    """300 digits at 16x16, uint8 [300, 3, 16, 16], and their labels, in random order."""
    found = open_images(DataConfig(images="digits"))
    chosen = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:300].tolist()
    images = torch.stack([torch.from_numpy(np.array(adm_crop(found.load(i), 16))).permute(2, 0, 1) for i in chosen])
    return images, torch.tensor([found.labels[i] for i in chosen])


@pytest.fixture(scope="session")
def classifier(digits, tmp_path_factory):
    """The export of a classifier trained for a moment."""
    folder = tmp_path_factory.mktemp("classifier") / "export"
    save_classifier(folder, *train_classifier(*digits, 10, steps=60))
    return folder


@pytest.fixture(scope="session")
def folder(digits, tmp_path_factory):
    """100 of the digits, in a folder a class."""
    root = tmp_path_factory.mktemp("digits")
    for i, (image, label) in enumerate(zip(digits[0][:100], digits[1][:100].tolist())):
        (root / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / str(label) / f"{i}.png")
    return root


@pytest.fixture
def run_dir(tmp_path, release):
    shutil.copytree(release, tmp_path / "run" / "exports" / "7-ema")
    return tmp_path / "run"


def test_draws_and_scores(mixar, run_dir, folder, classifier):
    flags = ("--count", 8, "--seed", 3, "--steps", 2, "--precision", "fp32")
    status, said, _ = mixar("evaluate", run_dir, *flags, "--reference", folder, "--extractor", classifier)
    receipt = json.loads((run_dir / "eval" / "3-8-steps-2.json").read_text())
    assert status == 0 and str(run_dir / "eval" / "3-8-steps-2.json") in said
    name = receipt["distance"]["name"]
    assert name.startswith("FD-classifier:") and name in said
    assert receipt["distance"]["value"] > 0 and receipt["n"] == 8 and receipt["reference"]["n"] == 100
    assert receipt["per_class"] == {"0": 3, "1": 3, "2": 2} and 0 <= receipt["accuracy"] <= 1
    how = receipt["provenance"]
    assert how["seeds"] == [3, 10] and how["sampling"]["steps"] == 2 and how["sampling"]["guidance"] == 2.0
    assert how["dtype"] == "fp32" and set(how["weights"]) == {"model", "vae", "tokenizer", "prior"}
    # the folder that it drew, and an npz of the same samples, score the same
    drawn = run_dir / "samples" / "3-8-steps-2"
    assert mixar("sample", run_dir, *flags, "--npz")[0] == 0
    for samples in (drawn, drawn / "samples.npz"):
        out = ("--out", run_dir / "again.json")
        assert mixar("evaluate", "--samples", samples, "--reference", folder, "--extractor", classifier, *out)[0] == 0
        again = json.loads(out[1].read_text())
        assert again["distance"] == pytest.approx(receipt["distance"]) and again["accuracy"] == receipt["accuracy"]
        assert again["per_class"] == receipt["per_class"] and again["provenance"] == how


def test_real_digits_score_well(mixar, digits, folder, classifier, tmp_path):
    more = tmp_path / "more"
    for i, (image, label) in enumerate(zip(digits[0][100:], digits[1][100:].tolist())):
        (more / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(more / str(label) / f"{i}.png")
    noise = tmp_path / "noise"
    noise.mkdir()
    for i in range(50):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)).save(noise / f"{i}.png")
    scores = {}
    for samples in (more, noise):
        assert mixar("evaluate", "--samples", samples, "--reference", folder, "--extractor", classifier)[0] == 0
        scores[samples.name] = json.loads((tmp_path / f"{samples.name}.eval.json").read_text())
    assert scores["more"]["distance"]["value"] < 0.2 * scores["noise"]["distance"]["value"]
    assert scores["more"]["accuracy"] > 0.7 and "accuracy" not in scores["noise"]
    assert scores["more"]["provenance"]["sampling"] is None


def test_statistics_stand_for_their_images(mixar, folder, classifier, run_dir, tmp_path):
    kept, common = tmp_path / "digits.npz", ("--extractor", classifier)
    assert mixar("evaluate", "--reference", folder, *common, "--save-statistics", kept)[0] == 0
    assert mixar("sample", run_dir, "--count", 6)[0] == 0
    samples = ("--samples", run_dir / "samples" / "0-6", "--reconstructions", *common, "--out", tmp_path / "out.json")
    assert mixar("evaluate", *samples, "--reference", folder)[0] == 0
    from_images = json.loads((tmp_path / "out.json").read_text())
    assert mixar("evaluate", *samples, "--reference", kept)[0] == 0
    from_file = json.loads((tmp_path / "out.json").read_text())
    assert from_file["distance"] == from_images["distance"] and from_images["distance"]["name"].startswith("rFD-")
    assert "precision" in from_images and "precision" not in from_file


def test_crop_is_the_references(mixar, refused, run_dir, classifier, tmp_path):
    assert mixar("sample", run_dir, "--count", 4)[0] == 0
    samples = ("--samples", run_dir / "samples" / "0-4", "--extractor", classifier, "--out", tmp_path / "out.json")
    wide = tmp_path / "wide"
    wide.mkdir()
    for i in range(6):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3), np.uint8)).save(wide / f"{i}.png")
    assert "one size" in refused("evaluate", *samples, "--reference", wide)
    assert mixar("evaluate", *samples, "--reference", wide, "--crop", 16)[0] == 0
    assert json.loads((tmp_path / "out.json").read_text())["provenance"]["crop"] == "ADM centre crop to 16"
    (tmp_path / "s.npz").touch()
    assert "drop --crop" in refused("evaluate", *samples, "--reference", tmp_path / "s.npz", "--crop", 16)


def test_guidance_sweep(mixar, run_dir, folder, classifier):
    command = ("evaluate", run_dir, "--count", 6, "--reference", folder, "--extractor", classifier)
    status, said, _ = mixar(*command, "--sweep-guidance", "1,2.5")
    assert status == 0
    sweep = json.loads((run_dir / "eval" / "0-6-sweep.json").read_text())
    assert [point["guidance"] for point in sweep["curve"]] == [1.0, 2.5]
    values = {point["guidance"]: point["distance"]["value"] for point in sweep["curve"]}
    assert values[1.0] != values[2.5] and sweep["best"] == min(values, key=values.get) and "best" in said
    assert mixar(*command, "--guidance", "2.5")[0] == 0
    alone = json.loads((run_dir / "eval" / "0-6-guidance-2.5.json").read_text())
    assert alone["distance"]["value"] == pytest.approx(values[2.5])


def test_refusals(mixar, refused, run_dir, folder, classifier, tmp_path):
    common = ("--reference", folder, "--extractor", classifier)
    assert "nothing to score" in refused("evaluate", *common)
    assert "drop one" in refused("evaluate", run_dir, "--samples", folder, *common)
    assert "name a run" in refused("evaluate", "--samples", folder, *common, "--sweep-guidance", "1,2")
    assert "--seed" in refused("evaluate", "--samples", folder, *common, "--seed", 1)
    assert "drop --guidance" in refused("evaluate", run_dir, *common, "--sweep-guidance", "1", "--guidance", 2)
    assert "write such as 1,2,3,4" in refused("evaluate", run_dir, *common, "--sweep-guidance", "low")
    assert "--steps 0" in refused("evaluate", run_dir, *common, "--steps", 0)
    assert "nowhere" in refused("evaluate", "--samples", folder, "--reference", "nowhere", "--extractor", classifier)
    assert "nowhere" in refused("evaluate", "--samples", "nowhere", *common)
    assert "none.pth" in refused("evaluate", "--samples", folder, *common[:2], "--extractor", "inception=none.pth")
    assert mixar("sample", run_dir)[0] == 0
    (run_dir / "samples" / "0-3" / "1-1.png").unlink()
    assert "2 of 3" in refused("evaluate", "--samples", run_dir / "samples" / "0-3", *common)
