"""Folders and tables as people keep them."""

import os
import shutil
import tempfile
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from mixar.config import DataConfig
from mixar.data.images import open_images
from mixar.errors import UserError


def fill(root: Path, *names: str | bytes) -> Path:
    """A folder with a small image, or for other suffixes a text, at each of `names`."""
    for name in names:
        path = root / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".png", ".jfif", ".avif", ".ppm"):
            Image.new("RGB", (4, 4)).save(path)
        else:
            path.write_text("text")
    return root


def opened(root: Path, labels: str | Path | None = None):
    return open_images(DataConfig(images=str(root), labels=labels and str(labels), classes=10**6))


def refusal(root: Path, labels: Path | None = None) -> str:
    with pytest.raises(UserError) as error:
        opened(root, labels)
    return str(error.value)


def test_numbers_are_sorted_as_numbers_and_names_as_text(tmp_path):
    images = opened(fill(tmp_path / "numbers", "10/a.png", "2/b.png", "1/c.png"))
    assert images.classes == ["1", "2", "10"] and images.keys == ["1/c.png", "2/b.png", "10/a.png"]
    assert images.labels == [0, 1, 2]
    names = ["n01440764", "n01443537", "n1", "n10", "n2"]  # as torchvision's ImageFolder
    assert opened(fill(tmp_path / "names", *(f"{name}/a.png" for name in reversed(names)))).classes == names


def test_links_are_followed_but_not_in_a_circle(tmp_path):
    fill(tmp_path / "elsewhere", "cat/a.png", "b.png")
    root = fill(tmp_path / "set", "dog/c.png")
    (root / "cat").symlink_to(tmp_path / "elsewhere/cat")
    (root / "dog/b.png").symlink_to(tmp_path / "elsewhere/b.png")
    (root / "dog/all").symlink_to(root)
    (root / "dog/self.png").symlink_to("self.png")
    images = opened(root)
    assert images.classes == ["cat", "dog"] and images.keys == ["cat/a.png", "dog/b.png", "dog/c.png"]
    assert images.skipped == {"broken links or devices": ["dog/self.png"], "links in a circle": ["dog/all"]}


def test_a_link_to_nothing_is_no_class_that_vanishes(tmp_path):
    root = fill(tmp_path, "dog/c.png")
    (root / "cat").symlink_to(tmp_path / "unmounted")
    assert "cat cannot be read (it links to nothing)" in refusal(root)


def test_what_is_left_out_is_told_with_its_reason(tmp_path):
    root = fill(
        tmp_path, "cat/a.png", "cat/b.jfif", "cat/c.avif", "cat/d.ppm", "cat/e.heic", "cat/f.HEIC", "cat/notes.txt",
        "cat/.ipynb_checkpoints/a-checkpoint.png", "cat/@eaDir/a.png", "__MACOSX/cat/a.png", ".thumbs/a.png",
        "cat/._a.png", "cat/folder.png/g.png", "docs/readme.txt",
    )  # fmt: skip
    images = opened(root)
    assert images.classes == ["cat"]
    assert images.keys == ["cat/a.png", "cat/b.jfif", "cat/c.avif", "cat/d.ppm", "cat/folder.png/g.png"]
    assert {reason: len(names) for reason, names in images.skipped.items()} == {
        ".heic": 2, ".txt": 2, "folders without images": 1, "hidden": 5,
    }  # fmt: skip
    assert "left out: 2 .heic (cat/e.heic, ...); 2 .txt (cat/notes.txt, ...); 1 folders without" in images.left_out()
    assert images.subset([0]).skipped == images.skipped
    assert "1 .txt (readme.txt)" in refusal(root / "docs")


def test_a_folder_that_cannot_be_read_shifts_no_label():
    root = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    try:
        root.chmod(0o755)
        fill(root, "cat/a.png", "dog/b.png")
        (root / "cat").chmod(0)
        if os.geteuid() == 0:
            os.seteuid(65534)
        message = refusal(root)
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        (root / "cat").chmod(0o755)
        shutil.rmtree(root)
    assert f"{root}/cat cannot be read (Permission denied)" in message


def test_two_spellings_of_one_name_are_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    root = fill(tmp_path / "set", f"{composed}/a.png", f"{decomposed}/b.png")
    images = opened(root)
    assert images.classes == [composed] and len(images) == len(set(images.keys)) == 2
    table = tmp_path / "a.csv"
    table.write_text("".join(f"{key},{name}\n" for key, name in zip(images.keys, (composed, decomposed))), "utf-8")
    assert opened(root, table).classes == [composed]


def test_names_that_are_no_utf_8(tmp_path):
    images = opened(fill(tmp_path, b"caf\xe9/\xff.png"))
    assert images.classes == [r"caf\xe9"] and images.keys == [r"caf\xe9/\xff.png"]
    assert images.load(0).size == (4, 4)


def test_control_characters_are_told_as_escapes(tmp_path):
    fill(tmp_path, "cat/a.png", "b\x1b[2J\n.png")
    assert r"such as b\x1b[2J\n.png" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png,cat\nb.png,dog\n./a.png,dog", "2 rows for a.png, with the labels cat, dog"),
        ("../a.png,cat", "leads out of the folder"),
        ("sub/../../a.png,cat", "leads out of the folder"),
        ("/etc/passwd,cat", "leads out of the folder"),
        ("a.png,cat\nb.png, ", "has no label"),
        ("a.png,0\nb.png,999999999999", "too large a number"),
        ("a.png,0\nb.png,-1", "whole number of at least 0"),
        ("a.png,1.0\nb.png,2.0", "whole number of at least 0"),
        ("a.png,chat\nb.png,caf\xe9", "not a csv in UTF-8"),
    ],
)
def test_tables_that_are_wrong(tmp_path, text, message):
    root = fill(tmp_path / "set", "a.png", "b.png")
    fill(tmp_path, "a.png")
    (tmp_path / "a.csv").write_text(text, "latin-1")
    assert message in refusal(root, tmp_path / "a.csv")


def test_a_table_from_excel(tmp_path):
    (tmp_path / "a.csv").write_text("file,label\r\na.png,Löwe\r\n", "utf-8-sig")
    assert opened(fill(tmp_path, "a.png"), tmp_path / "a.csv").classes == ["Löwe"]
