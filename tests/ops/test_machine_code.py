"""The compiled CUDA library, read back: each kernel for each architecture, without spills, and what it is made of."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from mixar.ops.build import ARCHITECTURES, build

pytestmark = pytest.mark.slow  # as a whole: commands, compilers or many processes

# and how many of each: for the types, once with 16 bytes in each access and once with one element
KERNELS = {"forward": 8, "backward": 8, "embed": 4, "draw": 6, "normalise": 16}
ROWS = 4  # that a thread reads before it computes
Code = list[tuple[int, str, str]]  # address, operation and operands


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


@cache
def read(tool: Path, library: Path, *flags: str) -> str:
    return subprocess.run([tool, *flags, library], capture_output=True, text=True, check=True).stdout


def kernel_of(name: str) -> str:
    """The name in the source of a mangled kernel, or nothing."""
    match = re.search(rf"\d({'|'.join(KERNELS)})I", name)
    return match[1] if match else ""


def functions(tool: Path, library: Path, architecture: str) -> dict[str, Code]:
    """The instructions of each kernel."""
    found: dict[str, Code] = {}
    for line in read(tool, library, "-arch", architecture, "-sass").splitlines():
        if match := re.search(r"Function : (\S+)", line):
            code = found.setdefault(match[1], [])
        elif match := re.search(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ +)?([A-Z0-9_.]+) *([^;]*);", line):
            at, operation, operands = int(match[1], 16), match[2], match[3].strip()
            if operation == "CALL.REL.NOINC" and operands == hex(at + 32):
                operation = "BRA"  # how sm_80 leaves a loop, over the jump back
            code.append((at, operation, operands))
    return {name: code for name, code in found.items() if kernel_of(name)}


def row_loops(code: Code) -> Iterator[list[str]]:
    """The operations of the innermost loops around global stores."""
    jumps = [(int(to[1], 16), at) for at, operation, operands in code
             if operation.startswith("BRA") and (to := re.search(r"(0x[0-9a-f]+)$", operands))]  # fmt: skip
    inside = lambda loop: [operation for at, operation, _ in code if loop[0] <= at <= loop[1]]
    end = max(at for at, operation, _ in code if operation == "EXIT")  # after it only shuffles of lanes that diverged
    loops = [(first, last) for first, last in jumps if first <= last < end]
    loops = [loop for loop in loops if any(operation.startswith("STG") for operation in inside(loop))]
    for first, last in loops:
        if not any((first, last) != other and first <= other[0] and other[1] <= last for other in loops):
            yield inside((first, last))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_without_spills(cuobjdump: Path, library: Path, architecture: str) -> None:
    usage = read(cuobjdump, library, "-arch", architecture, "--dump-resource-usage")
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    for kernel, versions in KERNELS.items():
        ours = [row for row in found if kernel_of(row[0]) == kernel]
        assert len(ours) == versions, usage
        shares = kernel in ("forward", "backward", "normalise")
        for name, registers, stack, shared, local in ours:
            assert (int(stack), int(local)) == (0, 0), name
            # three blocks of 128 threads on a multiprocessor, two of 256, or one of 512
            assert int(registers) <= (168 if kernel in ("forward", "backward") else 128), name
            assert (int(shared) > 0) == shares, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_kernels_are_made_of(cuobjdump: Path, library: Path, architecture: str) -> None:
    made: dict[str, set[str]] = {name: set() for name in KERNELS}
    for name, code in functions(cuobjdump, library, architecture).items():
        made[kernel_of(name)] |= {operation.split(".")[0] for _, operation, _ in code}
    assert {"SHFL", "LDG", "STG", "LDS", "STS", "FADD"} <= made["forward"]
    assert {"SHFL", "BAR", "LDS", "STS", "FADD"} <= made["backward"]
    assert {"SHFL", "BAR", "LDS", "STS", "FADD", "FFMA", "MUFU"} <= made["normalise"]
    assert "FFMA" in made["embed"] and "FFMA" in made["draw"]
    for name in KERNELS:
        assert not made[name] & {"ATOM", "ATOMG", "RED", "LDL", "STL"}, name  # sums have one order; nothing spills


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_move_16_bytes_at_a_time(cuobjdump: Path, library: Path, architecture: str) -> None:
    for name, code in functions(cuobjdump, library, architecture).items():
        loops = list(row_loops(code))
        assert loops, name
        for loop in loops:
            # no division or conversion of 64-bit integers; only the square root of a normal number has a slow branch
            assert not [x for x in loop if re.match(r"I2F\S*[US]64", x)], name
            assert "CALL" not in {x.split(".")[0] for x in loop} or "Normal" in name, name
        if re.search(r"Li1EE", name) or kernel_of(name) == "normalise":
            continue
        loads, stores = ([x for loop in loops for x in loop if x.startswith(kind)] for kind in ("LDG", "STG"))
        # the gradient of a bfloat16 encoder's output has half the size of the others
        assert set(stores) <= {"STG.E.128"} | ({"STG.E.64"} if "bfloat16Ef" in name else set()), (name, stores)
        assert len(stores) >= ROWS and len(loads) >= ROWS, (name, loads, stores)
        if kernel_of(name) in ("forward", "backward"):
            assert loads.count("LDG.E.128") >= ROWS, (name, loads)
        if kernel_of(name) == "embed":  # the frequencies, once for all rows
            assert "LDG.E.128" in {operation for _, operation, _ in code}, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_row_is_normalised_16_bytes_at_a_time(cuobjdump: Path, library: Path, architecture: str) -> None:
    kernels = [row for row in functions(cuobjdump, library, architecture).items() if kernel_of(row[0]) == "normalise"]
    same = 0
    for name, code in kernels:
        found = [operation for _, operation, _ in code]
        assert "CALL" not in {x.split(".")[0] for x in found}, name  # neither divides nor takes an exact square root
        assert not [x for x in found if re.match(r"I2F\S*[US]64", x)], name
        access = [x for x in found if x.startswith(("LDG", "STG"))]
        if "Li1EE" in name:
            continue
        if "Li8EE" in name or "Ifff" in name:  # x, shift and scale of one type, as in the head
            assert set(access) == {"LDG.E.128", "STG.E.128"}, (name, access)
            # x, shift and scale of the four vectors that a thread holds, before the first barrier
            assert found[: found.index(next(x for x in found if x.startswith("BAR")))].count("LDG.E.128") >= 12, name
            same += 1
        else:
            assert set(access) <= {"LDG.E.128", "STG.E.128", "LDG.E.64", "STG.E.64"}, (name, access)
    assert same == 3  # with one output type in float32, two in bfloat16


def test_later_cards_compile_what_is_kept_as_ptx(cuobjdump: Path, library: Path) -> None:
    assert re.search(r"\.target sm_100\b", read(cuobjdump, library, "-ptx"))
