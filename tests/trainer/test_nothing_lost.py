"""What a run directory holds stays: damaged checkpoints, full disks, other data and other weights are told."""

import argparse
import errno
import fcntl
import json
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mixar.__main__ import main
from mixar.checkpoint import complete_checkpoints, load_ema
from mixar.codecs import build_tokenizer
from mixar.config import Config, load_config, to_dict
from mixar.data.loader import ShardSource
from mixar.errors import UserError
from mixar.prior import Prior
from mixar.train import train
from mixar.weights import holds, read_export, write_export
from tests.home import records

pytestmark = pytest.mark.slow


def config(home: Path, run: Path, *overrides: str) -> Config:
    return load_config(home / "config.yaml", [f"run_dir={run}", *overrides])


def exported(run: Path, name: str = "160-ema") -> dict[str, torch.Tensor]:
    return read_export(run / "exports" / name, "mixar")[1]


@pytest.fixture(scope="module")
def done(home, tmp_path_factory) -> Path:
    """A finished run, with checkpoints at 80 and 160 images; tests work on copies."""
    run = tmp_path_factory.mktemp("done") / "run"
    train(config(home, run))
    return run


@pytest.fixture
def run(done, tmp_path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "run"))


def damage(checkpoint: Path) -> None:
    file = next(checkpoint.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100] + bytes(100))


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(home, run) -> None:
    for checkpoint in complete_checkpoints(run):
        damage(checkpoint)
    before = {path: path.read_bytes() for path in (run / "metrics.jsonl", *run.rglob("DONE"))}
    with pytest.raises(UserError, match=r"no checkpoint in .* can be loaded .*0160.*changed.*0080.*mv "):
        train(config(home, run, "train.epochs=4"))
    assert all(path.read_bytes() == content for path, content in before.items())
    shutil.move(run / "checkpoints", run / "checkpoints-damaged")  # what the message says to do
    train(config(home, run, "train.epochs=1.25"))
    assert [path.name for path in complete_checkpoints(run)] == ["000000000080"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("progress.json", text) for text in ("null", "[]", '{"format": 2}', '{"format": 2, "step": "8", "images": 160}')]
    + [("DONE", text) for text in ("null", "{}", "[]")],
)
def test_a_checkpoint_of_odd_notes_is_passed_over(home, run, name, content) -> None:
    (run / "checkpoints" / "000000000160" / name).write_text(content)
    train(config(home, run, "train.epochs=1.25"))
    log = (run / "log.txt").read_text()
    assert "skipping" in log and "000000000080: step 5, 80 images" in log


def test_a_checkpoint_whose_progress_was_changed_is_passed_over(home, run) -> None:
    file = run / "checkpoints" / "000000000160" / "progress.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"step": 2, "images": 32}))
    train(config(home, run, "train.epochs=1.25"))
    assert "progress.json changed since it was written" in (run / "log.txt").read_text()


@pytest.mark.parametrize("line", [b"\xff\xfe", b"3", b"null", b"[]", b'{"step": "x"}', b'{"step": null}', b'{"ste'])
def test_an_odd_line_of_the_metrics_stops_no_resume(home, run, line) -> None:
    known = records(run)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    train(config(home, run, "train.epochs=2.75"))
    assert records(run)[: len(known)] == known and records(run)[-1]["step"] == 11


def test_a_folder_of_an_export_that_was_killed_stops_no_start(home, run) -> None:
    (run / ".release.0123.part").mkdir()
    (run / ".config.yaml.0123.part").touch()
    train(config(home, run))
    assert [path.name for path in run.glob(".*.part")] == [".release.0123.part"], "it may still be written"


@pytest.mark.parametrize("damaged", ["emptied", "changed"])
def test_a_damaged_export_is_written_anew(home, run, damaged) -> None:
    file = run / "exports" / "160-ema" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(b"" if damaged == "emptied" else whole[:-8] + bytes(b ^ 0x80 for b in whole[-8:]))
    with pytest.raises(UserError, match=r"export|broken"):
        exported(run)
    train(config(home, run))
    assert file.read_bytes() == whole


def test_what_was_just_written_is_kept_before_what_is_ahead(home, run) -> None:
    damage(run / "checkpoints" / "000000000160")
    train(config(home, run, "train.epochs=2", "train.checkpoint_every=0.25", "train.keep=1"))
    assert [path.name for path in complete_checkpoints(run)] == ["000000000128", "000000000160"]


def test_a_checkpoint_that_cannot_be_removed_stops_nothing(home, run) -> None:
    busy = run / "checkpoints" / "000000000080" / "busy"
    busy.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(busy)], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        train(config(home, run, "train.epochs=3.75", "train.keep=1"))
        assert "cannot be removed yet" in (run / "log.txt").read_text()
        assert [path.name for path in complete_checkpoints(run)] == ["000000000240"]
    finally:
        (left,) = (run / "checkpoints").glob(".000000000080.*")
        subprocess.run(["umount", str(left / "busy")], check=True)
    train(config(home, run, "train.epochs=5", "train.keep=1"))
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.parametrize("content", ["", "task: mixar\nseed: 0\n", "\x00\x00"])
def test_a_torn_config_is_told_as_one(home, run, content) -> None:
    (run / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"own config is damaged .*: cp .*000000000160/config.yaml"):
        train(config(home, run))
    shutil.copy(run / "checkpoints" / "000000000160" / "config.yaml", run / "config.yaml")
    train(config(home, run))


def test_a_disk_that_is_full_at_the_start_loses_nothing(home, done, small_disk) -> None:
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    run = Path(shutil.copytree(done, small_disk / "run", ignore=shutil.ignore_patterns("tb", "exports")))
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "log.txt"}
    with pytest.raises(OSError, match="No space"), (small_disk / "filler").open("wb") as filler:
        filler.write(bytes(8 << 20))
    with pytest.raises(UserError, match=r"No space left on device.*free space"):
        train(config(home, run, "train.epochs=4"))
    assert all(path.read_bytes() == content for path, content in files.items())
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
    train(config(home, run, "train.epochs=3"))
    assert records(run)[-1]["step"] == 12


def test_an_export_of_other_weights_is_replaced(home, run) -> None:
    first = exported(run)
    shutil.rmtree(run / "checkpoints")
    train(config(home, run, "optim.lr=0.01"))
    second = exported(run)
    assert any(not torch.equal(first[name], value) for name, value in second.items())
    assert holds(run / "exports" / "160-ema", second) and not holds(run / "exports" / "160-ema", first)
    shutil.rmtree(run / "checkpoints")
    train(config(home, run))
    assert main(["export", str(run)]) == 0
    assert all(torch.equal(first[name], value) for name, value in exported(run).items())


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_told_as_one(home, tmp_path, monkeypatch, number) -> None:
    def lockf(*_) -> None:  # what mounts without locks answer, of which a test can make none
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    train(config(home, tmp_path / "run", "train.epochs=0.25"))
    assert "the file system has no locks" in (tmp_path / "run" / "log.txt").read_text()


def other(home: Path, folder: Path, kind: str, **changes) -> Path:
    """An export of random weights, of the home's geometry but for the changes."""
    section = getattr(load_config(home / "config.yaml"), kind)
    for name, value in changes.items():
        setattr(section, name, value)
    torch.manual_seed(1)
    network = {"tokenizer": build_tokenizer, "prior": Prior}[kind](section)
    write_export(folder / kind, kind, to_dict(section) | {"weights": None}, network.state_dict())
    return folder / kind


def test_codecs_that_did_not_make_the_shards_are_refused(home, tmp_path) -> None:
    tokenizer = other(home, tmp_path, "tokenizer")
    for task in ("mixar", "prior"):
        with pytest.raises(UserError, match="the shards were made with another tokenizer"):
            train(config(home, tmp_path / task, f"task={task}", f"tokenizer.weights={tokenizer}"))
        assert not (tmp_path / task / "metrics.jsonl").exists()
    with pytest.raises(UserError, match=r"vae\.weights=/missing is not there"):
        train(config(home, tmp_path / "missing", "vae.weights=/missing"))


def test_a_prior_of_other_tokens_is_refused(home, tmp_path) -> None:
    prior = other(home, tmp_path, "prior", bits=4)
    with pytest.raises(UserError, match="has 4 bits per token, but the config has 6"):
        train(config(home, tmp_path / "run", f"prior.weights={prior}"))
    section = load_config(home / "config.yaml").prior
    write_export(tmp_path / "stranger", "prior", to_dict(section), Prior(section).state_dict(), tokenizer="0" * 16)
    with pytest.raises(UserError, match="trained on the tokens of another tokenizer"):
        train(config(home, tmp_path / "run", f"prior.weights={tmp_path / 'stranger'}"))
    trained = tmp_path / "trained"
    train(config(home, trained, "task=prior", "train.epochs=0.25"))
    # a run directory does as weights
    train(config(home, tmp_path / "run", f"prior.weights={trained}", "train.epochs=0.25"))


def test_other_data_does_not_resume_a_run(home, run, tmp_path) -> None:
    shards = Path(shutil.copytree(home / "shards", tmp_path / "moved"))
    train(config(home, run, "train.epochs=3", f"data.shards={shards}"))  # the same set elsewhere
    index = json.loads((shards / "index.json").read_text())
    for shard in index["shards"]:
        shard["raw_data"]["hashes"] = {"xxh3_64": "0" * 16}
    (shards / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"trained on other data than .*moved.*\(they differ in shards\).*init_from="):
        train(config(home, run, "train.epochs=4", f"data.shards={shards}"))
    manifest = json.loads((home / "shards" / "manifest.json").read_text())
    shards = Path(shutil.copytree(home / "shards", tmp_path / "scaled"))
    (shards / "manifest.json").write_text(json.dumps(manifest | {"latent_std": [2.0, 2.0, 2.0]}))
    with pytest.raises(UserError, match=r"\(they differ in latents\)"):
        train(config(home, run, "train.epochs=4", f"data.shards={shards}"))
    for change in ("data.flip=false", "mask.minimum=0.5", "vae.attention_levels=[2]"):
        with pytest.raises(UserError, match=f"was started with {change.split('=')[0]}="):
            train(config(home, run, "train.epochs=4", change))


def test_an_export_needs_no_shards(home, run, monkeypatch, tmp_path) -> None:
    def opened(*_, **__):
        raise AssertionError("the shards were opened")

    monkeypatch.setattr(ShardSource, "__init__", opened)
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "data.shards=/nowhere"]) == 0
    first, second = (read_export(folder, "mixar")[0] for folder in (run / "exports" / "160-ema", tmp_path / "out"))
    assert first["latents"] == second["latents"]


def test_a_remote_that_was_made_anew_is_seen_through_its_cache(home, tmp_path) -> None:
    remote = Path(shutil.copytree(home / "shards", tmp_path / "remote"))
    told = [f"data.shards=file://{remote}", f"data.cache={tmp_path / 'cache'}"]
    train(config(home, tmp_path / "run", "train.epochs=0.25", *told))
    (remote / "index.json").write_text((remote / "index.json").read_text() + " ")
    with pytest.raises(UserError, match=rf"made again since it was cached: rm -r {tmp_path / 'cache'}"):
        train(config(home, tmp_path / "run", "train.epochs=0.5", *told))
    shutil.rmtree(remote)  # cannot be asked: the cache holds all
    train(config(home, tmp_path / "run", "train.epochs=0.5", *told))


def test_an_export_of_a_damaged_checkpoint_is_refused(home, run, capsys) -> None:
    damage(complete_checkpoints(run)[-1])
    assert main(["export", str(run)]) == 2
    assert "changed since it was written" in capsys.readouterr().err


class Trap:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_the_index_of_a_stranger_s_checkpoint_runs_no_code(home, run, tmp_path) -> None:
    checkpoint, trap = complete_checkpoints(run)[-1], tmp_path / "trap"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Trap(trap)))
    sums = json.loads((checkpoint / "DONE").read_text())
    del sums[".metadata"]
    (checkpoint / "DONE").write_text(json.dumps(sums))
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"it holds pathlib\.Path\.touch|it holds \w+\.getattr|cannot be read"):
        load_ema(checkpoint, model)
    assert not trap.exists()


def test_a_training_of_nothing_finite_is_not_called_trained(home, tmp_path) -> None:
    shards = Path(shutil.copytree(home / "shards", tmp_path / "shards"))
    manifest = json.loads((shards / "manifest.json").read_text())
    (shards / "manifest.json").write_text(json.dumps(manifest | {"latent_std": [1e-30] * 3}))  # as of a VAE gone wrong
    with pytest.raises(UserError, match="none of the run's 2 steps was finite"):
        train(config(home, tmp_path / "run", "train.epochs=0.5", f"data.shards={shards}"))
    assert not (tmp_path / "run" / "exports").exists()


def test_first_weights_are_read_once_and_with_trust(home, tmp_path) -> None:
    run, weights = tmp_path / "run", tmp_path / "mar.pth"
    state = exported_like(home, tmp_path)
    torch.save({"model_ema": state, "epoch": 3, "args": argparse.Namespace(lr=1)}, weights)  # as MAR's own
    with pytest.raises(UserError, match="--trust-pickle"):
        train(config(home, run, f"init_from={weights}", "train.epochs=0.25"))
    train(config(home, run, f"init_from={weights}", "train.epochs=0.25", "trust_pickle=true"))
    assert "init_from" in (run / "log.txt").read_text()
    weights.unlink()
    train(config(home, run, f"init_from={weights}", "train.epochs=0.5"))  # what resumes has weights of its own


def exported_like(home: Path, folder: Path) -> dict[str, torch.Tensor]:
    train(config(home, folder / "first", "train.epochs=0.25"))
    return read_export(folder / "first" / "exports" / "16-ema", "mixar")[1]


def test_a_log_has_dates(done) -> None:
    assert all(line[:2] == "20" and line[10] == " " for line in (done / "log.txt").read_text().splitlines()[:1])
    assert all(record["time"].endswith("+00:00") for record in records(done))
