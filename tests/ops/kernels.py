"""Inputs of operators with what they must give, and the CUDA source compiled for the host to run on them."""

import ctypes
import itertools
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixar.ops.build import SOURCES
from mixar.ops.mix_gather import reference

EMULATION = Path(__file__).parent / "emulation"
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
TYPES = [(F32, F32), (BF16, F32), (BF16, BF16), (F64, F64)]  # of what is gathered, and of parameters and output
GUARD = 64  # elements past an output that no kernel may touch


@dataclass
class Inputs:
    """The arguments of the operator, in its order."""

    encoded: Tensor
    slots: Tensor
    codes: Tensor | None
    drawn: Tensor | None
    rho: Tensor | None
    share: Tensor | None
    weight: Tensor
    bias: Tensor | None
    positions: Tensor

    def all(self) -> tuple[Tensor | None, ...]:
        return tuple(vars(self).values())

    @property
    def bits(self) -> int:
        return -1 if self.bias is None else self.weight.shape[1]

    def truth(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """In float64: the output, a gradient of it as the output's type holds it, and those of the float inputs."""
        leaves = {name: x.double().requires_grad_() for name, x in vars(self).items()
                  if x is not None and name in ("encoded", "weight", "bias", "positions")}  # fmt: skip
        out = reference(**(vars(self) | leaves))
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(self.positions.dtype)
        return out.detach(), grad, list(torch.autograd.grad(out, list(leaves.values()), grad.double()))


def make_inputs(
    images: int = 3, n: int = 7, prefix: int = 2, width: int = 33, bits: int = 5, table: bool = False, mix: bool = True,
    seen: float = 0.3, types: tuple[torch.dtype, torch.dtype] = (F32, F32), seed: int = 0,
) -> Inputs:  # fmt: skip
    """Random inputs: some tokens dropped, some drawn, some ρ equal to λ, the encoded rows in no order."""
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=generator)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    visible = torch.cat([torch.ones(images, prefix, dtype=torch.bool), rand(images, n) < seen], 1)
    tokens = int(visible.sum())
    slots = torch.full((images, prefix + n), -1)
    slots[visible] = torch.randperm(tokens, generator=generator)
    codes, drawn = (torch.randint(-1, 2 ** max(bits, 1), (images, n), generator=generator) for _ in range(2))
    share = torch.tensor([0.5])
    rho = torch.where(rand(images, n) < 0.2, share, rand(images, n))
    gathered, rest = types
    return Inputs(
        randn(tokens, width).to(gathered), slots, codes, *((drawn, rho, share) if mix else (None, None, None)),
        randn(*((2**bits, width) if table else (width, bits))).to(rest), None if table else randn(width).to(rest),
        randn(prefix + n, width).to(rest),
    )  # fmt: skip


# odd sizes: one of everything, widths about a warp and a block, whole 16 bytes or not, no bits, all bits, no prefix,
# nothing or all seen, and more images than a block of the backward pass looks up at once
CASES = [
    {"images": 1, "n": 1, "prefix": 0, "width": 1, "bits": 1, "seen": 0.0},
    {"images": 2, "n": 9, "prefix": 3, "width": 31, "bits": 14},
    {"images": 5, "n": 35, "prefix": 1, "width": 33, "bits": 24},
    {"images": 9, "n": 3, "prefix": 0, "width": 129, "bits": 5, "mix": False},
    {"images": 3, "n": 6, "prefix": 2, "width": 64, "bits": 0, "mix": False},
    {"images": 6, "n": 50, "prefix": 2, "width": 264, "bits": 14},
    {"images": 4, "n": 5, "prefix": 0, "width": 32, "bits": 3, "seen": 1.0},
    {"images": 259, "n": 1, "prefix": 1, "width": 2, "bits": 4},
    {"images": 3, "n": 11, "prefix": 2, "width": 40, "bits": 4, "table": True},
    {"images": 2, "n": 5, "prefix": 0, "width": 7, "bits": 3, "table": True, "seen": 0.0, "mix": False},
]


def assert_close(found: Tensor, truth: Tensor, terms: float = 1.0) -> None:
    """Within the rounding of `found`'s type, for a sum of so many terms of magnitude 1 held in float32 or better."""
    rounding = {F32: 2.0**-23, BF16: 2.0**-8, F64: 2.0**-52}[found.dtype]
    held = 2.0**-52 if found.dtype == F64 else 2.0**-23
    torch.testing.assert_close(found.double(), truth, rtol=rounding, atol=8 * held * max(terms, 1.0))


NORM_TYPES = list(itertools.product((F32, BF16), repeat=3))  # of x, of shift and scale, of the output
# one of everything, odd widths, more rows than blocks, and widths that a warp, a block or neither holds in registers
NORM_SIZES = [(1, 1), (3, 7), (5, 33), (3, 64), (4, 512), (7, 1536), (3, 2056), (1, 8192), (3, 16392), (3, 8193)]


def norm_inputs(
    rows: int, width: int, types: tuple[torch.dtype, torch.dtype, torch.dtype] = (F32, F32, F32), affine: bool = True,
    parts: int = 3,
) -> tuple:  # fmt: skip
    """Arguments of norm_modulate: x far from a mean of zero, shift and scale as columns of a [R, parts w] tensor."""
    generator = torch.Generator().manual_seed(rows + width)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    x = (3 + 2 * randn(rows, width)).to(types[0])
    shift, scale, *_ = randn(rows, parts * width).to(types[1]).chunk(parts, -1)
    return x, *((randn(width), randn(width)) if affine else (None, None)), shift, scale, 1e-6, types[2]


def norm_truth(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> Tensor:
    """norm_modulate in float64."""
    x, shift, scale = x.double(), shift.double(), scale.double()
    h = x - x.mean(-1, keepdim=True)
    h = h / (h.square().mean(-1, keepdim=True) + eps).sqrt()
    if weight is not None and bias is not None:
        h = h * weight.double() + bias.double()
    return h * (1 + scale) + shift


def assert_norm(found: Tensor, given: tuple) -> None:
    """Within the rounding of the output's type, and a few of float32, of what norm_modulate must give."""
    assert found.dtype == given[-1]
    truth = norm_truth(*given[:-1])
    if found.dtype == BF16:
        torch.testing.assert_close(found.double(), truth, rtol=2.0**-8, atol=1e-5)
    else:
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


class _Sources(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in ("images", "length", "prefix")),
                *((name, ctypes.c_void_p) for name in ("slots", "codes", "drawn", "rho", "share"))]  # fmt: skip


class _Forward(ctypes.Structure):
    _fields_ = [("sources", _Sources), *((name, ctypes.c_int64) for name in ("width", "tokens", "bits", "entries")),
                *((name, ctypes.c_void_p) for name in ("encoded", "weight", "bias", "positions", "out"))]  # fmt: skip


class _Backward(ctypes.Structure):
    _fields_ = [("sources", _Sources), *((name, ctypes.c_int64) for name in ("width", "tokens", "bits", "groups")),
                *((name, ctypes.c_void_p) for name in ("grad", "d_encoded", "d_positions", "d_map"))]  # fmt: skip


class _Embed(ctypes.Structure):
    _fields_ = [("rows", ctypes.c_int64), ("half", ctypes.c_int64),
                *((name, ctypes.c_void_p) for name in ("t", "frequencies", "out"))]  # fmt: skip


class _Norm(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in ("rows", "width", "shift_stride", "scale_stride")),
                ("eps", ctypes.c_float),
                *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "shift", "scale", "out"))]  # fmt: skip


class _Random(ctypes.Structure):
    _fields_ = [("images", ctypes.c_int64), ("count", ctypes.c_int64), ("key", ctypes.c_uint64),
                ("start", ctypes.c_uint64), ("index", ctypes.c_void_p), ("out", ctypes.c_void_p)]  # fmt: skip


class Fault(Exception):
    """What the emulation saw: a barrier or shuffle that not all threads reach, or a write past an output."""


class Emulated:
    """The CUDA kernels of a compiled emulation, on CPU tensors."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))

    def forward(self, x: Inputs) -> Tensor:
        out = _Guarded(*x.slots.shape, x.positions.shape[1], dtype=x.positions.dtype)
        given = _Forward(self._sources(x), x.positions.shape[1], len(x.encoded), x.bits, len(x.weight),
                         *map(_pointer, (x.encoded, x.weight, x.bias, x.positions, out.whole)))  # fmt: skip
        self._call("mix_gather", given, x.encoded.dtype, x.positions.dtype)
        return out.checked()

    def backward(
        self, x: Inputs, grad: Tensor, groups: int = 3, d_encoded: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of `encoded`, which may be written into `d_encoded`, `positions` and the map, over all groups."""
        length, width = x.positions.shape
        sums = F64 if grad.dtype == F64 else F32
        groups = min(groups, length)
        outs = [_Guarded(length, width, dtype=sums), _Guarded(groups, x.bits + 1, width, dtype=sums)]
        if d_encoded is None:
            outs.append(_Guarded(*x.encoded.shape, dtype=x.encoded.dtype))
            d_encoded = outs[-1].whole
        given = _Backward(self._sources(x), width, len(x.encoded), x.bits, groups,
                          *map(_pointer, (grad, d_encoded, outs[0].whole, outs[1].whole)))  # fmt: skip
        self._call("mix_gather_backward", given, x.encoded.dtype, grad.dtype)
        d_positions, d_map, *rest = (out.checked() for out in outs)
        return rest[0] if rest else d_encoded, d_positions, d_map.sum(0)

    def timestep_embed(self, t: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Tensor:
        out = _Guarded(len(t), 2 * len(frequencies), dtype=dtype)
        given = _Embed(len(t), len(frequencies), *map(_pointer, (t, frequencies, out.whole)))
        self._call("timestep_embed", given, dtype)
        return out.checked()

    def norm_modulate(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor, scale: Tensor, eps: float,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """What `mixar::norm_modulate` gives, for a contiguous x."""
        out = _Guarded(*x.shape, dtype=dtype)
        given = _Norm(*x.shape, shift.stride(0), scale.stride(0), eps,
                      *map(_pointer, (x, weight, bias, shift, scale, out.whole)))  # fmt: skip
        self._call("norm_modulate", given, x.dtype, shift.dtype, dtype)
        return out.checked()

    def random(self, kind: str, index: Tensor, key: int, start: int, count: int) -> Tensor:
        """What `mixar::random_{kind}` gives, for a contiguous index."""
        out = _Guarded(len(index), count, dtype=torch.int64 if kind == "bits" else F32)
        self._call(f"random_{kind}", _Random(len(index), count, key, start, _pointer(index), _pointer(out.whole)))
        return out.checked()

    def _sources(self, x: Inputs) -> _Sources:
        images, length = x.slots.shape
        prefix = 0 if x.codes is None else length - x.codes.shape[1]
        return _Sources(images, length, prefix, *map(_pointer, (x.slots, x.codes, x.drawn, x.rho, x.share)))

    def _call(self, name: str, given: ctypes.Structure, *dtypes: torch.dtype) -> None:
        codes = [(F32, BF16, F64).index(dtype) for dtype in dtypes]
        if result := getattr(self.library, f"mixar_{name}_cuda")(ctypes.byref(given), *codes, None):
            raise Fault(f"{name}: {result}")


class _Guarded:
    """A tensor full of NaN, or of a large integer, with more of it behind."""

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        self.shape = torch.Size(shape)
        fill = torch.nan if dtype.is_floating_point else 0x5A5A5A5A5A5A5A5A
        self.whole = torch.full((self.shape.numel() + GUARD,), fill, dtype=dtype)
        self.guard = self.whole[self.shape.numel() :].clone()

    def checked(self) -> Tensor:
        if not torch.equal(self.whole[self.shape.numel() :].view(torch.uint8), self.guard.view(torch.uint8)):
            raise Fault("written past the output's end")
        return self.whole[: self.shape.numel()].view(self.shape)


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def compile_emulation(
    out: Path, sources: Sequence[Path] | None = None, folder: Path = SOURCES, flags: Sequence[str] = ("-shared",)
) -> Path:
    """The .cu files of `folder` as host code, with few enough blocks that every grid-stride loop steps."""
    sources = sorted(folder.glob("*.cu")) if sources is None else sources
    command = ["g++", "-std=c++17", "-g", "-O1", "-fPIC", "-Wno-unknown-pragmas", "-DMIXAR_MAX_BLOCKS=2", *flags,
               f"-I{EMULATION}", f"-I{folder}", "-x", "c++", *map(str, sources), "-o", str(out)]  # fmt: skip
    subprocess.run(command, check=True)
    return out


def mutant(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of the sources in `folder`, with one fault seeded."""
    shutil.copytree(SOURCES, folder)
    text = (folder / file).read_text()
    assert text.count(old) >= 1, f"{file} has no {old}"
    (folder / file).write_text(text.replace(old, new, 1))
    return folder
