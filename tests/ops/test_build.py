"""The builder, with compilers that only say what they were asked, and the choice between kernels and plain PyTorch."""

import logging
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mixar.ops import build, load
from mixar.ops import native as choosing
from mixar.ops.build import BuildError

COMPILER = """#!/bin/sh
case "$*" in
  --version) echo "fake 1.0"; exit;;
  --list-gpu-code) echo "sm_75 sm_80 sm_90 sm_100"; exit;;
esac
echo "$@" >> "{log}"
sleep 0.2
while [ "$1" != -o ]; do shift; done
echo compiled > "$2"
"""

pytestmark = pytest.mark.slow  # as a whole: trainings, compilers or many bytes


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Compilers that write their arguments into this file, alone on the PATH with a cache of their own."""
    file = tmp_path / "asked"
    for name in ("g++", "nvcc"):
        write_compiler(tmp_path / "bin" / name, COMPILER.format(log=file))
    for tool in ("sh", "sleep"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MIXAR_OPS", raising=False)
    monkeypatch.setattr(choosing, "_taken", {})
    return file


def write_compiler(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


def test_several_at_once_compile_once(log: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(build.build, ["cpu"] * 4))
    assert len(paths) == 1 and len(log.read_text().splitlines()) == 1
    assert paths.pop().read_text() == "compiled\n"
    left = sorted(path.suffix for path in build.cache().iterdir())
    assert left in ([".so"], [".lock", ".so"])  # no half-made file


def test_cuda_is_built_for_each_architecture(log: Path) -> None:
    build.build("cuda")
    asked = log.read_text()
    for name in ("80", "90", "100"):
        assert f"-gencode=arch=compute_{name},code=sm_{name}" in asked
    assert "code=compute_100" in asked and asked.count(".cu ") == 4


def test_what_shapes_a_library_names_it(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {build.library("cpu"), build.library("cuda")}
    write_compiler(tmp_path / "bin" / "g++", COMPILER.format(log=log).replace("fake 1.0", "fake 1.1"))
    names.add(build.library("cpu"))
    monkeypatch.setattr(build, "_processor", lambda: "another")
    names.add(build.library("cpu"))
    monkeypatch.setattr(build, "SOURCES", shutil.copytree(build.SOURCES, tmp_path / "csrc"))
    names.add(build.library("cpu"))
    (tmp_path / "csrc" / "types.h").write_text("// changed")
    names.add(build.library("cpu"))
    assert len(names) == 6 and not log.exists()


@pytest.mark.parametrize("cause", ["no compiler", "no sources", "an error", "no library", "no folder"])
def test_without_kernels_plain_pytorch_runs_and_says_so_once(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cause: str
) -> None:
    told = "Could not load this library"  # the fake compiler's output is no library
    if cause == "no compiler":
        (tmp_path / "bin" / "g++").unlink()
        told = r"no g\+\+ on the PATH"
    elif cause == "no sources":
        monkeypatch.setattr(build, "SOURCES", tmp_path / "nowhere")
        told = "no csrc/"
    elif cause == "an error":
        failing = "#!/bin/sh\n[ $1 = --version ] || { echo 'x.h:1: error: y' >&2; exit 1; }\n"
        write_compiler(tmp_path / "bin" / "g++", failing)
        told = r"g\+\+ failed: x.h:1: error: y"
    elif cause == "no folder":
        (tmp_path / "cache").write_text("")
        told = "cannot be written"
    with caplog.at_level(logging.WARNING):
        load("cpu")
        load("cpu")
    assert len(caplog.records) == 1 and "plain PyTorch" in caplog.text
    monkeypatch.setattr(choosing, "_taken", {})
    monkeypatch.setenv("MIXAR_OPS", "native")
    for _ in range(2):  # it does not pass the second time either
        with pytest.raises(RuntimeError, match=told):
            load("cpu")


def test_plain_pytorch_on_request(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXAR_OPS", "torch")
    assert load("cpu") == "cpu operators in plain PyTorch"
    assert not log.exists() and not build.cache().exists()
    assert build.status("cpu") == (False, "cpu operators in plain PyTorch, for MIXAR_OPS=torch")
    monkeypatch.setattr(choosing, "_taken", {})
    monkeypatch.setenv("MIXAR_OPS", "fast")
    with pytest.raises(RuntimeError, match="write MIXAR_OPS=native"):
        load("cpu")


def test_the_command_says_what_it_built(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build.status("cpu")[0] and "at first use" in build.status("cpu")[1]
    assert build.main([]) == 0
    out = capsys.readouterr().out
    assert "cpu operators compiled for this processor" in out and "compiled for sm_80, sm_90, sm_100" in out
    (tmp_path / "bin" / "nvcc").unlink()
    assert build.main([]) == 0
    printed = capsys.readouterr()
    assert "cuda operators in plain PyTorch: no nvcc on the PATH" in printed.out
    assert build.main(["cuda"]) == 1 and build.main(["rocm"]) == 2
    assert "rocm: write cpu, cuda" in capsys.readouterr().err
    with pytest.raises(BuildError):
        build.build("cuda")
    monkeypatch.setenv("MIXAR_OPS", "native")
    assert build.status("cuda")[1].startswith("cuda operators missing")


FRESH = """
import sys, torch
from mixar.ops import native, timestep_embed
assert not native._taken and "torch._dynamo" not in sys.modules  # importing costs nothing
assert not native.has_kernels("cpu")
traced = torch.compile(timestep_embed, backend="aot_eager", fullgraph=True)
(traced if {traced} else timestep_embed)(torch.arange(5))
assert torch._C._dispatch_has_kernel_for_dispatch_key("mixar::mix_gather", "CPU") and native.has_kernels("cpu")
"""


@pytest.mark.parametrize("traced", [False, True])
def test_the_first_call_takes_the_kernels(native: None, traced: bool) -> None:
    subprocess.run([sys.executable, "-c", FRESH.format(traced=traced)], check=True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the CPU operators with")
def test_the_real_library_loads(native: None) -> None:
    assert build.library("cpu").exists()
    for name in (
        "mix_gather",
        "mix_gather_backward",
        "norm_modulate",
        "timestep_embed",
        "random_bits",
        "random_uniform",
    ):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mixar::{name}", "CPU")
