"""Every check of the doctor against a machine where it must fail, and against this one."""

import dataclasses
import json
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from mixar.__main__ import main
from mixar.codecs import VAE
from mixar.config import load_config, to_dict
from mixar.data.manifest import FORMAT, Manifest
from mixar.data.remote import MANIFEST
from mixar.verbs import doctor
from mixar.verbs.doctor import Finding
from mixar.weights import write_export
from tests.home import end, start_ranks


def install(site: Path, name: str, version: str, *requires: str) -> None:
    """What pip leaves behind of a package."""
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {text}" for text in requires)]
    (folder / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")


def write_manifest(folder: Path, **changes: object) -> None:
    manifest = Manifest(
        format=FORMAT, mixar="0.1.0", count=12, classes=["a", "b"], class_counts=[6, 6], image_size=256, crop="adm",
        grid=16, code_grid=16, latent_channels=32, code_bits=14, vae="0", vae_weights=None, tokenizer="0",
        tokenizer_weights=None, latent_mean=[0.0] * 32, latent_std=[1.0] * 32, broken=[],
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps(dataclasses.asdict(manifest) | changes))


def test_this_environment_is_sound(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"ok    torch {metadata.version('torch')}" in lines
    assert not [line for line in lines if line.startswith("bad")]  # elsewhere it may be a file's hash that spells it


def test_every_requirement_is_named() -> None:
    told = " ".join(finding.text for finding in doctor.versions())
    for name in ("torch", "deepspeed", "mosaicml-streaming", "numpy", "omegaconf", "torchvision", "torch-fidelity"):
        assert f"{name} {metadata.version(name)}" in told


def test_a_bad_pair_is_told_with_both_its_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "numpy", "2.3.1")
    monkeypatch.syspath_prepend(tmp_path)
    bad = [finding.text for finding in doctor.versions() if finding.status == "bad"]
    assert len(bad) == 1 and bad[0].startswith("numpy 2.3.1: ")
    assert "mosaicml-streaming needs numpy" in bad[0] and "pip install 'numpy<2.2" in bad[0]


def test_a_missing_package_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "mixar", "0.1.0", "no-such-package>=3", "dev-only>=1; extra == 'dev'")
    monkeypatch.syspath_prepend(tmp_path)
    told = "no-such-package is missing: mixar needs no-such-package>=3; write pip install 'no-such-package>=3'"
    assert list(doctor.versions()) == [("bad", told)]


def test_accelerators_are_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.accelerator("no_such_package.inner", "Thing", "slow").status == "note"
    for name, text in (("foreign", ""), ("broken", "raise OSError('undefined symbol')"), ("whole", "class Thing: ...")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
        (tmp_path / name / "inner.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    found = {name: doctor.accelerator(f"{name}.inner", "Thing", "slow") for name in ("foreign", "broken", "whole")}
    assert [finding.status for finding in found.values()] == ["note", "note", "ok"]
    assert "undefined symbol" in found["broken"].text
    for name in [name for name in sys.modules if name.split(".")[0] in found]:
        del sys.modules[name]


def test_devices_name_precision_and_threads() -> None:
    fp32 = load_config(None, ["train.precision=fp32"])
    assert not any("write train.precision" in finding.text for finding in doctor.devices(fp32))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(64)
        assert any(f.status == "note" and "write OMP_NUM_THREADS=" in f.text for f in doctor.devices(None))
    finally:
        torch.set_num_threads(before)


def test_compilers_are_looked_for_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [finding.status for finding in doctor.compilers()] == ["note", "note"]
    (tmp_path / "nvcc").touch(0o755)
    assert [finding.status for finding in doctor.compilers()] == ["note", "ok"]


def test_the_operators_path_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXAR_OPS", "torch")
    told = "a run here takes cpu operators in plain PyTorch, for MIXAR_OPS=torch"
    assert list(doctor.operators("cpu")) == [("note", told)]
    monkeypatch.delenv("MIXAR_OPS")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [finding.text for finding in doctor.operators("cpu")] == [
        "a run here takes cpu operators in plain PyTorch: no g++ on the PATH"
    ]


def test_a_folder_is_tried_without_being_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert doctor.writable("run_dir", str(tmp_path / "new" / "run")).status == "ok"
    assert not (tmp_path / "new").exists()
    finding = doctor.writable("run_dir", str(tmp_path / "file" / "run"))
    assert finding.status == "bad" and "write run_dir=" in finding.text


def test_shards_are_held_against_the_config(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    cfg = load_config(None, [f"data.shards={folder}", "data.classes=2"])
    assert doctor.shards(cfg).status == "note" and "mixar prepare" in doctor.shards(cfg).text
    write_manifest(folder)
    assert doctor.shards(cfg).status == "ok" and "12 images, 2 classes" in doctor.shards(cfg).text
    write_manifest(folder, code_bits=10)
    assert doctor.shards(cfg).status == "bad" and "write tokenizer.bits=10" in doctor.shards(cfg).text
    (folder / MANIFEST).write_text("{")
    assert doctor.shards(cfg).status == "bad" and "damaged" in doctor.shards(cfg).text


def test_weights_are_tried(tmp_path: Path) -> None:
    small = ["vae.width=16", "vae.multipliers=[1,1,1,1,1]", "vae.blocks=1", "vae.latent_channels=4"]
    vae, missing = tmp_path / "vae", tmp_path / "missing"
    cfg = load_config(None, [*small, f"vae.weights={vae}", f"prior.weights={missing}"])
    write_export(vae, "vae", to_dict(cfg.vae), VAE(cfg.vae).state_dict())
    good, bad = doctor.weights(cfg)
    assert good == ("ok", f"vae.weights={vae} can be loaded")
    assert bad.status == "bad" and bad.text.startswith(f"prior.weights={missing}: no weights at {missing}")
    (found,) = doctor.weights(load_config(None, [f"tokenizer.weights={vae}"]))
    assert found.status == "bad" and "weights of kind 'vae', expected 'tokenizer'" in found.text


def test_the_command_counts_what_is_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    write_manifest(tmp_path / "shards")
    overrides = [f"run_dir={tmp_path}/file/run", f"data.shards={tmp_path}/shards"]  # of 1000 classes by default
    nowhere = ["vae.weights=nowhere", "init_from=nowhere", "engine.deepspeed=nowhere"]
    assert main(["doctor", *overrides, *nowhere]) == 2
    printed = capsys.readouterr()
    assert printed.out.count("\nbad   ") == 5
    assert "5 of " in printed.err and "write data.classes=2" in printed.out


def test_the_features_of_a_loss_are_looked_for(tmp_path: Path) -> None:
    given = ["task=vae", "vae.perceptual_weight=1", "vae.perceptual_features=nowhere", f"run_dir={tmp_path}/run"]
    (bad,) = [finding for finding in doctor.examine(load_config(None, given)) if finding.status == "bad"]
    assert bad.text == "vae.perceptual_features=nowhere is not there: write vae.perceptual_features=<its path>"


def test_the_cache_of_remote_shards_has_to_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    findings = doctor.examine(load_config(None, ["task=vae", f"data.cache={tmp_path}/file/cache"]))
    assert [finding.text.split("=")[0] for finding in findings if finding.status == "bad"] == ["data.cache"]


def test_one_config_at_most(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "a.yaml", "b.yaml"]) == 2
    assert "a.yaml, b.yaml" in capsys.readouterr().err


def test_the_odd_node_is_named() -> None:
    same, card = Finding("ok", "torch 2.14.1"), Finding("ok", "GPU 0: H100, 80 GiB")
    found = [(f"n{rank // 2}", [same, card, Finding("ok", f"/tmp has {rank}.5 GiB free")]) for rank in range(8)]
    assert list(doctor.odd_ones(found)) == []
    for rank in (4, 5):
        found[rank] = ("n2", [Finding("ok", "torch 2.12.0"), Finding("bad", "run_dir cannot be written"), card])
    assert [finding.text for finding in doctor.odd_ones(found)] == [
        "n2 differs from most: run_dir cannot be written", "n2 differs from most: torch 2.12.0",
    ]  # fmt: skip


def test_several_ranks_are_checked_together(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert end(start_ranks(["-m", "mixar", "doctor"], 2, log=log)) == [0, 0], log.read_text()
    told = log.read_text()
    assert "ok    all-reduce of 64 MiB over 2 ranks" in told and "differs" not in told
    assert told.count("ok    einops") == 1
