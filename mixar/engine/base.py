"""What the trainer sees of an engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

Scalars = dict[str, Tensor]  # name to float32 [2]: a sum and a count, so that means add up over batches and ranks
LossFunction = Callable[[nn.Module, Any, float], tuple[Tensor, Scalars]]


@dataclass
class StepInfo:
    """One optimizer step, all on the device: nothing here has been waited for.

    Attributes:
        loss: [], the mean over the step's images.
        grad_norm: [], before clipping.
        finite: [], 1 where the step was taken, 0 where a non-finite loss or gradient norm made it skip.
        scalars: sums and counts.
    """

    loss: Tensor
    grad_norm: Tensor
    finite: Tensor
    scalars: Scalars


class Engine(Protocol):
    """Accumulate, clip, finite check, optimizer, EMA and learning rate behind four methods."""

    def step(self, batches: Sequence[Any], epoch: float) -> StepInfo:
        """One optimizer step over the micro-batches of this rank, `epoch` epochs into the run."""

    def full_weights(self, which: str) -> dict[str, Tensor]:
        """The whole `live` or `ema` state dict, float32 on the CPU."""

    def save(self, folder: Path) -> None:
        """Write weights, moments, EMA and step count below `folder`."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
