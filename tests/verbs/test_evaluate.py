"""`mixar evaluate`, in the feature space of a small classifier of digits."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mixar.config import DataConfig
from mixar.data.images import adm_crop, open_images
from mixar.demo.classifier import train_classifier
from mixar.evaluation.classifier import save_classifier
from mixar.sampling_flags import parse_grid

pytestmark = pytest.mark.slow  # as a whole: commands, compilers or many processes


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
    assert how["seeds"] == [3, 10] and how["sampling"]["steps"] == 2 and how["sampling"]["cfg_scale"] == 2.0
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


def test_refusals(mixar, refused, run_dir, folder, classifier, tmp_path):
    common = ("--reference", folder, "--extractor", classifier)
    assert "nothing to score" in refused("evaluate", *common)
    assert "drop one" in refused("evaluate", run_dir, "--samples", folder, *common)
    assert "--seed" in refused("evaluate", "--samples", folder, *common, "--seed", 1)
    assert "--steps 0" in refused("evaluate", run_dir, *common, "--steps", 0)
    assert "nowhere" in refused("evaluate", "--samples", folder, "--reference", "nowhere", "--extractor", classifier)
    assert "nowhere" in refused("evaluate", "--samples", "nowhere", *common)
    assert "none.pth" in refused("evaluate", "--samples", folder, *common[:2], "--extractor", "inception=none.pth")
    assert mixar("sample", run_dir)[0] == 0
    (run_dir / "samples" / "0-3" / "1-1.png").unlink()
    assert "2 of 3" in refused("evaluate", "--samples", run_dir / "samples" / "0-3", *common)


def test_everything_is_checked_before_the_reference_is_read(refused, run_dir, folder, classifier, tmp_path):
    common = ("--reference", folder, "--extractor", classifier)
    (tmp_path / "file").touch()
    nowhere = tmp_path / "file" / "out.npz"
    draw = ("evaluate", run_dir, "--count", 4, "--steps", 1)
    assert "cannot write" in refused(*draw, *common, "--out", nowhere)
    assert "cannot write" in refused("evaluate", *common, "--save-statistics", nowhere)
    assert "which is a folder" in refused(*draw, *common, "--out", tmp_path)
    assert "ending in .npz" in refused("evaluate", *common, "--save-statistics", tmp_path / "kept")
    npz = tmp_path / "reference.npz"
    np.savez(npz, np.zeros((6, 16, 16, 3), np.uint8))
    itself = ("--reference", npz, "--extractor", classifier, "--save-statistics", tmp_path / "." / "reference.npz")
    assert "is the reference itself" in refused("evaluate", *itself)
    assert "is not a receipt of scores" in refused(*draw, *common, "--out", npz)
    # a reference that does not fit what would be drawn: another extractor's statistics, too few images, another size
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    theirs = ("--reference", tmp_path / "theirs.npz", "--extractor", classifier)
    assert "use one extractor for both" in refused(*draw, *theirs)
    assert "16x16 images" in refused(*draw, *common, "--crop", 32)
    assert "at least 2 images" in refused("evaluate", run_dir, "--count", 1, *common)
    assert not (run_dir / "samples").exists() and not (run_dir / "eval").exists()
    np.savez(tmp_path / "small.npz", np.zeros((6, 8, 8, 3), np.uint8))
    assert "16x16 images" in refused("evaluate", "--samples", tmp_path / "small.npz", *common)


def test_scores_are_told_in_any_locale_and_say_of_what(folder, classifier, tmp_path):
    samples = tmp_path / "Ärger"
    shutil.copytree(folder, samples)
    command = [sys.executable, "-m", "mixar", "evaluate", "--samples", str(samples), "--reference", str(folder),
               "--extractor", str(classifier)]  # fmt: skip
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=os.environ | plain)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(None, 1) for line in done.stdout.decode("ascii").splitlines())
    assert said["samples"].startswith(f"100 images, {tmp_path}") and said["samples"].endswith("rger")
    assert said["reference"] == f"100 images, {folder}"
    receipt = json.loads((tmp_path / "Ärger.eval.json").read_text())
    assert said[receipt["distance"]["name"]] == f"{receipt['distance']['value']:.3f}"


def test_scores_are_told_before_they_are_written(mixar, folder, classifier, small_disk):
    (small_disk / "full").write_bytes(bytes(1 << 20))
    with (small_disk / "full").open("ab", 0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))
    command = ("evaluate", "--samples", folder, "--reference", folder, "--extractor", classifier)
    status, said, complaint = mixar(*command, "--out", small_disk / "receipt.json")
    assert status == 2 and "No space left" in complaint and "FD-classifier:" in said


def test_a_receipt_is_not_lost_to_other_scores(mixar, refused, folder, classifier, run_dir):
    draw = ("evaluate", run_dir, "--count", 4, "--steps", 1, "--extractor", classifier)
    assert mixar(*draw, "--reference", folder)[0] == mixar(*draw, "--reference", folder)[0] == 0
    receipt = run_dir / "eval" / "0-4-steps-1.json"
    before = receipt.read_text()
    other = (*draw, "--reference", run_dir / "samples" / "0-4-steps-1")
    assert "scores against another reference" in refused(*other)
    assert mixar(*other, "--out", run_dir / "eval" / "other.json")[0] == 0
    # a grid's own receipts lie beside it
    assert "scores against another reference" in refused(*other[:4], *other[6:], "--grid", "steps=1")
    (run_dir / "more").mkdir()
    assert mixar(*other[:4], *other[6:], "--grid", "steps=1", "--out", run_dir / "more" / "grid.json")[0] == 0
    assert (run_dir / "more" / "0-4-steps-1.json").exists() and receipt.read_text() == before


def test_foreign_files_beside_samples(mixar, refused, run_dir, folder, classifier, tmp_path):
    assert mixar("sample", run_dir, "--count", 4)[0] == mixar("sample", run_dir, "--count", 4, "--npz")[0] == 0
    drawn = run_dir / "samples" / "0-4"
    score = ("evaluate", "--reference", folder, "--extractor", classifier, "--samples")
    (drawn / ".2-2.png.0.part").touch()  # of a kill
    assert mixar(*score, drawn)[0] == 0
    shutil.copy(drawn / "0-0.png", drawn / "holiday\x1b[2J.png")
    said = refused(*score, drawn)
    assert "did not write, such as holiday\\x1b[2J.png" in said
    (drawn / "0-0.png").unlink()
    assert "holiday" in refused(*score, drawn)
    # another npz beside them has nothing to do with their record
    np.savez(drawn / "others.npz", np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8))
    assert mixar(*score, drawn / "others.npz")[0] == 0
    assert json.loads((drawn / "others.npz.eval.json").read_text())["provenance"]["sampling"] is None
    (drawn / "sampling.json").write_text('{"count": 4}')
    assert "is not what `mixar sample` writes" in refused(*score, drawn)


@pytest.fixture
def grid(mixar, run_dir, folder, classifier):
    """`grid("steps=2,3", ...)` gives the JSON, the markdown and what was printed."""

    def run(*axes, count=6, flags=()):
        command = ("evaluate", run_dir, "--count", count, "--reference", folder, "--extractor", classifier, *flags)
        status, said, complaint = mixar(*command, "--grid", *axes)
        assert status == 0, complaint
        (file,) = (run_dir / "eval").glob("*-grid.json")
        return json.loads(file.read_text()), file.with_suffix(".md").read_text(), said

    return run


def settings_of(found):
    return [row["settings"] for row in found["rows"]]


def test_grid_is_the_product_of_its_axes(mixar, grid, run_dir, folder, classifier):
    found, text, said = grid("steps=2,3", "cfg_scale=1,2.5")
    assert settings_of(found) == [{"steps": k, "cfg_scale": g} for k in (2, 3) for g in (1, 2.5)]
    assert found["count"] == 6 and found["extractor"].startswith("classifier:") and found["environment"]["host"]
    names = [f"0-6-steps-{k}-cfg_scale-{g}" for k in (2, 3) for g in (1.0, 2.5)]
    assert sorted(path.name for path in (run_dir / "samples").iterdir()) == names
    for row, name in zip(found["rows"], names):
        receipt = json.loads((run_dir / "eval" / f"{name}.json").read_text())
        assert row["receipts"] == [str(run_dir / "eval" / f"{name}.json")]
        assert row["distance"]["mean"] == receipt["distance"]["value"] and row["accuracy"] == receipt["accuracy"]
        assert row["score"]["mean"] == receipt["score"]["mean"]
        assert row["distance"]["lowest"] == row["distance"]["highest"] == row["distance"]["mean"]
        assert row["seconds"] > 0 and row["timed"] == 6
    # the table has every row, the best one marked
    lines = text.strip().splitlines()
    assert len(lines) == 6 and text in said and lines[0].split(" | ")[0].endswith("steps")
    best = min(found["rows"], key=lambda row: row["distance"]["mean"])
    (marked,) = [line for line in lines if "best" in line]
    cells = [cell.strip() for cell in marked.split("|")]
    assert cells[1:3] == [str(best["settings"][name]) for name in ("steps", "cfg_scale")]
    picture = Image.open(run_dir / "eval" / "0-6-grid.png")
    assert picture.size == (1800, 1200) and len(picture.getcolors(1 << 20)) > 10
    # the samples are those that the flags draw
    alone = ("--count", 6, "--steps", 2, "--cfg-scale", 2.5)
    status, said, _ = mixar("evaluate", run_dir, *alone, "--reference", folder, "--extractor", classifier)
    again = json.loads((run_dir / "eval" / "0-6-steps-2-cfg_scale-2.5.json").read_text())
    assert status == 0 and again["distance"]["value"] == found["rows"][1]["distance"]["mean"]


def test_presets_are_rows(grid, run_dir):
    found, text, _ = grid("preset=fast,fastest", "steps=2", flags=("--diffusion-start", 900))
    assert settings_of(found) == [{"preset": "fast", "steps": 2}, {"preset": "fastest", "steps": 2}]
    sampling = [row["sampling"] for row in found["rows"]]
    assert [how["diffusion_steps"] for how in sampling] == ["16", "4"]
    assert all(how["steps"] == 2 and how["solver"] == "dpm" and how["diffusion_start"] == 900 for how in sampling)
    assert (run_dir / "samples" / "0-6-fast-steps-2-diffusion_start-900").is_dir() and "| fastest" in text


def test_default_grid():
    points = parse_grid([], [])
    assert len(points) == 27 + 3 and points[0] == {"steps": 4, "diffusion_steps": "4", "prior_steps": 4}
    assert points[-3:] == [{"preset": "exact"}, {"preset": "fast"}, {"preset": "fastest"}]


def test_repeats_take_other_seeds(grid, run_dir):
    found, text, _ = grid("steps=2", flags=("--repeats", 3, "--seed", 10))
    (row,) = found["rows"]
    values = []
    for first in (10, 16, 22):
        drawn = (run_dir / "samples" / f"{first}-6-steps-2").glob("*.png")
        assert sorted(int(file.stem.split("-")[0]) for file in drawn) == list(range(first, first + 6))
        values.append(json.loads((run_dir / "eval" / f"{first}-6-steps-2.json").read_text())["distance"]["value"])
    assert row["repeats"] == 3 and row["timed"] == 18 and row["distance"]["mean"] == pytest.approx(np.mean(values))
    assert row["distance"]["lowest"] == min(values) < row["distance"]["highest"] == max(values)
    assert "lowest" in text and f"{max(values):.3f}" in text


def test_grid_goes_on_where_it_stopped(grid, run_dir):
    found, _, _ = grid("steps=2,3")
    file, samples = run_dir / "eval" / "0-6-grid.json", run_dir / "samples"
    kept, lost = found["rows"]
    file.write_text(json.dumps(found | {"rows": [kept]}))
    for name in ("1-1.png", "5-2.png"):
        (samples / "0-6-steps-3" / name).unlink()
    shutil.rmtree(samples / "0-6-steps-2")  # is not looked at any more
    before = (samples / "0-6-steps-3" / "0-0.png").stat().st_mtime_ns
    again, text, said = grid("steps=2,3")
    assert again["rows"][0] == kept and not (samples / "0-6-steps-2").exists()
    assert "[2/2] steps=3" in said and "[1/2]" not in said and len(text.strip().splitlines()) == 4
    assert again["rows"][1]["distance"]["mean"] == pytest.approx(lost["distance"]["mean"], rel=1e-3)
    assert again["rows"][1]["timed"] == 4  # a batch, though two images were missing
    assert (samples / "0-6-steps-3" / "0-0.png").stat().st_mtime_ns == before
    # other points and repeats come to those that are there; the table shows what was asked for
    more, text, _ = grid("steps=3", flags=("--repeats", 2))
    assert more["rows"][:2] == again["rows"] and more["rows"][2]["repeats"] == 2
    assert len(text.strip().splitlines()) == 3


def test_a_grid_is_of_weights_not_of_paths(mixar, grid, run_dir, folder, classifier, tmp_path):
    found, text, _ = grid("steps=2")
    file, copied = run_dir / "eval" / "0-6-grid.json", shutil.copytree(run_dir / "exports" / "7-ema", tmp_path / "copy")
    (row,) = found["rows"]
    old = {name: value for name, value in row["sampling"].items() if name != "solver"}  # a setting that came later
    del found["latents"]
    file.write_text(json.dumps(found | {"rows": [row | {"sampling": old}]}))
    command = ("evaluate", copied, "--count", 6, "--reference", folder, "--extractor", classifier, "--grid", "steps=2")
    status, said, complaint = mixar(*command, "--out", file)
    assert status == 0 and text in said and "[1/1]" not in said, complaint
    assert json.loads(file.read_text())["rows"] == [row]


def test_equal_sets_have_a_grid(mixar, run_dir, classifier):
    flags = ("--count", 4, "--steps", 1, "--extractor", classifier)
    assert mixar("sample", run_dir, *flags[:4])[0] == 0
    drawn = run_dir / "samples" / "0-4-steps-1"
    status, said, _ = mixar("evaluate", run_dir, *flags[:2], *flags[4:], "--reference", drawn, "--grid", "steps=1")
    assert status == 0 and "| 0.000" in said  # a distance that no logarithm takes


def test_grid_refusals(mixar, refused, run_dir, folder, classifier, tmp_path, make_pipeline):
    common = ("--reference", folder, "--extractor", classifier)
    run = ("evaluate", run_dir, *common, "--count", 6)
    assert "name it before --grid" in refused("evaluate", *common, "--grid", "steps=2")
    assert "name it before --grid" in refused("evaluate", "--samples", folder, *common, "--grid", "steps=2")
    assert "name the run before --grid" in refused("evaluate", run_dir, *common, "--grid", "somewhere")
    assert "no axis 'step'. Did you mean 'steps'?" in refused(*run, "--grid", "step=2")
    assert "Known: preset, steps" in refused(*run, "--grid", "seed=1,2")
    assert "--grid steps=few is not a whole number" in refused(*run, "--grid", "steps=2,few")
    assert "--grid steps=0 is out of range" in refused(*run, "--grid", "steps=2,0")
    assert "--grid cfg_scale= is not a number" in refused(*run, "--grid", "cfg_scale=1,,2")
    assert "--grid solver=dmp is not known: write one of ddpm, dpm" in refused(*run, "--grid", "solver=dmp")
    assert "--grid preset=slow is not known: write one of exact" in refused(*run, "--grid", "preset=slow")
    assert "--grid diffusion_steps=many is not a respacing" in refused(*run, "--grid", "diffusion_steps=many")
    assert "the axis steps twice" in refused(*run, "--grid", "steps=2", "steps=3")
    assert "drop --steps" in refused(*run, "--steps", 8, "--grid", "steps=4,8")
    assert "name the axes" in refused(*run, "--preset", "fast", "--grid")
    assert "write --repeats 1 or more" in refused(*run, "--grid", "steps=2", "--repeats", 0)
    assert "add --grid" in refused(*run, "--repeats", 2)
    assert "is not a .json" in refused(*run, "--grid", "steps=2", "--out", tmp_path / "grid.png")
    said = refused(*run, "--grid", "solver=ddpm,dpm", "diffusion_steps=1,2")
    assert "--grid at solver=dpm diffusion_steps=1: solver=dpm needs at least 2" in said
    assert "--grid at prior_steps=200: 200 prior steps" in refused(*run, "--grid", "prior_steps=2,200")
    assert "diffusion_steps=9: a section of 6" in refused(*run, "--diffusion-start", 5, "--grid", "diffusion_steps=2,9")
    assert "0..2" in refused(*run, "--labels", "3", "--grid", "steps=2")
    assert "at least 2 images" in refused("evaluate", run_dir, *common, "--count", 1, "--grid", "steps=2")
    make_pipeline("none").save_pretrained(tmp_path / "plain")
    assert "no prior" in refused("evaluate", tmp_path / "plain", *common, "--grid")
    (run_dir / "eval").mkdir()
    (run_dir / "eval" / "0-6-grid.json").write_text("[]")
    assert "is not a grid" in refused(*run, "--grid", "steps=2")
    assert not (run_dir / "samples").exists() and not (tmp_path / "plain-samples").exists()  # all before any is drawn
    # rows and samples of others are not mixed with one's own
    (run_dir / "eval" / "0-6-grid.json").unlink()
    assert mixar(*run, "--grid", "steps=2")[0] == 0
    other = ("--reference", run_dir / "samples" / "0-6-steps-2", "--extractor", classifier, "--count", 6)
    assert "rows of other reference" in refused("evaluate", run_dir, *other, "--grid", "steps=3")
    assert mixar("sample", run_dir, "--count", 6, "--out", run_dir / "samples" / "0-6-steps-3")[0] == 0
    assert "holds samples of other sampling" in refused(*run, "--grid", "steps=4,3")
    assert not (run_dir / "samples" / "0-6-steps-4").exists()
