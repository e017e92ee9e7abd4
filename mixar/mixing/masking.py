"""The training mask (Eq. 8): the distribution of its ratio, its stratification, and the packing of visible tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixar import rng
from mixar.config import MaskConfig
from mixar.rng import Stream
from mixar.transfer import to_device


def ratio_quantile(u: Tensor, minimum: float, std: float) -> Tensor:
    """The quantile function of normal(1, std) truncated to [minimum, 1], MAR's distribution of the mask ratio.

    Args:
        u: probability levels on [0, 1].

    Returns:
        float64, the shape of `u`.
    """
    low = torch.special.ndtr(torch.tensor((minimum - 1) / std, dtype=torch.float64))
    return 1 + std * torch.special.ndtri(low + u.double() * (0.5 - low))


def masked_counts(cfg: MaskConfig, tokens: int, seed: int, indices: Sequence[int], batch: int) -> list[int]:
    """The number of masked positions per image, ⌈rN⌉ of N.

    With `ratio_scope: image`, consecutive images form groups of G, and each group uses the G quantile midpoints of the
    ratio's distribution in a random order, so that every micro-batch has the same counts. With `batch`, one ratio is
    drawn for all images of a global batch, as in the reference.

    Args:
        indices: global indices of the images; with `ratio_scope: image` complete groups of G.
        batch: the size of the global batch.
    """
    if cfg.ratio_scope == "batch":
        scope = torch.tensor(sorted({i // batch for i in indices}))
        ratio = dict(zip(scope.tolist(), rng.uniform(seed, Stream.MASK_RATIO, scope), strict=True))
        levels = torch.stack([ratio[i // batch] for i in indices])
    else:
        groups = torch.tensor([i // cfg.group for i in indices[:: cfg.group]])
        strata = rng.permutation(seed, Stream.MASK_RATIO, groups, cfg.group).flatten()
        levels = (strata.double() + 0.5) / cfg.group
    return torch.ceil(tokens * ratio_quantile(levels, cfg.minimum, cfg.std)).long().tolist()


class Room(NamedTuple):
    """Numbers of visible and of masked tokens that each batch is filled up to, so that shapes do not change."""

    visible: int
    masked: int


def rooms(cfg: MaskConfig, tokens: int, images: int) -> tuple[Room, Room]:
    """The room of almost all micro-batches of `images`, and the room that is always enough.

    Usual are four standard deviations above the mean; with `ratio_scope: batch` all images have one ratio.

    Args:
        tokens: N.
    """
    return _rooms(cfg.minimum, cfg.std, cfg.ratio_scope == "batch", tokens, images)


@lru_cache(maxsize=8)
def _rooms(minimum: float, std: float, alike: bool, tokens: int, images: int) -> tuple[Room, Room]:
    masked = torch.ceil(tokens * ratio_quantile((torch.arange(1024) + 0.5) / 1024, minimum, std))
    spread = 4 * masked.std() / (1 if alike else math.sqrt(images))
    both = [tokens - masked, masked]
    most = [images * int(counts.max()) for counts in both]
    usual = [min(math.ceil(images * (counts.mean() + spread) / 64) * 64, top) for counts, top in zip(both, most)]
    return Room(*usual), Room(*most)


@dataclass(frozen=True)
class Masking:
    """The masked positions of a batch, and the packing of the visible ones into one row of tokens.

    Attributes:
        masked: bool [B, N], True where the model predicts.
        visible: V per image, known on the host, so that no shape waits for the device.
        room: the numbers of tokens that the model fills its rows up to; None adds no tokens.
    """

    masked: Tensor
    visible: tuple[int, ...]
    room: Room | None = None

    @classmethod
    def from_order(cls, order: Tensor, counts: Sequence[int], rooms: Sequence[Room] = ()) -> "Masking":
        """Mask the first `counts[b]` positions of image b's `order` [B, N], and take the first room that is enough."""
        n = order.shape[1]
        limits = _on_device(tuple(counts), order.device)
        masked, visible = sum(counts), n * len(counts) - sum(counts)
        room = next((room for room in rooms if room.visible >= visible and room.masked >= masked), None)
        return cls(order.argsort(-1) < limits[:, None], tuple(n - count for count in counts), room)

    @property
    def hidden(self) -> tuple[int, ...]:
        """N - V per image."""
        return tuple(self.masked.shape[1] - v for v in self.visible)

    def packed_rows(self, prefix: int) -> Tensor:
        """The encoder's tokens as indices into the flattened [B, prefix + N]: per image the prefix, then the visible.

        Returns:
            int64 [T], in raster order within an image; T is the sum of prefix + V.
        """
        seen_first = F.pad(self.masked, (prefix, 0)).int().argsort(dim=-1, stable=True)
        return _flat(seen_first)[_spans(self.visible, seen_first.shape[1], prefix, False, self.masked.device)]

    def slots(self, prefix: int) -> Tensor:
        """The inverse of `packed_rows`: int64 [B, prefix + N], the packed row of each position, -1 where masked."""
        seen = F.pad(~self.masked, (prefix, 0), value=True)
        return torch.where(seen, seen.flatten().cumsum(0).view_as(seen) - 1, -1)

    @property
    def masked_rows(self) -> Tensor:
        """Indices of the masked positions in the flattened [B, N]: int64 [R], image by image in raster order."""
        seen_first = self.masked.int().argsort(dim=-1, stable=True)
        return _flat(seen_first)[_spans(self.visible, seen_first.shape[1], 0, True, self.masked.device)]

    @property
    def row_weights(self) -> Tensor:
        """float32 [R], the weight of each masked row in a mean over the rows of an image, then over images."""
        return _weights(self.hidden, self.masked.device)


def _flat(index: Tensor) -> Tensor:
    """Positions within an image [B, P] as indices into the flattened batch [B*P]."""
    return (index + torch.arange(len(index), device=index.device)[:, None] * index.shape[1]).flatten()


# With stratified ratios these are the same in every step, and in sampling in every batch: they are built once on the
# host, and kept on the device.
@lru_cache(maxsize=512)
def _on_device(counts: tuple[int, ...], device: torch.device) -> Tensor:
    return to_device(torch.tensor(counts), device)


@lru_cache(maxsize=512)
def _spans(visible: tuple[int, ...], width: int, prefix: int, tail: bool, device: torch.device) -> Tensor:
    """The first prefix + V columns of each row of a [B, width] table, or those after them, flattened."""
    spans = [(b * width, b * width + prefix + v, (b + 1) * width) for b, v in enumerate(visible)]
    parts = [torch.arange(cut, end) if tail else torch.arange(start, cut) for start, cut, end in spans]
    return to_device(torch.cat(parts), device)


@lru_cache(maxsize=64)
def _weights(counts: tuple[int, ...], device: torch.device) -> Tensor:
    return to_device(torch.cat([torch.full((count,), 1 / (count * len(counts))) for count in counts]), device)
