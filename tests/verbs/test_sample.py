"""`mixar sample`: files, names, going on, other settings, refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from mixar.codecs import VAE
from mixar.sampling import MixARPipeline
from mixar.sampling.sample_set import parse_labels
from mixar.weights import read_export, write_export

pytestmark = pytest.mark.slow  # as a whole: commands, compilers or many processes


def pixels(folder):
    return {file.name: np.asarray(Image.open(file)).copy() for file in folder.glob("*.png")}


def test_draws_what_the_pipeline_draws(mixar, run_dir):
    flags = ("--labels", "2,0-1", "--count", 5, "--seed", 40, "--grid", "--precision", "fp32")
    status, said, _ = mixar("sample", run_dir, *flags)
    folder = run_dir / "samples" / "40-5-labels-2,0-1"
    assert status == 0 and f"mixar evaluate --samples {folder}" in said
    images = MixARPipeline.from_pretrained(run_dir, "cpu", "fp32")([2, 0, 1, 2, 0], range(40, 45))
    drawn = pixels(folder)
    assert sorted(drawn) == ["40-2.png", "41-0.png", "42-1.png", "43-2.png", "44-0.png"]
    for name, image in zip(sorted(drawn), images):
        assert np.array_equal(drawn[name], image.permute(1, 2, 0))
    assert Image.open(f"{folder}-grid.png").width > 5 * 16


def test_too_little_memory_is_told_as_a_flag_that_resumes(mixar, refused, run_dir, monkeypatch):
    command, decode = ("sample", run_dir, "--count", 5, "--precision", "fp32"), VAE.decode

    def of_a_small_card(vae, latents):
        if len(latents) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return decode(vae, latents)

    monkeypatch.setattr(VAE, "decode", of_a_small_card)
    assert "out of memory for 4 images at once: write --batch 2" in refused(*command)
    assert mixar(*command, "--batch", 2)[0] == 0 and len(pixels(run_dir / "samples" / "0-5")) == 5


def test_goes_on_where_it_stopped(mixar, run_dir):
    command = ("sample", run_dir, "--count", 6, "--batch", 2, "--precision", "fp32")
    assert mixar(*command)[0] == 0
    folder = run_dir / "samples" / "0-6"
    whole, kept = pixels(folder), folder / "3-0.png"
    for name in ("1-1.png", "5-2.png"):
        (folder / name).unlink()
    before = kept.stat().st_mtime_ns
    assert mixar(*command)[0] == 0
    assert kept.stat().st_mtime_ns == before
    again = pixels(folder)
    assert again.keys() == whole.keys()
    assert all(np.abs(again[name].astype(int) - whole[name]).max() <= 1 for name in whole)


def test_flags_override_the_export(mixar, refused, run_dir, tmp_path):
    flags = ("--steps", 2, "--diffusion-steps", "2,1", "--cfg-scale", 1.5, "--temperature", 0.9, "--prior-steps", 3,
             "--prior-cfg-scale", 0, "--batch", 3, "--seed", 5)  # fmt: skip
    assert mixar("sample", run_dir, "--count", 2, *flags)[0] == 0
    (folder,) = (run_dir / "samples").iterdir()
    sampling = json.loads((folder / "sampling.json").read_text())["sampling"]
    assert sampling["steps"] == 2 and sampling["diffusion_steps"] == "2,1" and sampling["cfg_scale"] == 1.5
    assert sampling["prior_steps"] == 3 and sampling["seed"] == 5
    assert mixar("sample", run_dir, "--count", 2)[0] == 0 and len(list((run_dir / "samples").iterdir())) == 2
    # one folder never holds two kinds of samples
    out = ("--count", 2, "--out", tmp_path / "mine")
    assert mixar("sample", run_dir, *out)[0] == 0
    assert "samples of other sampling" in refused("sample", run_dir, *out, "--cfg-scale", 1)


def test_npz_holds_the_same_images(mixar, run_dir):
    assert mixar("sample", run_dir, "--count", 5, "--precision", "fp32")[0] == 0
    assert mixar("sample", run_dir, "--count", 5, "--precision", "fp32", "--npz")[0] == 0
    folder = run_dir / "samples" / "0-5"
    with np.load(folder / "samples.npz") as npz:
        images, labels = npz["arr_0"], npz["arr_1"]
    assert labels.tolist() == [0, 1, 2, 0, 1]
    assert all(np.array_equal(image, pixels(folder)[f"{i}-{labels[i]}.png"]) for i, image in enumerate(images))


def program(*arguments):
    """The command line of a process of its own."""
    return [sys.executable, "-m", "mixar", *map(str, arguments)]


def test_an_npz_goes_on_after_signals(refused, run_dir, tmp_path):
    flags = ("--count", 12, "--batch", 2, "--npz", "--steps", 2)
    folder = run_dir / "samples" / "0-12-steps-2"
    command = program("sample", run_dir, *flags)
    for number, awaited, status in ((signal.SIGKILL, "0.npy", -9), (signal.SIGTERM, "4.npy", 130)):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while not (folder / ".samples" / awaited).exists():
            assert process.poll() is None, "the sampling ended early"
            time.sleep(0.001)
        process.send_signal(number)
        complaint = process.communicate()[1]
        assert process.returncode == status and not (folder / "samples.npz").exists()
    assert "mixar sample: interrupted; the same command resumes where it stopped" in complaint
    kept = folder / ".samples" / "0.npy"
    (folder / ".samples" / ".samples.npz.0.part").touch()  # as a kill while the npz is put together leaves it
    before = kept.stat().st_mtime_ns
    assert "samples of other sampling" in refused("sample", run_dir, *flags, "--cfg-scale", 1, "--out", folder)
    assert kept.stat().st_mtime_ns == before
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert sorted(os.listdir(folder)) == ["samples.npz", "sampling.json"]
    whole = subprocess.run([*command, "--out", str(tmp_path / "whole")], capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    assert (folder / "samples.npz").read_bytes() == (tmp_path / "whole" / "samples.npz").read_bytes()


def test_weights_decide_not_paths(mixar, refused, run_dir, tmp_path, monkeypatch):
    out = ("--count", 2, "--out", tmp_path / "out")
    assert mixar("sample", run_dir, *out)[0] == 0
    before = pixels(tmp_path / "out")
    copied = shutil.copytree(run_dir / "exports" / "7-ema", tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    for spelling in ("./run/", "run/exports/7-ema", run_dir.absolute(), copied):
        (tmp_path / "out" / "1-1.png").unlink()
        assert mixar("sample", spelling, *out)[0] == 0
    assert pixels(tmp_path / "out").keys() == before.keys()
    # a record that was written before there were these fields and settings
    record = json.loads((tmp_path / "out" / "sampling.json").read_text())
    del record["latents"], record["sampling"]["solver"]
    (tmp_path / "out" / "sampling.json").write_text(json.dumps(record))
    assert mixar("sample", run_dir, *out)[0] == 0
    # other weights under the same path, and another normalisation of the latents
    about, state = read_export(copied, "mixar")
    for change, other in (("weights", "weights"), ("latents", "latents")):
        shutil.rmtree(run_dir / "exports" / "7-ema")
        shutil.copytree(copied, run_dir / "exports" / "7-ema")
        export = run_dir / "exports" / "7-ema"
        (export / "model.safetensors").unlink()
        name = next(iter(state))
        changed = {**state, name: state[name] + 1} if change == "weights" else state
        latents = about["latents"] | ({"mean": [0.5] * 4} if change == "latents" else {})
        write_export(tmp_path / change, "mixar", about["config"], changed, sample=about["sample"], latents=latents)
        for file in ("model.safetensors", "config.json"):
            shutil.copy(tmp_path / change / file, export / file)
        assert f"samples of other {other}:" in refused("sample", run_dir, *out)


def test_images_of_others_are_left_alone(mixar, refused, run_dir, tmp_path):
    for name in ("cat.png", "0-0.png"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        Image.new("RGB", (16, 16)).save(folder / name)
        assert "without a record of how they were sampled" in refused("sample", run_dir, "--count", 1, "--out", folder)
        assert os.listdir(folder) == [name]
    assert mixar("sample", run_dir, "--count", 2)[0] == 0
    folder = run_dir / "samples" / "0-2"
    (folder / "0-0.png").write_bytes(b"no picture")
    assert "has changed since it was written" in refused("sample", run_dir, "--count", 2, "--grid")
    for record in ("{", "[]", "{}", '{"sampling": {"seed": "x"}}'):
        (folder / "sampling.json").write_text(record)
        assert "sampling.json is not what" in refused("sample", run_dir, "--count", 2)


def test_many_labels_make_a_short_name(mixar, run_dir):
    labels = ",".join(["0", "1", "2"] * 50)
    for first in (labels, labels.replace("0", "1")):
        assert mixar("sample", run_dir, "--labels", first, "--count", 1, "--steps", 1)[0] == 0
    names = sorted(path.name for path in (run_dir / "samples").iterdir())
    assert len(names) == 2 and all(len(name) == 245 and name.startswith("0-1-labels-") for name in names)
    assert mixar("sample", run_dir, "--labels", labels, "--count", 1, "--steps", 1)[0] == 0
    assert sorted(path.name for path in (run_dir / "samples").iterdir()) == names


def test_the_output_is_tried_before_weights_are_read(refused, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write" in refused("sample", tmp_path / "no-run", "--out", tmp_path / "file" / "deep")


def test_an_export_stays_as_it_was(mixar, tmp_path, release):
    export = shutil.copytree(release, tmp_path / "tiny")
    before = sorted(export.rglob("*"))
    assert mixar("sample", export)[0] == 0
    assert sorted(export.rglob("*")) == before
    assert len(pixels(tmp_path / "tiny-samples" / "0-3")) == 3


def test_as_a_program(run_dir):
    command = [sys.executable, "-m", "mixar", "sample", str(run_dir), "--labels", "1", "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 images: " in done.stdout and (run_dir / "samples/0-1-labels-1-steps-1/0-1.png").is_file()
    wrong = subprocess.run([*command, "--cfg-scale", "high"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "--cfg-scale" in wrong.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--labels", "3"], "0..2"),
        (["--labels", "cat"], "--labels 3,7,7"),
        (["--labels", "2-0"], "--labels 3,7,7"),
        (["--labels", "0-99999999999"], "the last class that a model can have"),
        (["--count", "99999999999"], "write a value from 1 to 10000000"),
        (["--cfg-interval", "x"], "write --cfg-interval 0.25,1"),
        (["--out", ""], "is empty: write it, or leave its flag out"),
        (["--count", "0"], "write a value from 1 to 10000000"),
        (["--steps", "0"], "--steps 0 is out of range"),
        (["--temperature=-1"], "--temperature -1.0 is out of range"),
        (["--batch", "0"], "--batch 0 is out of range"),
        (["--prior-cfg-scale", "nan"], "--prior-cfg-scale nan is out of range"),
        (["--diffusion-steps", "many"], "--diffusion-steps many is not a respacing"),
        (["--diffusion-steps", "1001"], "--diffusion-steps 1001"),
        (["--prior-steps", "200"], "128 or fewer"),
        (["--out", "/proc/none"], "cannot write"),
    ],
)
def test_refusals(refused, run_dir, flags, says):
    assert says in refused("sample", run_dir, *flags)
    assert not (run_dir / "samples").exists()
    assert "samples of other" not in refused("sample", run_dir, "--steps", 0)


def test_nothing_to_draw_from(refused, tmp_path, make_pipeline):
    assert "mixar export" in refused("sample", tmp_path)
    make_pipeline().save_pretrained(tmp_path / "tiny")
    assert "kind 'prior'" in refused("sample", tmp_path / "tiny" / "prior")


def test_labels():
    assert parse_labels("3,7,7") == [3, 7, 7]
    assert parse_labels("0-2,9,5-5") == [0, 1, 2, 9, 5]
