"""Attention over packed rows of tokens: the one place where images of different lengths meet."""

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mixar.errors import UserError
from mixar.model.dropout import Dropping, drop
from mixar.model.rows import Linear, flat, grouped
from mixar.transfer import to_device


class Wanted(NamedTuple):
    """The tokens of packed images whose output is needed.

    Attributes:
        rows: int64 [R], their indices in the packed row, image after image.
        counts: number of them per image, known on the host.
    """

    rows: Tensor
    counts: tuple[int, ...]


class Lengths(NamedTuple):
    """Tokens per image of a packed row, in the form that the kernel takes; see `pack`.

    Attributes:
        counts: numbers on the host, for kernels that compute images of one length together.
        offsets: int32 [B + 1] on the device, the first token of each image and the end, for kernels that take images of
            all lengths at once. A compiled graph then does not depend on the lengths.
        longest: an upper bound of the lengths.
    """

    counts: tuple[int, ...] | None
    offsets: Tensor | None
    longest: int

    def merged(self, images: int) -> "Lengths":
        """The same tokens, divided among the first `images` images: the last of them takes those of the others."""
        if self.counts is not None:
            return self._replace(counts=(*self.counts[: images - 1], sum(self.counts[images - 1 :])))
        assert self.offsets is not None
        return self._replace(offsets=torch.cat([self.offsets[:images], self.offsets[-1:]]))


def pack(counts: Sequence[int], kernel: str, device: torch.device, longest: int) -> Lengths:
    """The lengths of packed images for a kernel of `model.attention` on a device; `longest` bounds them."""
    if _takes_offsets(kernel, device):
        return Lengths(None, _offsets(tuple(counts), device), longest)
    return Lengths(tuple(counts), None, longest)


def _takes_offsets(kernel: str, device: torch.device) -> bool:
    """Whether images of all lengths are computed at once: on a card that such kernels run on."""
    return device.type == "cuda" and kernel in OFFSETS and torch.cuda.get_device_capability(device)[0] in _ANY_CARD[0]


class Queries(NamedTuple):
    """`Wanted` for a block: rows int64 [R], and their numbers per image."""

    rows: Tensor
    lengths: Lengths


class Kernel(NamedTuple):
    """Requirements of an attention kernel, for `model.attention`.

    Attributes:
        backend: of torch's scaled_dot_product_attention; None where torch chooses, or is not used.
        majors: major compute capabilities of the cards that it runs on; empty if it runs everywhere.
        cards: the same in words.
        module, name: the module that contains it, and a name that must be importable from there.
        package: how to get the package of that module.
    """

    backend: SDPBackend | None
    majors: tuple[int, ...] = ()
    cards: str = ""
    module: str = ""
    name: str = ""
    package: str = ""


OFFSETS = ("auto", "efficient", "flash", "fa2", "fa3", "fa4")  # on a card these take images of all lengths at once
FLASH_WIDTH = 192  # of a head: above it flash attention has no backward pass with dropout on some cards, above 256 none
_ANY_CARD = ((8, 9, 10, 11, 12), "a CUDA card of the Ampere generation or newer")
KERNELS = {
    "auto": Kernel(None),
    "math": Kernel(SDPBackend.MATH),
    "efficient": Kernel(SDPBackend.EFFICIENT_ATTENTION, *_ANY_CARD),
    "flash": Kernel(SDPBackend.FLASH_ATTENTION, *_ANY_CARD),
    "cudnn": Kernel(SDPBackend.CUDNN_ATTENTION, *_ANY_CARD),
    "fa2": Kernel(
        None, *_ANY_CARD, "flash_attn", "flash_attn_varlen_func",
        "flash-attn 2, a wheel of github.com/Dao-AILab/flash-attention/releases for your torch and CUDA",
    ),
    "fa3": Kernel(
        SDPBackend.FLASH_ATTENTION, (9,), "a Hopper card (H100, H200)", "flash_attn_interface", "flash_attn_func",
        "FlashAttention-3, built in the folder hopper/ of github.com/Dao-AILab/flash-attention",
    ),
    "fa4": Kernel(
        SDPBackend.FLASH_ATTENTION, (9, 10), "a Hopper or Blackwell card (H100, B200)", "flash_attn.cute.interface",
        "flash_attn_func", "FlashAttention-4, flash_attn/cute of github.com/Dao-AILab/flash-attention",
    ),
}  # fmt: skip


def prepare_attention(kernel: str, device: torch.device) -> str:
    """Make sure that a kernel can run on `device` before anything is computed, and return its description.

    Some kernels lack dropout or a precision: that is checked with the config.

    Raises:
        UserError: the kernel needs another card or a missing package.
    """
    needs = KERNELS[kernel]
    cuda = device.type == "cuda"
    if needs.majors and not (cuda and torch.cuda.get_device_capability(device)[0] in needs.majors):
        found = torch.cuda.get_device_name(device) if cuda else "a CPU"
        raise UserError(f"model.attention={kernel} needs {needs.cards}, not {found}: write model.attention=auto")
    if needs.module:
        try:
            getattr(importlib.import_module(needs.module), needs.name)
        except Exception as error:  # a build for another torch or card may raise anything
            reason = " ".join(str(error).split())
            raise UserError(
                f"model.attention={kernel} needs {needs.package} ({reason}): install it, or write model.attention=auto"
            ) from None
    if kernel in ("fa3", "fa4"):
        try:
            from torch.nn.attention import activate_flash_attention_impl
        except ImportError:
            raise UserError(
                f"model.attention={kernel} needs a newer torch than {torch.__version__}, one that has "
                "torch.nn.attention.activate_flash_attention_impl: write model.attention=auto"
            ) from None
        activate_flash_attention_impl(kernel.upper())
        return f"{kernel} behind torch's flash attention, images of all lengths in one call"
    if kernel == "fa2":
        return "flash_attn_varlen_func, images of all lengths in one call"
    if _takes_offsets(kernel, device):
        names = {"auto": "flash attention in bf16, efficient attention in float32", "flash": "flash attention"}
        return f"torch's {names.get(kernel, 'efficient attention')}, images of all lengths in one call"
    return f"torch's scaled_dot_product_attention ({kernel}), images of one length together"


def attend(
    q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, memory: Lengths, dropout: float, kernel: str,
    keys: Tensor | None,
) -> Tensor:  # fmt: skip
    """Softmax attention of packed images, separately for each image.

    Args:
        q: [T, H, d] for H heads of width d, image after image with the token counts `lengths`.
        k, v: [M, H, d], image after image with the token counts `memory`, M in total.
        dropout: probability of dropping an attention weight.
        kernel: `model.attention`.
        keys: int64 [T], one dropout key per query; None leaves dropout to torch's generator.

    Returns:
        [T, H, d].
    """
    if lengths.offsets is not None:
        return _by_offsets(q, k, v, lengths, memory, dropout, kernel)
    assert lengths.counts is not None and memory.counts is not None
    backend = KERNELS[kernel].backend
    chosen: AbstractContextManager = nullcontext() if backend is None else sdpa_kernel(backend)
    alike = _alike(lengths.counts, memory.counts)
    sizes, memory_sizes = [b * n for b, n, _ in alike], [b * m for b, _, m in alike]
    parts = [None] * len(sizes) if keys is None else keys.split(sizes)
    outs = []
    with chosen:
        for (images, _, _), part, *rows in zip(
            alike, parts, q.split(sizes), k.split(memory_sizes), v.split(memory_sizes)
        ):
            queries, those, values = (rearrange(x, "(b n) h d -> b h n d", b=images) for x in rows)
            if part is None or dropout == 0:
                out = F.scaled_dot_product_attention(queries, those, values, dropout_p=dropout)
            else:
                out = _explicit(queries, those, values, dropout, part.view(images, -1))
            outs.append(rearrange(out, "b h n d -> (b n) h d"))
    return torch.cat(outs)


def _by_offsets(
    q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, memory: Lengths, dropout: float, kernel: str
) -> Tensor:
    """`attend` on a card by a kernel that takes images of all lengths at once."""
    spans = lengths.offsets, memory.offsets, lengths.longest, memory.longest
    if kernel == "fa2":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, *spans, dropout_p=dropout)
    width = q.shape[-1]
    q, k, v = (F.pad(x, (0, -width % 8)) if width % 8 else x for x in (q, k, v))  # both kernels read 8 values at a time
    wide = kernel == "auto" and width > FLASH_WIDTH
    if kernel == "efficient" or q.dtype == torch.float32 or wide:
        out = torch.ops.aten._efficient_attention_forward(
            q[None], k[None], v[None], None, *spans, dropout, 0, torch.is_grad_enabled(), scale=width**-0.5
        )[0][0]
    else:
        out = torch.ops.aten._flash_attention_forward(q, k, v, *spans, dropout, False, False, scale=width**-0.5)[0]
    return out[..., :width]


def _alike(lengths: tuple[int, ...], memory: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Runs of consecutive images of equal size, as (images, length, memory). torch.compile cannot trace groupby."""
    runs: list[tuple[int, int, int]] = []
    for n, m in zip(lengths, memory):
        again = bool(runs) and runs[-1][1] == n and runs[-1][2] == m
        images = runs.pop()[0] if again else 0
        runs.append((images + 1, n, m))
    return runs


def _explicit(q: Tensor, k: Tensor, v: Tensor, dropout: float, keys: Tensor) -> Tensor:
    """Attention of images of equal length, q [B, H, L, d], with dropout decided by the keys [B, L].

    It holds all attention weights in memory; so does torch's own on a CPU with dropout.
    """
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    heads = torch.arange(q.shape[1], device=q.device)[:, None]
    return drop(weights, keys[:, None] + heads, 0, dropout) @ v


# With stratified mask ratios these are the same in every step: built once on the host, kept on the device.
@lru_cache(maxsize=64)
def _offsets(counts: tuple[int, ...], device: torch.device) -> Tensor:
    return to_device(torch.tensor([0, *accumulate(counts)], dtype=torch.int32), device)


class Attention(Dropping):
    """Multi-head self-attention (timm's ViT layout: one projection to q, k and v, in that order)."""

    def __init__(self, width: int, heads: int, dropout: float, kernel: str) -> None:
        super().__init__(dropout)
        self.heads, self.kernel = heads, kernel
        self.qkv = Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, lengths: Lengths, keys: Tensor | None, queries: Queries | None = None) -> Tensor:
        """Self-attention within each packed image: x [T, D] to [T, D], or to [R, D] for the `queries`.

        Args:
            lengths: tokens per image.
            keys: int64 [T] or [R], the dropout keys of the returned tokens; see `drop`.
        """
        q, k, v = (flat(y).unflatten(-1, (self.heads, -1)) for y in self.qkv(x).chunk(3, -1))
        asking, dropout = lengths, self.now
        if queries is not None:
            q, asking = q[queries.rows], queries.lengths
        x = grouped(self.proj(attend(q, k, v, asking, lengths, dropout, self.kernel, keys).flatten(1)))
        return drop(x, keys, 1, dropout)


class CrossAttention(Dropping):
    """Multi-head cross-attention to a memory, with projections without bias (DC-CA)."""

    def __init__(self, width: int, memory_width: int, heads: int, dropout: float, kernel: str) -> None:
        super().__init__(dropout)
        self.heads, self.kernel = heads, kernel
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(memory_width, width, bias=False)
        self.v = nn.Linear(memory_width, width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, lengths: Lengths, memory: Tensor, keys: Tensor | None) -> Tensor:
        """x [T, D] of packed images to [T, D], each attending to its own row of memory [B, N, D'].

        Args:
            lengths: tokens per image; tokens of further images attend to the last row.
            keys: as in `Attention`.
        """
        images, n, _ = memory.shape
        rows = memory.flatten(0, 1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (self.q(flat(x)), self.k(rows), self.v(rows)))
        if lengths.counts is not None:
            there = Lengths((n,) * images, None, n)
        else:
            there = Lengths(None, torch.arange(images + 1, device=x.device, dtype=torch.int32) * n, n)
        dropout = self.now
        x = grouped(self.proj(attend(q, k, v, lengths.merged(images), there, dropout, self.kernel, keys).flatten(1)))
        return drop(x, keys, 1, dropout)
