"""Weights on disk: public checkpoints at full size, exports, and what a wrong file is told."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mixar.codecs import VAE, build_tokenizer
from mixar.config import TokenizerConfig, VAEConfig
from mixar.errors import UserError
from mixar.weights import (
    fingerprint,
    is_export,
    load_strict,
    read_export,
    read_fitting,
    read_public,
    read_state,
    write_export,
)

MANIFESTS = Path(__file__).parent / "manifests"
KL16 = VAEConfig(latent_channels=16, decoder_attention=False)


def manifest_state(name: str) -> dict[str, Tensor]:
    """The published keys, shapes and dtypes; every tensor repeats one value, so that its file stays small."""
    manifest = json.loads((MANIFESTS / f"{name}.json").read_text())
    return {key: torch.zeros(1, dtype=getattr(torch, dtype)).expand(shape) for key, (shape, dtype) in manifest.items()}


def on_meta(build, cfg) -> nn.Module:
    with torch.device("meta"):
        return build(cfg)


@pytest.mark.parametrize(
    ("manifest", "kind", "nest", "build", "cfg"),
    [
        ("vavae_f16d32", "vae", lambda state: {"state_dict": state, "epoch": 3}, VAE, VAEConfig()),
        ("vavae_f16d32", "vae", lambda state: state, VAE, VAEConfig()),
        ("mar_vae_kl16", "vae", lambda state: {"model": state}, VAE, KL16),
        ("maskbit_tokenizer_14bit", "tokenizer", lambda state: state, build_tokenizer, TokenizerConfig()),
    ],
    ids=["vavae-lightning", "vavae-flat", "kl16", "tokenizer"],
)
def test_published_files_load_key_for_key(tmp_path: Path, manifest: str, kind: str, nest, build, cfg) -> None:
    published = manifest_state(manifest)
    strangers = {"loss.logvar": torch.zeros(1), "linear_proj.weight": torch.zeros(2)} if kind == "vae" else {}
    torch.save(nest(published | strangers), tmp_path / "weights.pt")
    module = on_meta(build, cfg)
    load_strict(module, read_public(tmp_path / "weights.pt", kind), "weights.pt")
    loaded = module.state_dict()
    assert {key: (value.shape, value.dtype) for key, value in loaded.items()} == {
        key: (value.shape, value.dtype) for key, value in published.items()
    }
    assert not any(value.is_meta for value in loaded.values())


def test_published_files_prefer_the_average_weights(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1)}, "model_ema": {"a": torch.ones(1)}}, tmp_path / "both.pth")
    torch.save({"model": {"a": torch.zeros(1)}, "epoch": 1}, tmp_path / "live.pth")
    assert read_public(tmp_path / "both.pth", "mar")["a"] == 1
    assert read_public(tmp_path / "live.pth", "mar")["a"] == 0


def test_the_generators_older_name_is_renamed(tmp_path: Path) -> None:
    torch.save({"token_emb.weight": torch.ones(2), "x.token_emb": torch.zeros(1)}, tmp_path / "g.bin")
    assert set(read_public(tmp_path / "g.bin", "generator")) == {"input_proj.weight", "x.token_emb"}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_values_arrive_in_the_modules_dtype(device: str) -> None:
    module = nn.Linear(3, 2, device=device)
    state = {"weight": torch.randn(2, 3).half(), "bias": torch.randn(2).half()}
    before = module.weight
    load_strict(module, state, "here")
    assert (module.weight is before) == (device == "cpu")  # in place, where an optimizer may already hold it
    assert module.weight.dtype == torch.float32 and module.weight.requires_grad
    assert torch.equal(module.weight, state["weight"].float()) and torch.equal(module.bias, state["bias"].float())


def test_every_misfit_is_named_in_one_message() -> None:
    state = {"0.weight": torch.zeros(3, 3), "0.bias": torch.zeros(2), "stranger": torch.zeros(1)}
    with pytest.raises(UserError) as caught:
        load_strict(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), state, "some.pt")
    for part in (
        "some.pt",
        "2 missing: 1.weight, 1.bias",
        "1 unexpected: stranger",
        "1 misshapen: 0.weight [3, 3] instead of [2, 3]",
    ):
        assert part in str(caught.value)


def test_a_long_list_of_misfits_is_cut() -> None:
    with pytest.raises(UserError, match="12 unexpected: k0, k1, k2, k3, k4 and 7 more") as caught:
        load_strict(nn.Identity(), {f"k{i}": torch.zeros(1) for i in range(12)}, "some.pt")
    assert "k5" not in str(caught.value)


def test_a_misfit_leaves_the_module_as_it_was() -> None:
    module = nn.Linear(2, 2)
    before = fingerprint(module.state_dict())
    with pytest.raises(UserError):
        load_strict(module, {"weight": torch.ones(2, 2)}, "some.pt")
    assert fingerprint(module.state_dict()) == before


def test_a_pickle_of_objects_needs_trust(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-last.pth"
    torch.save({"model": {"a": torch.ones(2)}, "args": argparse.Namespace(lr=1)}, path)
    with pytest.raises(UserError, match=r"argparse\.Namespace.*--trust-pickle"):
        read_public(path, "mar")
    assert torch.equal(read_public(path, "mar", trust_pickle=True)["a"], torch.ones(2))


class Canary:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_without_trust_no_code_of_a_pickle_runs(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(1)}, "args": Canary(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="--trust-pickle"):
        read_public(tmp_path / "evil.pth", "mar")
    assert not (tmp_path / "ran").exists()


def test_broken_files_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(5000)}, tmp_path / "whole.pth")
    save_file({"a": torch.zeros(5000)}, tmp_path / "whole.safetensors")
    for whole in list(tmp_path.iterdir()):
        broken = whole.with_stem("broken")
        broken.write_bytes(whole.read_bytes()[:3000])
        with pytest.raises(UserError, match="broken"):
            read_state(broken)
    for name in ("empty.pt", "empty.safetensors"):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=name):
            read_state(tmp_path / name)
    (tmp_path / "page.bin").write_text("<html>404</html>")
    for trust in (False, True):
        with pytest.raises(UserError, match=r"page\.bin"):
            read_state(tmp_path / "page.bin", trust_pickle=trust)


def test_what_is_no_weights_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save({"optimizer": {}, "epoch": 1}, tmp_path / "other.pt")
    for path, reason in (
        (tmp_path / "absent.pt", "no weights at"),
        (tmp_path, "is a folder"),
        (tmp_path / "notes.txt", "not a known type"),
        (tmp_path / "tensor.pt", "found: Tensor"),
        (tmp_path / "other.pt", "under 'model' or at the top; found: optimizer, epoch"),
    ):
        with pytest.raises(UserError, match=reason):
            read_state(path, nesting=("model",))


def test_an_export_gives_back_what_went_in(tmp_path: Path) -> None:
    state = {"w": torch.randn(3, 2), "half": torch.randn(4).bfloat16(), "ids": torch.arange(3, dtype=torch.int32)}
    folder = tmp_path / "exports" / "vae"
    write_export(folder, "vae", {"width": 32}, state, images=7)
    description, again = read_export(folder, "vae")
    assert is_export(folder) and fingerprint(again) == fingerprint(state)
    assert description["config"] == {"width": 32} and description["images"] == 7 and description["version"]
    assert [path.name for path in folder.parent.iterdir()] == ["vae"]


def test_an_export_never_overwrites(tmp_path: Path) -> None:
    write_export(tmp_path / "e", "vae", {}, {"w": torch.zeros(1)})
    with pytest.raises(UserError, match="exists"):
        write_export(tmp_path / "e", "vae", {}, {"w": torch.ones(1)})
    assert read_export(tmp_path / "e", "vae")[1]["w"] == 0


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_export(tmp_path / "e", "vae", {"not for json": object()}, {"w": torch.zeros(1)})
    assert not list(tmp_path.iterdir())


def test_a_wrong_or_torn_export_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    write_export(folder, "prior", {}, {"w": torch.zeros(1)})
    with pytest.raises(UserError, match="'prior', expected 'vae'"):
        read_export(folder, "vae")
    (folder / "config.json").write_text('{"kind": "pri')
    with pytest.raises(UserError, match=r"config\.json"):
        read_export(folder, "prior")
    (folder / "config.json").unlink()
    assert not is_export(folder)
    with pytest.raises(UserError, match="is not an export"):
        read_export(folder, "prior")


def test_weights_of_another_export_are_refused(tmp_path: Path) -> None:
    for name, value in (("a", 0.0), ("b", 1.0)):
        write_export(tmp_path / name, "prior", {}, {"w": torch.full((3,), value)})
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "a")
    with pytest.raises(UserError, match=r"other weights than its config\.json was written with .*complete folders"):
        read_export(tmp_path / "a", "prior")
    with pytest.raises(UserError, match="other weights"):
        read_fitting(tmp_path / "a", {"w": torch.zeros(3)}, print)


def test_the_fingerprint_tells_weights_apart() -> None:
    state = {"a": torch.arange(6.0).view(2, 3), "scalar": torch.tensor(1.0)}
    others = [
        state | {"a": state["a"].view(3, 2)},
        state | {"a": state["a"].int()},
        state | {"b": state["a"]},
        state | {"a": state["a"].nextafter(torch.tensor(9.0))},
    ]
    assert len({fingerprint(each) for each in [state, *others]}) == 5
    assert fingerprint(dict(reversed(state.items()))) == fingerprint(state)
    assert fingerprint({"a": state["a"].T.contiguous().T, "scalar": state["scalar"]}) == fingerprint(state)
