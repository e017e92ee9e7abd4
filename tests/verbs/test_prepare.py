"""`mixar prepare` as it is called: what it shows, refuses, survives; and who prepares what under Slurm."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from streaming import LocalDataset

from mixar import slurm
from mixar.weights import read_export, write_export

COMMAND = [sys.executable, "-m", "mixar", "prepare"]


def photos(root: Path, count: int) -> Path:
    """A folder of links to one image that takes a while to read."""
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8)
    (root / "set/a").mkdir(parents=True)
    Image.fromarray(noise).save(root / "noise.png")
    for i in range(count):
        (root / f"set/a/{i:03d}.png").symlink_to(root / "noise.png")
    return root / "set"


def test_a_list_tells_what_would_be_made(mixar, home, tmp_path) -> None:
    for name, mode, size in [("2/a.png", "RGB", (20, 30)), ("10/b.png", "I;16", (8, 8)), ("10/c.png", "LA", (70, 50))]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new(mode, size).save(tmp_path / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "2/d.jpg", exif=exif)
    (tmp_path / "2/e.heic").write_text("")
    (tmp_path / "2/f.png").write_text("no image")
    before = sorted(tmp_path.rglob("*"))
    given = (f"data.images={tmp_path}", "data.classes=10", "vae.weights=/none", "tokenizer.weights=/none")
    status, out, _ = mixar("prepare", home / "config.yaml", "--list", *given)
    assert status == 0 and sorted(tmp_path.rglob("*")) == before
    assert out.splitlines()[:3] == ["  label    images  class", "      0         3  2", "      1         2  10"]
    for line in (
        f"5 images of 2 classes in {tmp_path}",
        "the config is for 10 classes: write data.classes=2",
        "sizes: 8x8 to 70x50, 1 to be enlarged to data.image_size=16",
        "modes: 2 RGB, 1 I;16, 1 LA",
        "turned by their EXIF: 1; transparent, laid over white: 1",
        "left out: 1 .heic (2/e.heic)",
        "that is more than data.max_broken=0.01 of the set: prepare would stop",
    ):
        assert line in out.splitlines(), out
    assert "1 cannot be read and would be skipped: 2/f.png (" in out


def test_what_is_wrong_is_told_before_codecs_are_read(refused, home, tmp_path) -> None:
    config, nothing = home / "config.yaml", ("vae.weights=/none", "tokenizer.weights=/none")
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file: Not a directory" in refused("prepare", config, f"data.shards={tmp_path}/file/x", *nothing)
    assert "data.images=/none" in refused("prepare", config, f"data.shards={tmp_path}/x", "data.images=/none", *nothing)
    assert "manifest.json is missing" in refused("prepare", config, "--verify", f"data.shards={tmp_path}/x", *nothing)
    given = ("prepare", config, "--pre-draw", f"data.shards={tmp_path}/x")
    assert "/none" in refused(*given, "prior.weights=/none")
    assert "write ti_mix.variants=4" in refused(*given, "ti_mix.variants=3")
    assert "has 2 classes, but the config has 3" in refused(*given, "data.classes=3")
    assert os.listdir(tmp_path) == ["file"]


def test_codecs_of_another_geometry_are_refused_before_anything_is_encoded(refused, home, tmp_path) -> None:
    folder = tmp_path / "shards"
    for change, says in (("tokenizer.bits=4", "has 6 bits per token, but the config has 4"),
                         ("tokenizer.kind=vq tokenizer.code_dim=3", "has maskbit as its kind, but the config has vq"),
                         ("vae.latent_channels=4", "has 3 latent channels, but the config has 4")):  # fmt: skip
        assert says in refused("prepare", home / "config.yaml", f"data.shards={folder}", *change.split())
    assert not folder.exists()


def test_shards_are_verified_by_the_codecs_that_made_them(refused, mixar, home, tmp_path) -> None:
    shutil.copytree(home / "shards", tmp_path / "shards")
    config, ours = home / "config.yaml", f"data.shards={tmp_path}/shards"
    assert mixar("prepare", config, "--verify", ours)[0] == 0 and (tmp_path / "shards/verify.png").exists()
    about, state = read_export(home / "vae", "vae")
    write_export(tmp_path / "vae", "vae", about["config"], {name: value + 1 for name, value in state.items()})
    assert "another vae" in refused("prepare", config, "--verify", ours, f"vae.weights={tmp_path}/vae")


@pytest.mark.slow
def test_signals_to_all_of_its_processes_end_it_cleanly(home, tmp_path) -> None:
    given = [home / "config.yaml", f"data.images={photos(tmp_path, 100)}", f"data.shards={tmp_path}/shards",
             "data.workers=4"]  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        process = subprocess.Popen([*COMMAND, *given], stderr=subprocess.PIPE, text=True, start_new_session=True)
        while not list(tmp_path.glob("shards/.part-*")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        os.killpg(process.pid, number)
        told = process.communicate()[1]
        assert process.returncode == 130 and "Traceback" not in told, told
        assert "mixar prepare: interrupted; the same command resumes where it stopped" in told
        assert [path.name for path in (tmp_path / "shards").iterdir()] == [".lock"]
    subprocess.run([*COMMAND, *given], check=True)
    assert len(LocalDataset(str(tmp_path / "shards"))) == 100


@pytest.mark.slow
def test_ranks_that_draw_beforehand_all_draw(home, tmp_path) -> None:
    given = [home / "config.yaml", f"data.shards={tmp_path}/shards", "--pre-draw", "--world=2", "ti_mix.variants=2"]
    ranks = [subprocess.Popen([*COMMAND, *given, f"--rank={rank}"], stdout=subprocess.PIPE) for rank in (1, 0)]
    for process in ranks:
        out, _ = process.communicate()
        assert process.returncode == 0 and b"64 images of 2 classes" in out
    assert len(LocalDataset(str(tmp_path / "shards/ti_mix"))) == 64
    assert json.loads((tmp_path / "shards/ti_mix/pre_drawn.json").read_text())["variants"] == 2


BATCH = {"PROCID": "0", "NTASKS": "8"}  # what a batch script has


def task(rank: int, world: int) -> dict[str, str]:
    """What a task of srun has more, or other."""
    return BATCH | {"STEP_ID": "0", "PROCID": str(rank), "STEP_NUM_TASKS": str(world)}


def element(place: int, first: int = 0, step: int = 1, count: int = 3) -> dict[str, str]:
    """What an element of an array has more."""
    given = {"ID": place, "MIN": first, "STEP": step, "COUNT": count}
    return {f"ARRAY_TASK_{name}": str(value) for name, value in given.items()}


@pytest.mark.parametrize(
    ("given", "share"),
    [
        ({}, (0, 1)),
        (BATCH, (0, 1)),
        (task(3, 8), (3, 8)),
        (element(2), (2, 3)),
        (BATCH | element(14, first=10, step=2), (2, 3)),
        (task(1, 4) | element(2), (9, 12)),
        (task(0, 1) | element(5, first=5, count=1), (0, 1)),  # one element sent again takes what nobody else does
        ({name: value for name, value in element(2).items() if name != "ARRAY_TASK_STEP"}, (2, 3)),
    ],
)
def test_shares_by_slurm(monkeypatch, given, share) -> None:
    for name, value in given.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert slurm.share() == share


def test_an_array_with_holes_is_refused(monkeypatch, refused) -> None:
    for name, value in element(5, first=1).items():  # of --array=1,2,5
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert "no rank 4 of 3: write --rank 0 to 2; for a Slurm array, --array=0-2" in refused("prepare", "config.yaml")
