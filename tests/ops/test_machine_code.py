"""The compiled CUDA library, read back: each kernel for each architecture, without spills, and what it is made of."""

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from mixar.ops.build import ARCHITECTURES, build

pytestmark = pytest.mark.slow  # as a whole: commands, compilers or many processes

KERNELS = {"forward": 4, "backward": 4, "embed": 2}  # and for how many types each


@pytest.fixture(scope="module")
def cuobjdump() -> Path:
    triton = pytest.importorskip("triton", reason="triton carries the cuobjdump that reads machine code")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this triton has no cuobjdump")
    return tool


@pytest.fixture(scope="module")
def library() -> Path:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc to compile the CUDA operators with")
    return build("cuda")


def read(tool: Path, library: Path, *flags: str) -> str:
    return subprocess.run([tool, *flags, library], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_without_spills(cuobjdump: Path, library: Path, architecture: str) -> None:
    usage = read(cuobjdump, library, "-arch", architecture, "--dump-resource-usage")
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    for kernel, types in KERNELS.items():
        ours = [row for row in found if re.search(rf"\d{kernel}I", row[0])]
        assert len(ours) == types, usage
        for name, registers, stack, shared, local in ours:
            assert (int(stack), int(local)) == (0, 0), name
            assert int(registers) <= 128, name  # two blocks of 256 threads on a multiprocessor
            assert (int(shared) >= 1024) == (kernel == "backward"), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_kernels_are_made_of(cuobjdump: Path, library: Path, architecture: str) -> None:
    made = defaultdict(set)
    kernel = ""
    for line in read(cuobjdump, library, "-arch", architecture, "-sass").splitlines():
        if match := re.search(r"Function : \S*\d(forward|backward|embed)I", line):
            kernel = match[1]
        elif match := re.search(r"^\s+/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_]+)", line):
            made[kernel].add(match[1])
    assert {"SHFL", "LDG", "STG", "FFMA"} <= made["forward"] and "BAR" not in made["forward"]
    assert {"SHFL", "BAR", "LDS", "STS", "FFMA"} <= made["backward"]
    assert "FFMA" in made["embed"]
    for name in KERNELS:
        assert not made[name] & {"ATOM", "ATOMG", "RED", "LDL", "STL"}, name  # sums have one order; nothing spills


def test_later_cards_compile_what_is_kept_as_ptx(cuobjdump: Path, library: Path) -> None:
    assert re.search(r"\.target sm_100\b", read(cuobjdump, library, "-ptx"))
