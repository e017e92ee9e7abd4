"""The CUDA source, unchanged, on the host: right against float64, and wrong as soon as a fault is seeded."""

import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kernels import (
    BF16,
    CASES,
    EMULATION,
    F32,
    NORM_SIZES,
    NORM_TYPES,
    SOURCES,
    TYPES,
    Emulated,
    Fault,
    assert_close,
    assert_norm,
    compile_emulation,
    make_inputs,
    mutant,
    norm_inputs,
)

from mixar.ops.random import bits_reference, normal_reference, uniform_reference

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


def check_norm(kernels: Emulated, sizes=NORM_SIZES, types=NORM_TYPES) -> None:
    for rows, width in sizes:
        for kinds in types:
            for given in (norm_inputs(rows, width, kinds), norm_inputs(rows, width, kinds, affine=False, parts=2)):
                assert_norm(kernels.norm_modulate(*given), given)


@pytest.mark.parametrize("types", NORM_TYPES, ids=str)
def test_norm_modulate_against_float64(emulated: Emulated, types) -> None:
    check_norm(emulated, types=[types])


def test_norm_modulate_of_addresses_that_are_not_whole_vectors(emulated: Emulated) -> None:
    x, weight, bias, shift, scale, *rest = norm_inputs(3, 64)
    assert all(value.data_ptr() % 16 == 0 for value in (x, weight, bias, shift, scale))
    aligned = emulated.norm_modulate(x, weight, bias, shift, scale, *rest)
    wide = torch.zeros(3, 193)
    wide[:, :64], wide[:, 64:128] = shift, scale
    far = wide[:, :64], wide[:, 64:128]  # the first row begins at whole 16 bytes, the second does not
    for given in ((shifted(x), weight, bias, shift, scale), (x, shifted(weight), bias, shift, scale),
                  (x, weight, shifted(bias), shift, scale), (x, weight, bias, far[0], scale),
                  (x, weight, bias, shift, far[1])):  # fmt: skip
        torch.testing.assert_close(emulated.norm_modulate(*given, *rest), aligned, rtol=1e-6, atol=1e-6)


def test_norm_modulate_of_whole_vectors_around_odd_rows(emulated: Emulated) -> None:
    x, weight, bias, *modulation, eps, dtype = norm_inputs(3, 33)
    padded = (F.pad(value, (0, 3))[:, :33] for value in modulation)
    given = (x, weight, bias, *padded, eps, dtype)
    assert_norm(emulated.norm_modulate(*given), given)


def test_norm_modulate_of_rows_far_apart(emulated: Emulated) -> None:
    given = list(norm_inputs(3, 64, (BF16, BF16, BF16)))
    for i in (3, 4):  # two rows of 2^31 elements between them; memory that is not touched is not taken
        far = torch.empty(2**32 + 64, dtype=BF16).as_strided((3, 64), (2**31, 1))
        given[i] = far.copy_(given[i])
        assert_norm(emulated.norm_modulate(*given), tuple(given))


def test_norm_modulate_of_constant_rows_and_of_nan(emulated: Emulated) -> None:
    x, weight, bias, shift, scale, *rest = norm_inputs(4, 40)
    x[1], x[2, 3] = 5.0, torch.nan
    found = emulated.norm_modulate(x, weight, bias, shift, scale, *rest)
    torch.testing.assert_close(found[1], bias * (1 + scale[1]) + shift[1])
    assert found[2].isnan().all() and not found[[0, 1, 3]].isnan().any()


def shifted(x: torch.Tensor) -> torch.Tensor:
    """A copy that begins one element past the start of its memory."""
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("name", ["encoded", "weight", "bias", "positions"])
def test_addresses_that_are_not_whole_vectors(emulated: Emulated, name: str, types) -> None:
    x = make_inputs(width=136, types=types)
    expected = emulated.forward(x)
    setattr(x, name, shifted(getattr(x, name)))
    assert getattr(x, name).data_ptr() % 16 and torch.equal(emulated.forward(x), expected)


def test_gradients_that_are_not_whole_vectors(emulated: Emulated) -> None:
    x = make_inputs(width=136)
    grad = torch.randn(*x.slots.shape, 136)
    for found, expected in zip(emulated.backward(x, shifted(grad)), emulated.backward(x, grad)):
        assert torch.equal(found, expected)


def test_rows_beyond_two_to_the_31_elements(emulated: Emulated) -> None:
    far, width = 2**25, 64  # memory that is not touched is not taken
    x = make_inputs(images=1, n=3, prefix=0, width=width, seen=1.0, mix=False, types=(BF16, BF16))
    x.encoded = torch.empty(far + 3, width, dtype=BF16)
    x.encoded[far:] = torch.randn(3, width)
    x.slots = far + torch.tensor([[2, 0, 1]])
    assert torch.equal(emulated.forward(x)[0], (x.encoded[x.slots[0]].float() + x.positions.float()).bfloat16())
    grad, d_encoded = torch.randn(1, 3, width).bfloat16(), torch.empty_like(x.encoded)
    emulated.backward(x, grad, d_encoded=d_encoded)
    assert torch.equal(d_encoded[x.slots[0]], grad[0])
    x.slots.fill_(-1)
    x.weight, x.bias, x.codes = x.encoded, None, far + torch.tensor([[1, 2, -1]])
    rows = torch.stack([x.weight[far + 1], x.weight[far + 2], torch.zeros(width, dtype=BF16)])
    assert torch.equal(emulated.forward(x)[0], (rows.float() + x.positions.float()).bfloat16())


INDEX = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 12345678901])


# images and numbers: none, one, odd counts, whole vectors or not, and more than all threads have at once
DRAWN = [(0, 3), (3, 0), (1, 1), (6, 2), (6, 7), (6, 64), (5, 1023), (3, 5120), (2500, 1), (600, 60)]


def check_random(emulated: Emulated, images: int, count: int) -> None:
    index = torch.cat([INDEX, torch.arange(max(0, images - len(INDEX)))])[:images]
    for key, start in ((0, 0), (-7, 2**40 + 1), (2**62, 5)):
        given = (index, key, start, count)
        assert torch.equal(emulated.random("bits", *given), bits_reference(*given))
        assert torch.equal(emulated.random("uniform", *given), uniform_reference(*given))
        found = emulated.random("normal", *given)
        pairs = bits_reference(index, key, start, (count + 1) // 2)
        u1, u2 = ((pairs >> 40) & 0xFFFFFF).double(), ((pairs >> 8) & 0xFFFFFF).float()
        radius = (-2 * ((u1 + 1) * 2.0**-24).log()).sqrt()
        angle = (torch.tensor(2 * math.pi) * u2 * 2.0**-24).double()  # rounded to float32, like the kernel's
        truth = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(1)[:, :count]
        torch.testing.assert_close(found.double(), truth, rtol=4 * 2**-23, atol=1e-12)
        torch.testing.assert_close(found, normal_reference(*given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("images", "count"), DRAWN)
def test_random_numbers(emulated: Emulated, images: int, count: int) -> None:
    check_random(emulated, images, count)


def test_the_ends_of_the_normal_law(emulated: Emulated) -> None:
    for bits, expected in ((0, (2 * 24 * math.log(2)) ** 0.5), (0xFFFFFF << 40, 0.0)):
        # SplitMix64's finaliser is a bijection: the first number of this row has the wanted bits
        row = (unfinalise(bits) - GOLDEN) % 2**64
        key = unfinalise(row)
        index = torch.zeros(1, dtype=torch.int64)
        assert emulated.random("bits", index, key, 0, 1)[0, 0] == bits - (bits >> 63 << 64)
        found = emulated.random("normal", index, key, 0, 2)[0]
        assert found[0].item() == pytest.approx(expected, rel=1e-6) and abs(found[1]) < 1e-6


GOLDEN = 0x9E3779B97F4A7C15


def unfinalise(x: int) -> int:
    """The 64 bits that SplitMix64's finaliser turns into `x`."""
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        x ^= x >> shift ^ x >> 2 * shift
        x = x * pow(factor, -1, 2**64) % 2**64
    return x


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
    (CUDA, "  __syncthreads();\n  Pack<A, N> sum = {};", "  Pack<A, N> sum = {};"),
    (CUDA, "  __syncthreads();\n  return sum;", "  return sum;"),
    (CUDA, "  const bool inside = d < m.width;  //", "  const bool inside = d < m.width; if (!inside) return; //"),
    (CUDA, "  const bool inside = d < m.width;\n", "  const bool inside = d < m.width; if (!inside) return;\n"),
    (CUDA, "  __syncthreads();\n\n", "\n"),
    (CUDA, "if (j + r >= count) break;", ""),
    (CUDA, "from_lane(mine, j + r)", "from_lane(mine, lane)"),
    (CUDA, "position, j + r)", "position, j)"),
    (CUDA, "if (position >= length) position -= length, ++image;", ""),
    (CUDA, "position += step % length", "position += 1"),
    (CUDA, "source[r].slot < 0 ? load", "source[r].slot <= 0 ? load"),
    (CUDA, "source[r].id >= 0 && m.bits >= 0 ?", "source[r].slot < 0 && m.bits >= 0 ?"),
    (CUDA, "source.id >> part * kPart", "source.id"),
    (CUDA, "if (source.id < 0) continue;", ""),
    (CUDA, "parts = unsigned(std::max<int64_t>(1, ", "parts = unsigned(std::min<int64_t>(1, "),
    (CUDA, "from += kRows * step", "from += step"),
    (CUDA, "i += gridDim.y", "i += length"),
    (CUDA, "first < rows; first += step", "first < rows; first += rows"),
    (CUDA, "first += kWarps * kWarp", "first += images"),
    ("launch.h", "width % N == 0", "true"),
    ("mix_gather.h", ">= *sources.share", "> *sources.share"),
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


RANDOM = "random_cuda.cu"
RANDOM_MUTATIONS = [
    (RANDOM, "column += columns", "column += m.count"),
    (RANDOM, "first += kRows * rows", "first += m.images"),
    (RANDOM, "(column + c) / each", "column / each"),
    (RANDOM, "column % each", "0"),
    ("random.h", "x >> 27", "int64_t(x) >> 27"),
    ("random.h", "bits >> 8) & 0xFFFFFF", "bits >> 8)"),
    ("launch.h", "width % N == 0", "true"),
]


@pytest.mark.parametrize(("file", "old", "new"), RANDOM_MUTATIONS, ids=range(len(RANDOM_MUTATIONS)))
def test_a_seeded_fault_of_random_numbers_is_caught(tmp_path: Path, file: str, old: str, new: str) -> None:
    folder = mutant(tmp_path / "csrc", file, old, new)
    kernels = Emulated(compile_emulation(tmp_path / "mutant.so", [folder / RANDOM], folder, ["-shared", "-O0"]))
    with pytest.raises((AssertionError, Fault)):
        for images, count in DRAWN:
            check_random(kernels, images, count)


NORM = "norm_modulate_cuda.cu"
NORM_MUTATIONS = [
    (NORM, "  __syncthreads();\n", ""),
    (NORM, "sums[1], squares", "sums[0], squares"),
    (NORM, "away > 0", "away > 1"),
    (NORM, "lane ^ away", "lane ^ 1"),
    (NORM, "warp < warps", "warp < 1"),
    (NORM, "row += gridDim.x", "row += 2 * gridDim.x"),
    (NORM, "row * m.shift_stride", "row * m.width"),
    (NORM, "row * m.scale_stride", "unsigned(row * m.scale_stride)"),
    (NORM, "f(begin + k * step, held[k])", "f(begin + k * step, held[0])"),
    (NORM, "d = begin + kHeld * step", "d = begin + (kHeld + 1) * step"),
    (NORM, "(load(from.x.at[c]) - mean) * (load(from.x.at[c]) - mean)", "load(from.x.at[c]) * load(from.x.at[c])"),
    (NORM, "bias = read<N>(m.bias + d)", "bias = weight"),
    ("norm_modulate.h", "variance = squares * share + eps", "variance = squares * share"),
    ("norm_modulate.h", "return h * scale + h", "return h * scale"),
    ("launch.h", "width % N == 0", "true"),
]


@pytest.mark.parametrize(("file", "old", "new"), NORM_MUTATIONS, ids=range(len(NORM_MUTATIONS)))
def test_a_seeded_fault_of_the_modulated_norm_is_caught(tmp_path: Path, file: str, old: str, new: str) -> None:
    folder = mutant(tmp_path / "csrc", file, old, new)
    kernels = Emulated(compile_emulation(tmp_path / "mutant.so", [folder / NORM], folder, ["-shared", "-O0"]))
    with pytest.raises((AssertionError, Fault)):
        check_norm(kernels)
        test_norm_modulate_of_whole_vectors_around_odd_rows(kernels)
        test_norm_modulate_of_rows_far_apart(kernels)
        test_norm_modulate_of_constant_rows_and_of_nan(kernels)


def test_sanitizers(tmp_path: Path) -> None:
    flags = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [EMULATION / "sanitize.cpp", *SOURCES.glob("*.cu"), *SOURCES.glob("*_cpu.cpp")]
    program = compile_emulation(tmp_path / "sanitize", sources, flags=flags)
    for kernels in ("cpu", "cuda"):
        done = subprocess.run([program, kernels], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        done = subprocess.run([program, kernels, "short"], capture_output=True, text=True)
        assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


def test_a_sanitizer_sees_rows_that_begin_within_16_bytes(tmp_path: Path) -> None:
    folder = mutant(tmp_path / "csrc", NORM, "scale, scale + m.scale_stride", "scale")
    sources = [EMULATION / "sanitize.cpp", *folder.glob("*.cu"), *folder.glob("*_cpu.cpp")]
    flags = ["-O0", "-fsanitize=alignment", "-fno-sanitize-recover=all"]
    program = compile_emulation(tmp_path / "sanitize", sources, folder, flags)
    done = subprocess.run([program, "cuda"], capture_output=True, text=True)
    assert done.returncode != 0 and "misaligned address" in done.stderr
