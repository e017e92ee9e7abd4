"""What the trainer asks of a thing that can be trained, and the sums that its scalars are."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mixar.data.batch import Batch

Scalars = dict[str, Tensor]


class Objective(Protocol):
    """A network to train, its loss, and what to show and to keep of it."""

    def build(self) -> nn.Module:
        """The network with its initial weights, on the CPU."""

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay acts on this parameter."""

    def loss(self, model: nn.Module, batch: Batch, epoch: float) -> tuple[Tensor, Scalars]:
        """The mean loss of the batch's images, and scalars as (sum, count)."""

    def preview(self, model: nn.Module) -> Tensor | None:
        """Images to look at, uint8 [k, 3, H, W], always of the same seeds; None where there is nothing to show."""

    def export(self, model: nn.Module, folder: Path, about: dict[str, Any]) -> None:
        """Write `model` as a release."""


def mean_of(values: Tensor) -> Tensor:
    """The scalar [2] of a mean: sum and count of `values`, without gradient."""
    values = values.detach().float()
    return torch.stack([values.sum(), torch.full_like(values.sum(), values.numel())])


def means_by_bucket(values: Tensor, bucket: Tensor, names: list[str]) -> Scalars:
    """One mean a bucket.

    Args:
        values: [R].
        bucket: int64 [R], the place of each value's bucket in `names`.
    """
    sums = torch.zeros(len(names), 2, device=values.device)
    sums.index_add_(0, bucket, torch.stack([values.detach().float(), torch.ones_like(values, dtype=torch.float32)], -1))
    return dict(zip(names, sums))
