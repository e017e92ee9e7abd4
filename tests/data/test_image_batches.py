import numpy as np
import pytest
import torch
from PIL import Image

from mixar.data.image_batches import read_images
from mixar.data.npz import write_npz
from mixar.errors import UserError


def _write(folder, name, size=(8, 8), value=0):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 255)).save(folder / name)


def test_a_folder_is_read_in_order_and_more_than_once(tmp_path):
    for index, name in enumerate(("a/2.png", "b/1.png", "b/0.jpg")):
        _write(tmp_path, name, value=index * 100)
    images = read_images(tmp_path, batch=2)
    assert (images.count, len(images)) == (3, 2) and images.labels.tolist() == [0, 1, 1]
    for _ in range(2):
        first, second = images
        assert first.shape == (2, 3, 8, 8) and first.dtype == torch.uint8
        assert first[0, 0, 0, 0] == 0 and abs(int(first[1, 0, 0, 0]) - 200) < 4 and second[0, 0, 0, 0] == 100


def test_sizes_are_one_or_cropped_to_one(tmp_path):
    _write(tmp_path, "0.png", (8, 8))
    _write(tmp_path, "1.png", (12, 9))
    with pytest.raises(UserError, match=r"1\.png is 12x9, the first image is 8x8"):
        list(read_images(tmp_path))
    (cropped,) = read_images(tmp_path, size=8)
    assert cropped.shape == (2, 3, 8, 8)


def test_unreadable_collections_are_refused(tmp_path):
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    np.savez(tmp_path / "grey.npz", np.zeros((2, 8, 8), np.uint8))
    np.savez(tmp_path / "none.npz", np.zeros((0, 8, 8, 3), np.uint8))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "grey.npz").read_bytes()[:200])
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.png").write_bytes(b"no image")
    for name, fault in (
        ("other.npz", "expected in `arr_0`"),
        ("grey.npz", r"uint8 \[2, 8, 8\]"),
        ("none.npz", r"uint8 \[0, 8, 8, 3\]"),
        ("absent.npz", "no images at"),
        ("cut.npz", "broken file"),
        ("empty", "no images in"),
        ("broken", "cannot be read"),
        ("absent", "neither a folder"),
    ):
        with pytest.raises(UserError, match=fault):
            list(read_images(tmp_path / name))


def test_npz_round_trip_in_the_form_that_numpy_reads(tmp_path):
    images = torch.randint(0, 256, (5, 3, 6, 7), dtype=torch.uint8)
    labels = torch.tensor([3, 1, 4, 1, 5])
    write_npz(tmp_path / "samples.npz", images.split(2), 5, labels)
    with np.load(tmp_path / "samples.npz") as npz:
        assert np.array_equal(npz["arr_0"], images.permute(0, 2, 3, 1).numpy())
        assert npz["arr_0"].dtype == np.uint8 and npz["arr_1"].tolist() == labels.tolist()
    read = read_images(tmp_path / "samples.npz", batch=3)
    assert (read.count, len(read)) == (5, 2) and torch.equal(read.labels, labels)
    assert torch.equal(torch.cat(list(read)), images)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_others_is_read(tmp_path, save):
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 5, 3), np.uint8)
    save(tmp_path / "theirs.npz", images)
    read = read_images(tmp_path / "theirs.npz")
    assert read.labels is None
    assert np.array_equal(torch.cat(list(read)).permute(0, 2, 3, 1).numpy(), images)


def test_a_write_that_fails_leaves_nothing(tmp_path):
    def batches():
        yield torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
        raise RuntimeError("the sampler broke")

    with pytest.raises(RuntimeError, match="sampler"):
        write_npz(tmp_path / "samples.npz", batches(), 2)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        write_npz(tmp_path / "file" / "samples.npz", batches(), 2)
