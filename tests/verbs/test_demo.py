"""The demo on a user's own folder, in its short form, killed on the way and started again."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mixar.sampling import MixARPipeline


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
    assert "no Inception FID" in report["measured_with"]["what"]
    with Image.open(out / "report.png") as picture:
        assert picture.height == 5 * (32 * 2 + 4) + 4
        assert len(set(picture.convert("RGB").getdata())) > 100
    pipeline = MixARPipeline.from_pretrained(out / "mixar")
    assert pipeline([0, 1, 2], [0, 1, 2]).shape == (3, 3, 32, 32)


def test_too_few_images_are_told(refused, tmp_path) -> None:
    for i in range(3):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{i}.png")
    assert "holds 3 images" in refused("demo", "--images", tmp_path, "--out", tmp_path / "out")
