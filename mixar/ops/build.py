"""Compilation of the operators of csrc/ into a cache, and a report of what a run will use.

    python -m mixar.ops.build [cpu] [cuda]

g++ and nvcc are called directly. A library's file is named by a hash of all its inputs, so that nothing is compiled
twice and no stale library is loaded. Of several processes at once, one compiles.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock

from mixar.errors import UserError
from mixar.files import replacing
from mixar.log import log
from mixar.resources import SOURCES

DEVICES = ("cpu", "cuda")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # 2.10, the oldest torch that a library supports


class BuildError(Exception):
    """The reason why a library is not available, in one line."""


def cache() -> Path:
    """The folder of compiled libraries."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixar" / "ops"


def library(device: str) -> Path:
    """The path of a device type's library, which may not be built yet.

    Raises:
        BuildError: sources or compilers are missing.
    """
    compilers = ["g++", "nvcc"] if device == "cuda" else ["g++"]
    if not SOURCES.is_dir():
        raise BuildError("this installation has no csrc/: reinstall mixar")
    if missing := [name for name in compilers if shutil.which(name) is None]:
        raise BuildError(f"no {' and no '.join(missing)} on the PATH")
    inputs = [torch.__version__, *(text for step in _steps(device, Path(device)) for text in step)]
    inputs += [_output([name, "--version"]) for name in compilers]
    if device == "cpu":
        inputs.append(_processor())  # -march=native depends on the processor
    digest = hashlib.sha256("\n".join(inputs).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return cache() / f"mixar_{device}-{digest.hexdigest()[:16]}.so"


def build(device: str) -> Path:
    """The library of a device type, compiled unless it is in the cache.

    Raises:
        BuildError: sources or compilers are missing, or the compilation fails.
    """
    path = library(device)
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                log.info("building the %s operators, which happens once", device)
                with replacing(path) as part:
                    for step in _steps(device, part):
                        _output(step)
    except (OSError, UserError) as error:
        raise BuildError(f"{path.parent} cannot be written ({error}): set XDG_CACHE_HOME") from error
    return path


def status(device: str) -> tuple[bool, str]:
    """Whether a run on a device type uses the compiled operators, and a description."""
    asked = os.environ.get("MIXAR_OPS", "")
    if asked == "torch":
        return False, f"{device} operators in plain PyTorch, for MIXAR_OPS=torch"
    try:
        path = library(device)
    except BuildError as error:
        without = "missing, which MIXAR_OPS=native makes an error" if asked == "native" else "in plain PyTorch"
        return False, f"{device} operators {without}: {error}"
    target = "this processor" if device == "cpu" else ", ".join(_architectures())
    if path.exists():
        return True, f"{device} operators compiled for {target}: {path}"
    return True, f"{device} operators to compile for {target} at first use, or now: python -m mixar.ops.build {device}"


def _steps(device: str, file: Path) -> list[list[str]]:
    """The commands that compile the library `file`."""
    torch_folder = Path(torch.__file__).parent
    out = str(file)
    common = ["-std=c++17", "-O3", STABLE_ABI, f"-I{torch_folder / 'include'}"]
    link = [f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu"]
    bind = str(SOURCES / "bind.cpp")
    sources = [str(path) for path in sorted(SOURCES.glob("*.cu" if device == "cuda" else "*_cpu.cpp"))]
    if device == "cpu":
        shared = ["-march=native", "-fopenmp-simd", "-fPIC", "-shared"]
        return [["g++", *common, *shared, bind, *sources, *link, "-o", out]]
    known = _architectures()
    codes = [f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in known]
    newest = known[-1].replace("sm", "compute")
    codes.append(f"-gencode=arch={newest},code={newest}")  # PTX for newer cards
    shared = ["-DMIXAR_CUDA", "-DUSE_CUDA", "-Xcompiler=-fPIC", "-shared"]
    return [["nvcc", *common, *shared, *codes, bind, *sources, *link, "-ltorch_cuda", "-o", out]]


def _architectures() -> list[str]:
    """Those of `ARCHITECTURES` that this nvcc supports."""
    listed = _output(["nvcc", "--list-gpu-code"]).split()
    if not (known := [name for name in ARCHITECTURES if name in listed]):
        raise BuildError(f"nvcc knows none of {', '.join(ARCHITECTURES)}")
    return known


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        output = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        said = next((line for line in output if "error" in line), output[0] if output else "it printed nothing")
        raise BuildError(f"{command[0]} failed: {said.strip()}")
    return done.stdout


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def main(devices: list[str]) -> int:
    if unknown := [name for name in devices if name not in DEVICES]:
        print(f"{', '.join(unknown)}: write cpu, cuda, both or nothing", file=sys.stderr)
        return 2
    failed = False
    for device in devices or DEVICES:
        begun = time.monotonic()
        try:
            build(device)
        except BuildError as error:
            failed |= bool(devices)  # a device that was named must work
            print(f"{device}: {error}", file=sys.stderr)
        print(f"{status(device)[1]} ({time.monotonic() - begun:.1f} s)", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
