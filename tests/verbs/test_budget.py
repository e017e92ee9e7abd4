"""What a demo finds out about a set of images, and how it divides its minutes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixar.config import load_config
from mixar.data.image_set import ImageSet
from mixar.data.images import open_images
from mixar.demo.budget import SHARES, START, Survey, seconds_of
from mixar.demo.stages import Demo, Length
from mixar.errors import UserError
from mixar.weights import describe_export


def image_set(images: np.ndarray, classes: int = 2) -> ImageSet:
    """Images uint8 [n, H, W, 3] with labels 0, 1, ... in turn."""
    labels = [i % classes for i in range(len(images))]
    return ImageSet(
        [f"class {label}" for label in range(classes)], labels, [f"{i}" for i in range(len(images))], list(images)
    )


def ramps(side: str, colour: int, count: int = 200, size: int = 32) -> np.ndarray:
    """Noisy images that grow brighter to the right, or in half of them to the left."""
    rng = np.random.default_rng(0)
    images = (
        rng.integers(0, 100, (count, size, size, 1)) + np.linspace(0, 100, size)[:, None] + np.array([0, colour, 0])
    )
    if side == "either":
        images[: count // 2] = images[: count // 2, :, ::-1]
    return images.clip(0, 255).astype(np.uint8)


def test_digits_are_signs_and_photographs_have_no_side() -> None:
    digits = Survey.of(open_images(load_config("demo/vae").data), 32)
    assert digits.colour == 0 and not digits.mirrored and not digits.photographs


@pytest.mark.parametrize(
    ("side", "colour", "mirrored", "photographs"),
    [("one", 0, False, False), ("either", 0, True, True), ("one", 40, False, True), ("either", 40, True, True)],
)
def test_colour_or_missing_sides_make_photographs(side: str, colour: int, mirrored: bool, photographs: bool) -> None:
    survey = Survey.of(image_set(ramps(side, colour)), 32)
    assert (survey.mirrored, survey.photographs) == (mirrored, photographs)
    assert survey.enlarged == 0 and ("in colour" in str(survey)) == (colour > 0)


def test_few_images_per_class_do_not_look_one_sided() -> None:
    """Five images never share a side by chance: the noise of so few is taken off."""
    noise = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3)).astype(np.uint8)
    assert abs(Survey.of(image_set(noise, classes=10), 32).one_sided) < 0.005


def test_small_images_are_counted_and_equal_ones_refused() -> None:
    assert "100% are enlarged" in str(Survey.of(image_set(ramps("one", 40, size=16)), 32))
    with pytest.raises(UserError, match="all alike"):
        Survey.of(image_set(np.repeat(ramps("one", 40, count=1), 50, 0)), 32)


def test_what_a_stage_leaves_over_the_later_ones_share() -> None:
    assert sum(SHARES.values()) == pytest.approx(1)
    spent: dict[str, float] = {}
    for stage in SHARES:  # each takes half of what it may
        spent[stage] = seconds_of(stage, 60, spent) / 2
    assert 2 * spent["scores"] == pytest.approx(3600 - (sum(spent.values()) - spent["scores"]))
    assert seconds_of("mixar", 1, {"vae": 3600.0}) == START  # nothing is left


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, pixels in enumerate(ramps("either", 40, count=80)):
        (tmp_path / "photos" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (("--minutes", "0.5"), "write --minutes 3 or more"),
        (("--minutes", "-1"), "not a number of minutes"),
        (("--minutes", "nan"), "not a number of minutes"),
        (("--minutes", "an hour"), "not a number of minutes"),
    ],
)
def test_impossible_minutes_are_refused(
    refused, folder: Path, tmp_path: Path, flags: tuple[str, ...], fault: str
) -> None:
    assert fault in refused("demo", "--images", folder, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out" / "classifier").exists()


def test_a_class_of_one_image_is_refused(refused, folder: Path, tmp_path: Path) -> None:
    (folder / "c").mkdir()
    shutil.copy(next((folder / "a").iterdir()), folder / "c")
    said = refused("demo", "--images", folder, "--out", tmp_path / "out")
    assert "1 images of the class c: give each class at least 4" in said


@pytest.mark.slow
def test_a_stage_keeps_the_length_that_it_began_with(folder: Path, tmp_path: Path) -> None:
    """Also if the demo goes on with other minutes, which are those of the stages to come."""
    torch.manual_seed(0)
    first = Demo(tmp_path / "out", str(folder), Length(), minutes=3.0)
    first.train("vae")
    chosen = json.loads((tmp_path / "out" / "chosen.json").read_text())
    seen = describe_export(first.export_of("vae"))["images"]
    assert set(chosen) == {"vae"} and chosen["vae"]["count"] <= seen < chosen["vae"]["count"] + 32
    assert not (tmp_path / "out" / "vae-pace").exists()

    again = Demo(tmp_path / "out", str(folder), Length(), minutes=30.0)
    assert again.share("vae") * 4 * 4500 == pytest.approx(seen, abs=32)
    assert seconds_of("prior", 30.0, again.stages) > 5 * seconds_of("prior", 3.0, again.stages)
