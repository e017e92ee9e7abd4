"""The CUDA source, unchanged, on the host: right against float64, and wrong as soon as a fault is seeded."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from kernels import (
    BF16,
    CASES,
    EMULATION,
    F32,
    SOURCES,
    TYPES,
    Emulated,
    Fault,
    assert_close,
    compile_emulation,
    make_inputs,
    mutant,
)

pytestmark = [
    pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the emulation with"),
]  # fmt: skip


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> Emulated:
    return Emulated(compile_emulation(tmp_path_factory.mktemp("emulation") / "kernels.so"))


def check(kernels: Emulated, case: dict, types=(F32, F32)) -> None:
    x = make_inputs(**case, types=types)
    out, grad, (d_encoded, d_weight, *rest) = x.truth()
    terms = 1 + max(x.bits, 0)
    assert_close(kernels.forward(x), out, terms)
    found = kernels.backward(x, grad)
    assert_close(found[0], d_encoded)
    assert_close(found[1], rest[-1], len(x.slots))
    if x.bits >= 0:
        assert_close(found[2], torch.cat([d_weight.T, rest[0][None]]), x.slots.numel())


@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_kernels_against_float64(emulated: Emulated, case: dict, types) -> None:
    check(emulated, case, types)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("rows", "half"), [(1, 1), (3, 43), (40, 128)])
def test_timestep_embed_against_float64(emulated: Emulated, rows: int, half: int, dtype: torch.dtype) -> None:
    t, frequencies = torch.linspace(0, 999, rows), torch.logspace(0, -4, half)
    angle = (t[:, None] * frequencies).double()  # the operator's angle is a product of float32 numbers
    found = emulated.timestep_embed(t, frequencies, dtype)
    torch.testing.assert_close(found.double(), torch.cat([angle.cos(), angle.sin()], -1), rtol=2**-8 * (dtype == BF16),
                               atol=2e-7)  # fmt: skip


def test_bfloat16_rounds_ties_to_even(emulated: Emulated) -> None:
    x = make_inputs(images=4, n=40, prefix=0, width=129, seen=1.0, types=(BF16, BF16))  # sums of two: many are ties
    expected = (x.encoded.float()[x.slots] + x.positions.float()).bfloat16()
    assert torch.equal(emulated.forward(x), expected)


def test_a_nan_stays_a_nan(emulated: Emulated) -> None:
    x = make_inputs(prefix=1, types=(BF16, BF16))
    x.encoded[0] = torch.tensor(0x7FFF, dtype=torch.int16).view(BF16)  # rounding up would give -0
    assert emulated.forward(x)[x.slots == 0].isnan().all()


CUDA = "mix_gather_cuda.cu"
MUTATIONS = [
    (CUDA, "  __syncthreads();\n  A sum = 0;", "  A sum = 0;"),
    (CUDA, "  __syncthreads();\n  return sum;", "  return sum;"),
    (CUDA, "  const bool inside = d < m.width;  //", "  const bool inside = d < m.width; if (!inside) return; //"),
    (CUDA, "  const bool inside = d < m.width;\n", "  const bool inside = d < m.width; if (!inside) return;\n"),
    (CUDA, "j < kWarp && first + j < rows", "j < kWarp"),
    (CUDA, "from_lane(mine, j)", "from_lane(mine, lane)"),
    (CUDA, "i += gridDim.y", "i += length"),
    (CUDA, "first += int64_t(gridDim.y) * kWarp", "first += rows"),
    (CUDA, "first += kWarps * kWarp", "first += images"),
    ("mix_gather.h", ">= *sources.share", "> *sources.share"),
    ("mix_gather.h", "id < 0 ? A(0) :", ""),
    ("types.h", "0x7fff + ((bits >> 16) & 1)", "0x8000"),
]


@pytest.mark.parametrize(("file", "old", "new"), MUTATIONS, ids=range(len(MUTATIONS)))
def test_a_seeded_fault_is_caught(tmp_path: Path, file: str, old: str, new: str) -> None:
    folder = mutant(tmp_path / "csrc", file, old, new)
    kernels = Emulated(compile_emulation(tmp_path / "mutant.so", [folder / CUDA], folder, ["-shared", "-O0"]))
    with pytest.raises((AssertionError, Fault)):
        for case in CASES:
            check(kernels, case)
        test_bfloat16_rounds_ties_to_even(kernels)


def test_sanitizers(tmp_path: Path) -> None:
    flags = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [EMULATION / "sanitize.cpp", *SOURCES.glob("*.cu"), *SOURCES.glob("*_cpu.cpp")]
    program = compile_emulation(tmp_path / "sanitize", sources, flags=flags)
    for kernels in ("cpu", "cuda"):
        done = subprocess.run([program, kernels], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        done = subprocess.run([program, kernels, "short"], capture_output=True, text=True)
        assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
