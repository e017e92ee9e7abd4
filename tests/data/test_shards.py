import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from streaming import LocalDataset

from mixar import rng
from mixar.data.images import ImageSet, adm_crop, open_images
from mixar.data.manifest import check_manifest, read_manifest
from mixar.data.pre_draw import predraw
from mixar.data.shards import prepare, verify
from mixar.errors import PassingError, UserError
from mixar.prior import Prior, fill
from mixar.rng import Stream
from mixar.weights import fingerprint

pytestmark = pytest.mark.slow  # as a whole: commands, compilers or many processes


def rows(folder: str) -> list[dict]:
    return list(LocalDataset(folder))


def run(config, codecs, images=None, **options):
    images = images or open_images(config.data)
    return prepare(config, images, *codecs, "cpu", progress=False, **{"part_size": 16, **options})


def files(folder: str) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@torch.no_grad()
def test_a_row_is_both_flips_of_its_image(make_config, codecs, shards):
    images, (vae, tokenizer) = open_images(make_config().data), codecs
    stored = rows(shards)
    assert [row["key"] for row in stored] == images.keys
    assert [row["label"] for row in stored] == images.labels
    for i in (0, 17, 39):
        pixels = torch.from_numpy(np.array(adm_crop(images.load(i), 16))).permute(2, 0, 1)[None] / 255
        for flip, image in enumerate((pixels, pixels.flip(-1))):
            moments = vae.encode(image)[0].numpy()
            assert stored[i]["moments"].dtype == np.float16
            np.testing.assert_allclose(stored[i]["moments"][flip], moments, rtol=2e-3, atol=1e-4)
            assert stored[i]["codes"][flip].tolist() == tokenizer.encode(image)[0].tolist()


def test_any_streaming_program_can_read_the_set(shards):
    code = (
        "import sys\nfrom streaming import StreamingDataset\n"
        "print(*(row['key'] for row in StreamingDataset(local=sys.argv[1], batch_size=1)))"
    )  # in a process of its own: its shared memory and file descriptors stay open until that ends
    read = subprocess.run([sys.executable, "-c", code, shards], capture_output=True, text=True, check=True)
    assert read.stdout.split() == [row["key"] for row in rows(shards)]


def test_manifest_says_what_the_shards_are(make_config, codecs, shards):
    manifest, (vae, tokenizer) = read_manifest(shards), codecs
    assert (manifest.count, manifest.classes, manifest.class_counts) == (40, ["cat", "dog"], [25, 15])
    assert (manifest.image_size, manifest.crop, manifest.grid, manifest.code_grid) == (16, "adm", 4, 4)
    assert (manifest.latent_channels, manifest.code_bits, manifest.broken) == (3, 6, [])
    assert manifest.skipped == {".txt": 1}
    assert manifest.vae == fingerprint(vae.state_dict()) and manifest.tokenizer == fingerprint(tokenizer.state_dict())


def test_statistics_are_those_of_posterior_samples(shards):
    manifest = read_manifest(shards)
    moments = np.stack([row["moments"][0] for row in rows(shards)]).astype(np.float64)
    mean, logvar = moments[:, :3], moments[:, 3:]
    variance = np.exp(logvar).mean((0, 2, 3)) + mean.var((0, 2, 3))  # law of total variance
    np.testing.assert_allclose(manifest.latent_mean, mean.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(manifest.latent_std, np.sqrt(variance), rtol=1e-6)
    samples = mean + np.exp(logvar / 2) * np.random.default_rng(0).standard_normal((2000, *mean.shape))
    np.testing.assert_allclose(manifest.latent_std, samples.std((0, 1, 3, 4)), rtol=3e-3)


@dataclass(frozen=True)
class Deadly(ImageSet):
    """Kills its process, as `kill -9` does, when the last image but ten is asked for."""

    def load(self, i: int) -> Image.Image:
        if i == len(self) - 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(i)


def test_a_killed_run_goes_on_where_it_stopped(make_config, codecs, shards, tmp_path):
    config = make_config(f"data.shards={tmp_path}/killed")
    deadly = Deadly(**vars(open_images(config.data)))
    process = multiprocessing.get_context("fork").Process(target=run, args=(config, codecs, deadly))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert left[0] == ".lock" and left[1].startswith(".part-00001.") and left[2:] == ["part-00000"]
    with pytest.raises(UserError, match=r"manifest\.json is missing: 1 of 3 parts .* run `mixar prepare`"):
        read_manifest(config.data.shards)
    written = (tmp_path / "killed/part-00000/part.json").stat().st_mtime_ns

    run(config, codecs)
    assert (tmp_path / "killed/part-00000/part.json").stat().st_mtime_ns == written
    assert files(config.data.shards) == files(shards)


@dataclass(frozen=True)
class Noted(ImageSet):
    """Takes its time, and notes down each image that is asked for."""

    def load(self, i: int) -> Image.Image:
        with open(os.environ["NOTES"], "a") as notes:
            notes.write(f"{i}\n")
        time.sleep(0.02)
        return super().load(i)


def together(shares: list[tuple[int, int]], *args, **options) -> list[int | None]:
    """Processes that prepare one set at once; their exit statuses."""
    fork = multiprocessing.get_context("fork").Process
    ranks = [fork(target=run, args=args, kwargs=options | {"rank": rank, "world": world}) for rank, world in shares]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return [process.exitcode for process in ranks]


# two ranks, the same command twice, and an element of an array that is sent again alone
@pytest.mark.parametrize("shares", [[(0, 2), (1, 2)], [(0, 1), (0, 1)], [(0, 3), (1, 3), (2, 3), (0, 1)]])
def test_processes_share_the_parts(make_config, codecs, folder, shards, tmp_path, monkeypatch, shares):
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    config = make_config(f"data.shards={tmp_path}/shared")
    images = Noted(**vars(open_images(config.data)))
    assert together(shares, config, codecs, images) == [0] * len(shares)
    assert sorted(map(int, (tmp_path / "notes").read_text().split())) == list(range(40))  # each was written once
    assert files(config.data.shards) == files(shards)


@dataclass(frozen=True)
class Stopping(ImageSet):
    """Stops its process, which goes on living, when the last image but ten is asked for."""

    def load(self, i: int) -> Image.Image:
        if i == len(self) - 10:
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().load(i)


def test_the_part_of_a_process_that_dies_is_taken_over(make_config, codecs, shards, tmp_path):
    config = make_config(f"data.shards={tmp_path}/taken")
    images, told = open_images(config.data), tmp_path / "told"

    def wait() -> None:
        with told.open("w", buffering=1) as sys.stderr:
            run(config, codecs)

    fork = multiprocessing.get_context("fork").Process
    first, second = fork(target=run, args=(config, codecs, Stopping(**vars(images)))), fork(target=wait)
    first.start()
    while Path(f"/proc/{first.pid}/stat").read_text().split()[2] != "T":
        time.sleep(0.02)
    second.start()
    while not (told.exists() and "waiting for 1 parts" in told.read_text()):
        time.sleep(0.02)
    with pytest.raises(UserError, match="2 of 3 parts are written"):
        read_manifest(config.data.shards)
    first.kill()
    second.join()
    assert second.exitcode == 0 and files(config.data.shards) == files(shards)


def test_without_locks_ranks_keep_to_their_own(make_config, codecs, shards, tmp_path, monkeypatch):
    def no_locks(*_) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)  # no file system here refuses them
    config = make_config(f"data.shards={tmp_path}/lockless")
    with pytest.raises(PassingError, match=r"1 of 3 parts .* run the same command again"):
        run(config, codecs, rank=1, world=2)
    run(config, codecs, rank=0, world=2)
    assert files(config.data.shards) == files(shards)


def older(folder: str) -> None:
    """Make of a set one of before `decoding`, `parts` and `skipped` were noted down."""
    for path in Path(folder).glob("part-*/part.json"):
        summary = json.loads(path.read_text())
        del summary["recipe"]["decoding"], summary["parts"]
        path.write_text(json.dumps(summary))
    manifest = json.loads(Path(folder, "manifest.json").read_text())
    del manifest["skipped"]
    Path(folder, "manifest.json").write_text(json.dumps(manifest))


def test_older_sets_stay_as_they_are_and_are_not_mixed_with_newer_rows(make_config, codecs, shards):
    older(shards)
    assert run(make_config(), codecs, part_size=8) == read_manifest(shards)
    shutil.rmtree(Path(shards) / "part-00001")
    with pytest.raises(UserError, match="decoding None, not turned by EXIF"):
        run(make_config(), codecs)


def test_a_finished_set_is_left_alone(make_config, codecs, shards, capsys):
    before = files(shards)
    assert run(make_config(), codecs) == read_manifest(shards)
    assert "is complete: 40 images" in capsys.readouterr().err
    assert files(shards) == before


def test_a_part_that_was_removed_is_made_again(make_config, codecs, shards):
    before = files(shards)
    for path in (Path(shards) / "part-00001").iterdir():
        path.unlink()
    (Path(shards) / "part-00002/part.json").unlink()
    run(make_config(), codecs)
    assert files(shards) == before
    (Path(shards) / "part-00001/part.json").write_text("{")
    with pytest.raises(UserError, match=r"part-00001/part\.json is damaged: rm -r"):
        run(make_config(), codecs)


def test_broken_images_are_named_and_skipped(make_config, codecs, folder, tmp_path, capsys):
    images = open_images(make_config().data)
    (tmp_path / "bad.png").write_text("no image")
    items = [tmp_path / "bad.png" if i in (3, 20) else item for i, item in enumerate(images.items)]
    images = ImageSet(images.classes, images.labels, images.keys, items)
    with pytest.raises(UserError, match=r"2 of 40 images .*data.max_broken=0.04.*cat/03.png, cat/20.png"):
        run(make_config("data.max_broken=0.04"), codecs, images)
    config = make_config("data.max_broken=0.04", f"data.shards={tmp_path}/shared")
    assert together([(0, 2), (1, 2)], config, codecs, images) == [1, 1]  # each finds one, of 1.6 that the set may have
    assert not (tmp_path / "shared/manifest.json").exists()
    config = make_config("data.max_broken=0.05")
    manifest = run(config, codecs, images)
    assert "bad.png cannot be read" in capsys.readouterr().err
    assert manifest.broken == ["cat/03.png", "cat/20.png"]
    assert (manifest.count, manifest.class_counts) == (38, [23, 15])
    kept = [key for i, key in enumerate(images.keys) if i not in (3, 20)]
    assert [row["key"] for row in rows(config.data.shards)] == kept


def test_shards_of_something_else_are_never_mixed(make_config, codecs, shards):
    vae, tokenizer = codecs
    torch.manual_seed(1)
    other_vae, other_tokenizer = type(vae)(vae.config).eval(), type(tokenizer)(tokenizer.config).eval()
    images = open_images(make_config().data)
    before = files(shards)
    for config, pair, some, what in [
        (make_config(), (other_vae, tokenizer), images, "vae"),
        (make_config(), (vae, other_tokenizer), images, "tokenizer"),
        (make_config("data.image_size=32", "model.grid=8"), codecs, images, "image_size 16, not 32"),
        (make_config(), codecs, images.subset(range(30)), "images"),
    ]:
        with pytest.raises(UserError, match=f"{what}.*write data.shards=ANOTHER_FOLDER, or .*rm -r {shards}"):
            run(config, pair, some)
    assert files(shards) == before


def test_targets_that_cannot_be_written(make_config, codecs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write shards"):
        run(make_config(f"data.shards={tmp_path}/file/shards"), codecs)
    with pytest.raises(UserError, match="local folder"):
        run(make_config("data.shards=s3://bucket/set"), codecs)


def test_a_full_disk_is_told_and_keeps_the_finished_parts(make_config, codecs, shards, small_disk):
    config, filler = make_config(f"data.shards={small_disk}/shards"), small_disk / "filler"
    disk = os.statvfs(small_disk)
    with filler.open("wb") as file:  # room for the first part, of 16 KiB, but not for the second
        os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_bsize - (28 << 10))
    with pytest.raises(UserError, match="No space left on device"):
        run(config, codecs)
    assert (small_disk / "shards/part-00000/part.json").exists()
    filler.unlink()
    run(config, codecs)
    assert files(config.data.shards) == files(shards)


def test_latents_that_are_not_finite_stop_the_run(make_config, codecs):
    vae, tokenizer = codecs
    vae.quant_conv.bias.data.fill_(1e6)
    with pytest.raises(UserError, match="not finite"):
        run(make_config(), (vae, tokenizer))


def test_a_config_that_does_not_fit_is_told_what_to_write(make_config, shards):
    manifest = read_manifest(shards)
    check_manifest(manifest, make_config())
    for overrides, mend in [
        (["data.image_size=32", "model.grid=8"], "write data.image_size=16"),
        (["data.classes=10"], "write data.classes=2"),
        (["vae.latent_channels=4"], "write vae.latent_channels=3"),
        (["tokenizer.bits=8"], "write tokenizer.bits=6"),
        (["vae.multipliers=[1,1]", "model.patch=2"], "vae.multipliers with 3 entries"),
        (["tokenizer.multipliers=[1,1]", "model.guidance=none"], "tokenizer.multipliers with 3 entries"),
    ]:
        with pytest.raises(UserError) as error:
            check_manifest(manifest, make_config(*overrides))
        assert mend in str(error.value)


def test_a_damaged_or_missing_manifest(shards, tmp_path):
    path = Path(shards) / "manifest.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match="damaged"):
        read_manifest(shards)
    with pytest.raises(UserError, match="mixar prepare"):
        read_manifest(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"data\.cache=FOLDER"):
        read_manifest("s3://bucket/set")


def test_verify_shows_what_the_codecs_make_of_the_shards(codecs, shards, tmp_path):
    verify(shards, *codecs, tmp_path / "look" / "verify.png", count=5)
    picture = np.asarray(Image.open(tmp_path / "look" / "verify.png"))
    assert picture.shape == (3 * 18 + 2, 5 * 18 + 2, 3)
    tiles = [[picture[2 + 18 * r : 18 * (r + 1), 2 + 18 * c : 18 * (c + 1)] for c in range(5)] for r in range(3)]
    vae, tokenizer = codecs
    last = rows(shards)[39]
    with torch.no_grad():
        mean = torch.from_numpy(last["moments"][:, :3].astype(np.float32))
        plain, mirrored = vae.decode(mean).clamp(0, 1)
        code = tokenizer.decode(torch.from_numpy(last["codes"][:1].astype(np.int64))).clamp(0, 1)[0]
    for row, image in enumerate((plain, mirrored, code)):
        assert np.abs(tiles[row][4] - image.permute(1, 2, 0).numpy() * 255).max() < 1.01


@pytest.mark.parametrize("draw", ["sample", "argmax"])
def test_pre_drawn_tokens_lie_row_by_row_beside_the_images(make_config, shards, draw):
    config = make_config("ti_mix.variants=4", f"ti_mix.draw={draw}", "seed=5")
    torch.manual_seed(0)
    prior = Prior(config.prior).eval()
    predraw(config, prior, "cpu", rank=1, world=2, progress=False, part_size=24)
    stored = rows(f"{shards}/ti_mix")
    assert len(stored) == 40
    for i, row in enumerate(rows(shards)):
        for v in range(4):
            order, count = stored[i]["order"][v].astype(int), stored[i]["count"][v]
            assert sorted(order) == list(range(16)) and 12 <= count <= 16  # ceil of 0.7 N to N
            codes = torch.from_numpy(row["codes"][v % 2].astype(np.int64))[None]
            masked = torch.zeros(1, 16, dtype=torch.bool)
            masked[0, order[:count]] = True
            key = torch.tensor([i * 4 + v])
            u = rng.uniform(5, Stream.PRIOR_FILL, key, 16, prior.config.splits) if draw == "sample" else None
            expected = fill(prior, codes, masked, torch.tensor([row["label"]]), u)
            assert stored[i]["drawn"][v].tolist() == expected[0].tolist()
    counts = np.stack([row["count"] for row in stored])
    assert len(np.unique(counts)) > 2 and len({tuple(row["order"][0]) for row in stored}) == 40


def test_pre_drawing_refuses_what_does_not_fit(make_config, shards):
    with pytest.raises(UserError, match=r"ti_mix\.variants=4"):
        predraw(make_config("ti_mix.variants=3"), Prior(make_config().prior).eval(), "cpu")
    wrong = Prior(make_config("tokenizer.bits=8").prior).eval()
    with pytest.raises(UserError, match=r"prior\.weights"):
        predraw(make_config(), wrong, "cpu")
