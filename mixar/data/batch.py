"""The batches of a loader, and the protocol of the sources that it reads."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from mixar.transfer import to_device


@dataclass(frozen=True)
class Picks:
    """The samples of one micro-batch."""

    index: Tensor  # int64 [B], global sample index: images seen before it
    rows: list[int]  # the row of each in the source
    flips: list[bool]  # whether each is mirrored


class _Movable:
    """A record whose tensors are moved together."""

    def to(self, device: torch.device | str) -> Self:
        """A copy with its tensors on `device`, without waiting where they come from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """A copy in page-locked memory; torch's DataLoader calls this."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        moved: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                moved[name] = change(value)
            elif isinstance(value, _Movable):
                moved[name] = value._map(change)
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass
class PreDrawn(_Movable):
    """Pre-drawn tokens for TI-Mix."""

    order: Tensor  # int64 [B, N], of which the first `count` positions are masked
    count: list[int]
    codes: Tensor  # int64 [B, N], the prior's draws at the masked positions, the image's own codes elsewhere


@dataclass
class Batch(_Movable):
    """A micro-batch: `moments` and `codes` from shards, `images` from an image set."""

    index: Tensor  # int64 [B], global sample index: images seen before it
    host_index: list[int]  # the same numbers, on the host
    keys: list[str]
    labels: Tensor  # int64 [B]
    moments: Tensor | None = None  # float16 [B, 2C, h, w]: mean and log-variance of the latent
    codes: Tensor | None = None  # int64 [B, N]
    drawn: PreDrawn | None = None
    images: Tensor | None = None  # uint8 [B, 3, H, W]

    def __len__(self) -> int:
        return len(self.keys)

    def select(self, order: list[int]) -> "Batch":
        """The samples at `order`, in that order."""
        pick = to_device(torch.tensor(order), self.index.device)
        moved = self._map(lambda tensor: tensor[pick])
        moved.host_index, moved.keys = [self.host_index[i] for i in order], [self.keys[i] for i in order]
        if moved.drawn is not None:
            moved.drawn.count = [moved.drawn.count[i] for i in order]
        return moved


class Source(Protocol):
    """Samples by row, stored in shards that are best read one after the other."""

    @property
    def pre_drawn_flip(self) -> bool | None:
        """Whether odd pre-drawn variants belong to the mirrored image; None without pre-drawn tokens."""

    @property
    def shard_sizes(self) -> list[int]:
        """The number of samples in each shard."""

    def read(self, picks: Picks) -> Batch:
        """The picked samples."""
