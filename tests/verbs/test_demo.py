"""The demo on a user's own folder, in its short form, killed on the way and started again."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mixar.demo.stages import SHORT
from mixar.sampling import MixARPipeline
from mixar.verbs import demo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """60 coloured shapes of three classes, of odd sizes, and a file that is no image."""
    root, rng = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    for i in range(60):
        name = ("disc", "square", "triangle")[i % 3]
        image = Image.new("RGB", (40 + i, 70 - i // 2), tuple(rng.integers(0, 90, 3).tolist()))
        pen, colour = ImageDraw.Draw(image), tuple(rng.integers(140, 256, 3).tolist())
        box = (8, 8, image.width - 8, image.height - 8)
        if name == "triangle":
            pen.polygon([(box[0], box[3]), (box[2], box[3]), (image.width // 2, box[1])], colour)
        else:
            (pen.ellipse if name == "disc" else pen.rectangle)(box, colour)
        (root / name).mkdir(exist_ok=True)
        image.save(root / name / f"{i:02d}.png")
    (root / "disc" / "notes.txt").write_text("no image")
    return root


def test_a_killed_demo_goes_on_and_reports(shapes, tmp_path) -> None:
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "mixar", "demo", "--short", "--images", str(shapes), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "tokenizer" / "metrics.jsonl").exists():  # in the middle of the third stage
        assert process.poll() is None, "the demo ended early"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = json.loads((out / "stages.json").read_text())
    assert set(before) == {"classifier", "vae"}

    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "== vae" not in done.stdout and "== mixar" in done.stdout
    report = json.loads((out / "report.json").read_text())
    stages = {"classifier", "vae", "tokenizer", "shards", "prior", "mixar", "samples", "scores"}
    assert set(report["seconds"]) == stages | {"total"}
    assert report["seconds"]["total"] == pytest.approx(sum(report["seconds"][stage] for stage in stages), abs=0.2)
    assert {name: report["seconds"][name] for name in before} == before
    for group, names in (("rfid", {"vae", "tokenizer"}), ("fid", {"prior", "mixar"}), ("accuracy", {"prior", "mixar"})):
        assert set(report[group]) == names
        assert all(np.isfinite(value) and value >= 0 for value in report[group].values())
    assert "not an Inception FID" in report["measured_with"]["what"]
    with Image.open(out / "report.png") as picture:
        assert picture.height == 5 * (32 * 2 + 4) + 4
        assert len(set(picture.convert("RGB").getdata())) > 100
    pipeline = MixARPipeline.from_pretrained(out / "mixar")
    assert pipeline([0, 1, 2], [0, 1, 2]).shape == (3, 3, 32, 32)


def test_a_demo_of_something_else_is_noticed(mixar, refused, tmp_path, monkeypatch):
    """One class, whose samples have no right label; the same images by another path; others of the same name."""
    shorter = replace(SHORT, codecs=0.01, prior=0.01, mixar=0.01, classifier_steps=10, samples=20)
    monkeypatch.setattr(demo, "SHORT", shorter)  # nothing here asks how good the models are
    rng = np.random.default_rng(0)
    for i in range(44):
        for root in ("a", "b"):
            (tmp_path / root / "photos").mkdir(parents=True, exist_ok=True)
            image = np.linspace(0, 200, 32)[:, None, None] + rng.integers(0, 55, (32, 32, 3))
            Image.fromarray(image.astype(np.uint8)).save(tmp_path / root / "photos" / f"{i:02d}.bmp")  # of one size
    out = ("--out", tmp_path / "out", "--short")
    status, said, complaint = mixar("demo", "--images", tmp_path / "a" / "photos", *out)
    assert status == 0, complaint
    assert "rotations by 0, 90, 180 and 270 degrees" in said and "as labelled" not in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["accuracy"] == {} and report["measured_with"]["extractor"].startswith("rotations:")
    made_of = tmp_path / "out" / "made_of.json"
    before = made_of.read_text()
    assert "demo of other images" in refused("demo", "--images", tmp_path / "b" / "photos", *out)
    assert "demo of other length" in refused("demo", "--images", tmp_path / "a" / "photos", *out[:2])
    assert made_of.read_text() == before
    shutil.copytree(tmp_path / "a" / "photos", tmp_path / "elsewhere")
    known = json.loads(before)
    del known["length"], known["configs"]["vae"]["optim"]["ema"]  # written before there were these
    made_of.write_text(json.dumps(known))
    assert mixar("demo", "--images", tmp_path / "elsewhere", *out)[0] == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["fid"] == report["fid"]
    known["configs"]["vae"]["optim"]["lr"] = 1
    made_of.write_text(json.dumps(known))
    assert "demo of other configs" in refused("demo", "--images", tmp_path / "elsewhere", *out)
    made_of.write_text("[")
    assert "is not what the demo wrote" in refused("demo", "--images", tmp_path / "elsewhere", *out)


def test_an_output_that_cannot_be_written_is_told(refused, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write" in refused("demo", "--out", tmp_path / "file" / "out")


def test_too_few_images_are_told(refused, tmp_path) -> None:
    for i in range(3):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{i}.png")
    assert "holds 3 images" in refused("demo", "--images", tmp_path, "--out", tmp_path / "out")
