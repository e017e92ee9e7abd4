"""What a loader hands to the trainer, and what it asks of a source."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Picks:
    """The samples of one micro-batch."""

    index: Tensor  # int64 [B], global sample index: images seen before it
    rows: list[int]  # their places in the source
    flips: list[bool]  # which of them are mirrored


def on_device(values: list[int], device: torch.device) -> Tensor:
    """int64 numbers of the host on `device`, without waiting for what it computes."""
    tensor = torch.tensor(values, dtype=torch.int64)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class _Movable:
    """A record of tensors that moves as one."""

    def to(self, device: torch.device | str) -> Self:
        """Itself with its tensors on `device`, without waiting when they come from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Itself in page-locked memory; torch's DataLoader calls this."""
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
    """TI-Mix's tokens drawn beforehand."""

    order: Tensor  # int64 [B, N], its first `count` positions are masked
    count: list[int]
    codes: Tensor  # int64 [B, N], the prior's draws at the masked positions, the image's own codes elsewhere


@dataclass
class Batch(_Movable):
    """A micro-batch: `moments` and `codes` from shards, `images` from an image set."""

    index: Tensor  # int64 [B], global sample index: images seen before it
    places: list[int]  # the same, known on the host
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
        pick = on_device(order, self.index.device)
        moved = self._map(lambda tensor: tensor[pick])
        moved.places, moved.keys = [self.places[i] for i in order], [self.keys[i] for i in order]
        if moved.drawn is not None:
            moved.drawn.count = [moved.drawn.count[i] for i in order]
        return moved


class Source(Protocol):
    """Samples by row, kept in shards that are best read one after the other."""

    @property
    def pre_drawn_flip(self) -> bool | None:
        """Whether odd pre-drawn variants are of the mirrored image; None without any."""

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard."""

    def read(self, picks: Picks) -> Batch:
        """The picked samples."""
