"""The operators of mixar/ops against float64 or the CPU: on the last card, on a side stream, beyond 2^31 elements."""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mixar import rng
from mixar.config import Config
from mixar.gpu.findings import Finding, attempt
from mixar.gpu.synthetic import synchronise
from mixar.ops import gated_add, load, mix_gather, timestep_embed
from mixar.ops.mix_gather import reference
from mixar.ops.timestep_embed import _frequencies
from mixar.rng import Stream

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
TYPES = [(F32, F32), (BF16, F32), (BF16, BF16), (F64, F64)]  # of what is gathered, and of parameters and output
ROUNDING = {F32: 2.0**-23, BF16: 2.0**-8, F64: 2.0**-52}
LARGE = 2**31 + 2**20  # elements, more than an int32 can count
BEYOND = "operators: beyond 2^31 elements"
FLOATS = ("encoded", "weight", "bias", "positions")
Inputs = dict[str, Any]  # the arguments of mix_gather: tensors, None where one is left out


def operators(cfg: Config, device: torch.device) -> Iterator[Finding]:
    """Each operator at the config's sizes and at odd ones."""
    last = torch.device("cuda", torch.cuda.device_count() - 1) if device.type == "cuda" else device
    text = load(device.type)
    native = torch._C._dispatch_has_kernel_for_dispatch_key("mixar::mix_gather", device.type.upper())
    yield Finding("operators: kernels", "ok", text, {"compiled": native})
    sizes = [(8, cfg.model.tokens, cfg.model.class_tokens, cfg.model.decoder_width), (3, 35, 1, 33)]
    for where, on in {"last card": last, "side stream": device}.items():
        for check in (_mix_gather, _timestep_embed, _gated_add, _random):
            name = f"operators: {check.__name__.strip('_')}, {where}"
            yield attempt(name, partial(_run, name, check, sizes, on, where == "side stream"))
    yield attempt(BEYOND, partial(_beyond, device, cfg.model.decoder_width, LARGE))


class Errors:
    """The largest error of each comparison, as a share of what is allowed."""

    def __init__(self) -> None:
        self.shares: dict[str, float] = {}

    def note(self, name: str, found: Tensor, truth: Tensor, rounding: float, terms: float = 1.0) -> None:
        """Compare with a float64 reference.

        Args:
            rounding: relative; of the output's type.
            terms: the number of terms of magnitude 1 that were summed, in float32 or better.
        """
        held = ROUNDING[F64 if found.dtype == F64 else F32]
        allowed = 8 * held * max(terms, 1.0) + rounding * truth.abs()
        error = (found.to(truth) - truth).abs() / allowed
        share = error.max().item() if error.numel() else 0.0
        self.shares[name] = max(self.shares.get(name, 0.0), math.inf if math.isnan(share) else share)

    def finding(self, name: str) -> Finding:
        faults = [f"{what} is {share:.3g} times as far off as rounding allows"
                  for what, share in self.shares.items() if share > 1]  # fmt: skip
        return Finding.of(name, faults, {f"{what}, error/allowed": share for what, share in self.shares.items()})


def _run(name: str, check: Any, sizes: Sequence[tuple[int, ...]], device: torch.device, aside: bool) -> Finding:
    errors, beside = Errors(), aside and device.type == "cuda"
    with torch.cuda.stream(torch.cuda.Stream(device)) if beside else nullcontext():
        for size in sizes:
            check(errors, device, *size, late=aside)
    synchronise(device)
    return errors.finding(name)


def _placed(x: Any, device: torch.device, late: bool) -> Any:
    """A copy of `x` on the device; if `late`, its values come later than another stream would read them."""
    if x is None:
        return None
    staged = x.to(device)  # waits for the copy, unlike that of one tensor of the card to another
    if not late:
        return staged
    there = torch.zeros_like(staged)
    if device.type == "cuda":
        torch.cuda._sleep(2_000_000)  # clock cycles, a millisecond
    return there.copy_(staged)


def make_inputs(
    images: int, n: int, prefix: int, width: int, bits: int, table: bool, mix: bool, types: tuple[Any, Any]
) -> Inputs:
    """Random arguments: a third of the positions visible, some tokens dropped, encoded rows in no order."""
    generator = torch.Generator().manual_seed(images * n + width)
    rand, randn = (partial(draw, generator=generator) for draw in (torch.rand, torch.randn))
    visible = torch.cat([torch.ones(images, prefix, dtype=torch.bool), rand(images, n) < 0.3], 1)
    slots = torch.full(visible.shape, -1)
    slots[visible] = torch.randperm(int(visible.sum()), generator=generator)
    codes, drawn = (torch.randint(-1, 2**bits, (images, n), generator=generator) for _ in range(2))
    gathered, rest = types
    return {
        "encoded": randn(int(visible.sum()), width).to(gathered), "slots": slots, "codes": codes,
        "drawn": drawn if mix else None, "rho": rand(images, n) if mix else None,
        "share": torch.tensor([0.5]) if mix else None,
        "weight": randn(*((2**bits, width) if table else (width, bits))).to(rest),
        "bias": None if table else randn(width).to(rest), "positions": randn(prefix + n, width).to(rest),
    }  # fmt: skip


def _mix_gather(errors: Errors, device: torch.device, images: int, n: int, prefix: int, width: int, late: bool) -> None:
    """Forward, and backward of each float input."""
    for types in TYPES:
        for table, mix in ((False, True), (True, False)):
            x = make_inputs(images, n, prefix, width, 5 if table else 14, table, mix, types)
            names = [name for name in FLOATS if x[name] is not None]
            exact = x | {name: _leaf(x[name], F64) for name in names}
            truth = reference(**exact)
            grad = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)).to(types[1])
            truths = torch.autograd.grad(truth, [exact[name] for name in names], grad.double())
            placed = {name: _placed(value, device, late) for name, value in x.items()}
            placed |= {name: _leaf(placed[name]) for name in names}
            found = mix_gather(**placed)
            kind = f"{'table' if table else 'map'}, {str(types[0])[6:]} to {str(types[1])[6:]}"
            errors.note(f"forward, {kind}", found.cpu(), truth.detach(), ROUNDING[types[1]], 15)
            gradients = torch.autograd.grad(found, [placed[name] for name in names], _placed(grad, device, late))
            for name, gradient, expected in zip(names, gradients, truths):
                rough = table and name == "weight" and types[1] == BF16  # torch's own scatter may add in bfloat16
                terms, rounding = (2.0**15, 2.0**-6) if rough else (images * (prefix + n), ROUNDING[gradient.dtype])
                errors.note(f"gradient of {name}, {kind}", gradient.cpu(), expected, rounding, terms)


def _leaf(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.detach().to(dtype or x.dtype).requires_grad_()


def _timestep_embed(errors: Errors, device: torch.device, images: int, n: int, *_: int, late: bool) -> None:
    t = torch.linspace(0, 999, images * n)
    truth = _embedded(t)
    for dtype in (F32, BF16):
        found = timestep_embed(_placed(t, device, late), dtype=dtype)
        errors.note(f"forward, {str(dtype)[6:]}", found.cpu(), truth, ROUNDING[dtype])


def _embedded(t: Tensor) -> Tensor:
    """In float64, of the operator's own float32 angles."""
    angle = (t[:, None] * _frequencies(256, 10000.0, t.device)).double()
    return torch.cat([angle.cos(), angle.sin()], -1)


def _gated_add(errors: Errors, device: torch.device, images: int, n: int, _: int, width: int, late: bool) -> None:
    generator = torch.Generator().manual_seed(n)
    for dtype in (F32, BF16):
        x, gate, branch, grad = (torch.randn(images * n, width, generator=generator).to(dtype) for _ in range(4))
        leaves = [_leaf(_placed(value, device, late)) for value in (x, gate, branch)]
        found = gated_add(*leaves)
        gradients = torch.autograd.grad(found, leaves, _placed(grad, device, late))
        truths = [x.double() + gate.double() * branch.double(), grad.double(), grad.double() * branch.double(),
                  grad.double() * gate.double()]  # fmt: skip
        for name, value, truth in zip(("forward", "of x", "of gate", "of branch"), (found, *gradients), truths):
            errors.note(f"{name}, {str(dtype)[6:]}", value.detach().cpu(), truth, ROUNDING[dtype], 4)


def _random(errors: Errors, device: torch.device, images: int, n: int, *_: int, late: bool) -> None:
    """Against the CPU's."""
    index = torch.arange(images) + 2**40
    for draw in (rng.bits, rng.uniform, rng.normal):
        there, here = draw(7, Stream.NOISE, _placed(index, device, late), n).cpu(), draw(7, Stream.NOISE, index, n)
        errors.note(draw.__name__, (there - here).double(), torch.zeros(here.shape, dtype=F64), 0.0, 4)


def _beyond(device: torch.device, width: int, elements: int) -> Finding:
    """Outputs of at least `elements` in bfloat16, compared on the device piece by piece."""
    needed = 10 * elements  # bytes, of mix_gather's tensors and the temporaries
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else needed
    if free < needed:
        gib = [f"{size / 2**30:.0f} GiB" for size in (needed, free)]
        return Finding(BEYOND, "not run", f"it takes {gib[0]} of the card's memory, and {gib[1]} are free")
    errors = Errors()
    _many_images(errors, device, width, elements)
    t = torch.linspace(0, 999, math.ceil(elements / 256), device=device)
    embedded = timestep_embed(t, dtype=BF16)
    for rows in torch.arange(len(t), device=device).split(2**16):
        errors.note("timestep_embed", embedded[rows], _embedded(t[rows]), ROUNDING[BF16])
    del embedded
    x = torch.randn(math.ceil(elements / width), width, device=device, dtype=BF16)
    added = gated_add(x, x, x)
    for rows in torch.arange(len(x), device=device).split(2**14):
        some = x[rows].double()
        errors.note("gated_add", added[rows], some + some * some, ROUNDING[BF16], 4)
    del added, x
    index = torch.arange(math.ceil(elements / 2**16), device=device)
    drawn = rng.uniform(7, Stream.NOISE, index, 2**16)
    for rows in index.split(64):  # an image's numbers do not depend on the others
        errors.note("random", drawn[rows], rng.uniform(7, Stream.NOISE, rows, 2**16).double(), 0.0)
    return errors.finding(BEYOND)


def _many_images(errors: Errors, device: torch.device, width: int, elements: int) -> None:
    """mix_gather, forward and backward, over copies of 64 images, which each have rows of their own."""
    given = make_inputs(64, 256, 64, width, 14, False, True, (BF16, BF16))
    some = {name: _placed(x, device, False) for name, x in given.items()}
    exact = some | {name: _leaf(some[name], F64) for name in FLOATS}
    truth, tokens = reference(**exact), len(some["encoded"])
    copies = math.ceil(elements / truth.numel())
    first = torch.arange(copies, device=device)[:, None, None] * tokens
    many = some | {name: some[name].repeat(copies, 1) for name in ("encoded", "codes", "drawn", "rho")}
    many["slots"] = torch.where(some["slots"] < 0, -1, some["slots"] + first).flatten(0, 1)
    many |= {name: _leaf(many[name]) for name in FLOATS}
    found = mix_gather(**many)
    for part in found.detach().split(64):
        errors.note("mix_gather", part, truth.detach(), ROUNDING[BF16], 15)
    grad = torch.randn(found.shape, device=device, dtype=BF16)
    gradients = torch.autograd.grad(found, [many[name] for name in FLOATS], grad)
    sums: dict[str, Any] = dict.fromkeys(FLOATS[1:], 0.0)
    for part, rows in zip(grad.split(64), gradients[0].split(tokens)):
        truths = torch.autograd.grad(truth, [exact[name] for name in FLOATS], part.double(), retain_graph=True)
        errors.note("mix_gather, gradient of encoded", rows, truths[0], ROUNDING[BF16])
        sums = {name: total + value for (name, total), value in zip(sums.items(), truths[1:])}
    for (name, total), gradient in zip(sums.items(), gradients[1:]):
        errors.note(f"mix_gather, gradient of {name}", gradient, total, ROUNDING[BF16], grad.numel() / width)
