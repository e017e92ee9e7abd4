import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixar.config import DataConfig
from mixar.data.batch import Picks
from mixar.data.images import BrokenImageError, ImageSet, ImageSource, adm_crop, open_images, split, training_images
from mixar.errors import UserError

SIZES = [(67, 131, 16), (131, 67, 16), (33, 32, 16), (20, 57, 32), (16, 16, 16)]


def test_folder_classes_are_the_sorted_sub_folders(folder):
    images = open_images(DataConfig(images=str(folder)))
    assert images.classes == ["cat", "dog"]
    assert images.labels == [0] * 25 + [1] * 15
    assert images.keys[0] == "cat/00.png" and images.keys[-1] == "dog/39.png"
    assert images.load(3).mode == "RGB"
    assert np.array_equal(images.load(30), Image.open(folder / "dog/30.png"))


def test_flat_folder_is_one_class(folder):
    images = open_images(DataConfig(images=str(folder / "dog")))
    assert images.classes == ["dog"] and set(images.labels) == {0} and len(images) == 15


def test_grey_palette_and_transparent_images_become_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "CMYK"):
        Image.new(mode, (8, 8)).save(tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    images = open_images(DataConfig(images=str(tmp_path)))
    assert len(images) == 4 and all(images.load(i).mode == "RGB" for i in range(4))


@pytest.mark.parametrize("header", ["", "file,label\n"])
@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [(("wolf", "ant", "wolf"), ["ant", "wolf"], [1, 0, 1]), (("2", "0", "2"), ["0", "1", "2"], [2, 0, 2])],
)
def test_csv_gives_the_labels(folder, tmp_path, header, labels, classes, expected):
    table = tmp_path / "labels.csv"
    files = ("dog/30.png", "cat/00.png", "cat/01.png")
    table.write_text(header + "\n".join(f"{file}, {label}" for file, label in zip(files, labels)))
    images = open_images(DataConfig(images=str(folder), labels=str(table)))
    assert images.classes == classes and images.labels == expected and images.keys == list(files)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_mistakes_say_what_to_write(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed" / "a").mkdir(parents=True)
    for name in ("b.png", "a/c.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / "mixed" / name)
    table = tmp_path / "labels.csv"
    cases = [
        (DataConfig(), "data.images=FOLDER"),
        (DataConfig(images="digit"), "Did you mean 'digits'"),
        (DataConfig(images=str(tmp_path / "emty")), f"Did you mean '{tmp_path}/empty'"),
        (DataConfig(images=str(tmp_path / "empty")), "no images in"),
        (DataConfig(images=str(tmp_path / "mixed")), "beside its class folders"),
        (DataConfig(images=str(folder), classes=1), "write data.classes=2"),
        (DataConfig(images=str(folder), labels=str(tmp_path / "none.csv")), "cannot be read"),
        (DataConfig(images=str(folder), labels=write(table, "cat/00.png,0\ncat/99.png,1")), "1 files that are not in"),
        (DataConfig(images=str(folder), labels=write(tmp_path / "a.csv", "cat/00.png,7"), classes=5), "data.classes=8"),
        (DataConfig(images=str(folder), labels=write(tmp_path / "b.csv", "cat/00.png")), "file,label"),
        (DataConfig(images=str(folder), labels=write(tmp_path / "c.csv", "")), "file,label"),
        (DataConfig(images=str(folder), held_out=40), "data.held_out"),
    ]
    for config, message in cases:
        with pytest.raises(UserError) as error:
            training_images(config)
        assert message in str(error.value), str(error.value)


def test_broken_files_are_named(tmp_path, folder):
    whole = (folder / "cat/00.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    images = open_images(DataConfig(images=str(tmp_path)))
    for i, name in enumerate(("text.png", "torn.png")):
        with pytest.raises(BrokenImageError, match=name):
            images.load(i)


def test_built_in_digits():
    images = open_images(DataConfig(images="digits"))
    pixels = np.stack([np.asarray(images.load(i)) for i in range(0, 5000, 100)])
    assert len(images) == 5000 and np.bincount(images.labels).tolist() == [500] * 10
    assert pixels.shape[1:] == (32, 32, 3) and pixels.max() > 250
    assert pixels[:, :2].max() == 0 and pixels[:, :, -2:].max() == 0


def test_a_set_that_needs_the_internet_says_what_to_do(monkeypatch, tmp_path):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"data\.images=digits"):
        open_images(DataConfig(images="cifar10", cache=str(tmp_path)))


@pytest.mark.parametrize(("width", "height", "size"), SIZES)
def test_crop_is_the_middle_of_a_halved_and_scaled_image(width, height, size):
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    halvings = max(0, int(math.log2(min(width, height) / size)))
    expected = Image.fromarray(pixels)
    for _ in range(halvings):
        expected = expected.resize((expected.width // 2, expected.height // 2), Image.Resampling.BOX)
    w, h = expected.size
    w, h = (size, round(h * size / w)) if w <= h else (round(w * size / h), size)
    middle = np.asarray(expected.resize((w, h), Image.Resampling.BICUBIC))
    top, left = (h - size) // 2, (w - size) // 2
    assert np.array_equal(adm_crop(Image.fromarray(pixels), size), middle[top : top + size, left : left + size])


def test_halving_is_a_mean_of_four():
    pixels = np.random.default_rng(2).integers(0, 256, (32, 32, 3), np.uint8)
    mean = pixels.reshape(16, 2, 16, 2, 3).mean((1, 3))
    assert np.abs(np.asarray(adm_crop(Image.fromarray(pixels), 16)) - mean).max() <= 1  # PIL rounds after each axis


def test_split_is_stratified_disjoint_and_repeatable(folder):
    images = open_images(DataConfig(images=str(folder)))
    train, held = split(images, 8, seed=3)
    assert np.bincount(held.labels).tolist() == [5, 3]
    assert sorted(train.keys + held.keys) == images.keys
    assert held.classes == images.classes
    assert split(images, 8, seed=3)[1].keys == held.keys != split(images, 8, seed=4)[1].keys
    assert np.array_equal(held.load(0), images.load(images.keys.index(held.keys[0])))


def test_image_source_crops_and_flips():
    pixels = np.random.default_rng(3).integers(0, 256, (2, 16, 16, 3), np.uint8)
    source = ImageSource(ImageSet(["a", "b"], [0, 1], ["x", "y"], list(pixels)), 16)
    image, label, key = source[1]
    assert (label, key, image.dtype) == (1, "y", torch.uint8)
    assert np.array_equal(image.permute(1, 2, 0), pixels[1])
    batch = source.read(Picks(torch.tensor([7, 8]), [1, 0], [True, False]))
    assert batch.keys == ["y", "x"] and batch.labels.tolist() == [1, 0] and batch.index.tolist() == [7, 8]
    assert torch.equal(batch.images[0], image.flip(-1)) and torch.equal(batch.images[1], source[0][0])
