"""The interface of an objective to the trainer, and its scalars as sums and counts."""

from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mixar.engine import Scalars, Trainable


class Objective(Trainable, Protocol):
    """A network to train, its loss, its preview and its export."""

    def bare(self) -> nn.Module:
        """The network of `build` without what only training needs, under the same names, for previews and exports."""

    def load_frozen(self) -> dict[str, str]:
        """Load the frozen networks that a step runs, on every rank, before the first; their fingerprints by name."""

    def open(self) -> None:
        """Open everything that `preview` and `export` need, so that missing files are reported at the start."""

    def preview(self, model: nn.Module) -> Tensor | None:
        """Images to look at, uint8 [k, 3, H, W], always from the same seeds; None if there are none."""

    def export(self, model: nn.Module, folder: Path, about: dict[str, Any]) -> None:
        """Write `model` as an export to `folder`, replacing one that is there."""


class RandomInit:
    """Initial values of a network that draws them when it is built."""

    seed: int

    def open(self) -> None:
        """Nothing to open: only the network is needed."""

    def build(self) -> nn.Module:
        raise NotImplementedError

    def bare(self) -> nn.Module:
        return self.build()

    def load_frozen(self) -> dict[str, str]:
        return {}

    def initial(self, name: str, like: Tensor) -> Tensor:
        return self._values[name]

    @cached_property
    def _values(self) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.build().state_dict()


def mean_of(values: Tensor) -> Tensor:
    """A mean as a scalar [2]: sum and count of `values`, without gradient."""
    values = values.detach().float()
    return torch.stack([values.sum(), torch.full_like(values.sum(), values.numel())])


def means_by_bucket(values: Tensor, bucket: Tensor, names: list[str]) -> Scalars:
    """One mean per bucket.

    Args:
        values: [R].
        bucket: int64 [R], the index of each value's bucket in `names`.
    """
    sums = torch.zeros(len(names), 2, device=values.device)
    sums.index_add_(0, bucket, torch.stack([values.detach().float(), torch.ones_like(values, dtype=torch.float32)], -1))
    return dict(zip(names, sums))
