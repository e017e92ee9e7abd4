"""What the trainer sees of an engine, and what engines share; they differ in who holds which slice of the weights."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as c10d
from torch import Tensor, nn

from mixar.config import Config
from mixar.dist import Place
from mixar.engine.optim import learning_rate
from mixar.engine.slices import Slice, load_slices

Scalars = dict[str, Tensor]  # name to float32 [2]: a sum and a count, so that means add up over batches and ranks
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class StepInfo:
    """One optimizer step, all on the device: nothing here has been waited for.

    Attributes:
        loss: [], the mean over the step's images of all ranks.
        grad_norm: [], before clipping, of all ranks' mean gradient.
        finite: [], 1 where the step was taken, 0 where a non-finite loss or gradient norm made it skip; the same on all
            ranks.
        scalars: sums and counts of this rank's images.
        ema_distance: [], ‖ema - live‖ over all parameters; None in steps that do not measure it.
    """

    loss: Tensor
    grad_norm: Tensor
    finite: Tensor
    scalars: Scalars
    ema_distance: Tensor | None = None


class Trainable(Protocol):
    """What an engine needs to know of the thing it trains."""

    def build(self) -> nn.Module:
        """The network. Its values do not matter: the engine builds it without any, and fills it by `initial`."""

    def initial(self, name: str, like: Tensor) -> Tensor:
        """The first value of a parameter or buffer, float32 on the CPU, the same on every rank."""

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay acts on this parameter."""

    def loss(self, model: nn.Module, batch: Any, epoch: float) -> tuple[Tensor, Scalars]:
        """The mean loss of the batch's images, and scalars as (sum, count)."""

    # A task may also have `survey(model, batches, mean)`: called without gradient before the passes of a step, where
    # there are several or several ranks, for a loss that is no mean over images. `mean` takes the mean over the ranks.


class Engine(ABC):
    """Accumulation, clipping, finite check, AdamW, EMA and learning rate over the ranks of a run.

    The trainer knows `step`, `full_weights`, `save` and `load`, and nothing of how the weights are laid over ranks. All
    four are collectives. Weights, gradients, moments and EMA are float32; bf16 is autocast.

    Attributes, set by the subclass:
        model: what a step calls.
        optimizer: AdamW on the slices.
        shapes: of every trained parameter, by name, in the same order on every rank.
        slices: this rank's share of the float32 weights, by parameter name; none of them is empty.
        moments: AdamW's two, 1-D, the same elements, by name and parameter.
        buffers: the model's buffers, whole on every rank.
        peers: the ranks that together hold all slices once; None where each holds all of them.
        copies: which of how many holders of the same slices this rank is.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    shapes: dict[str, torch.Size]
    slices: dict[str, Slice]
    moments: dict[str, dict[str, Tensor]]
    buffers: dict[str, Tensor]
    peers: Any = None  # a process group
    copies: tuple[int, int] = (0, 1)

    def __init__(self, cfg: Config, task: Trainable, place: Place) -> None:
        self.cfg, self.loss, self.place = cfg, task.loss, place
        self.survey = getattr(task, "survey", None)
        self.updates = torch.zeros(1, device=place.device)  # steps taken, skipped ones not counted

    def step(self, batches: Sequence[Any], epoch: float, measure: bool = False) -> StepInfo:
        """One optimizer step over the micro-batches of this rank, `epoch` epochs into the run.

        Args:
            measure: also find the distance between EMA and live weights.
        """
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.cfg, epoch)
        total = torch.zeros((), device=self.place.device)
        scalars: Scalars = {}
        if self.survey is not None and len(batches) * self.place.world > 1:
            with torch.no_grad(), self.place.autocast(self.cfg.train.precision):
                self.survey(self.model, batches, self._mean_of_ranks)
        for i, batch in enumerate(batches):
            with self._micro_batch(last=i + 1 == len(batches)):
                with self.place.autocast(self.cfg.train.precision):
                    loss, parts = self.loss(self.model, batch, epoch)
                self._backward(loss, len(batches))
            total += loss.detach() / len(batches)
            for name, value in parts.items():
                scalars[name] = scalars[name] + value if name in scalars else value
        total = self._mean_of_ranks(total)
        norm, finite = self._update(total)
        self._update_ema(finite)
        return StepInfo(total, norm, finite, scalars, self._ema_distance() if measure else None)

    def _micro_batch(self, last: bool) -> AbstractContextManager:
        """A context of one micro-batch; only in the last one need the ranks exchange gradients."""
        return nullcontext()

    @abstractmethod
    def _backward(self, loss: Tensor, count: int) -> None:
        """The backward pass of one of `count` micro-batches."""

    @abstractmethod
    def _update(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip, and step unless loss or gradient are not finite: the gradient norm and whether it did, [] each."""

    @abstractmethod
    def _publish(self) -> None:
        """Bring the slices, just written to, and `updates` to where training reads them."""

    def _begin(self, task: Trainable) -> None:
        """Fill the weights, and start the EMA from them. The last thing a constructor does."""
        for name, piece in self.slices.items():
            piece.flat.copy_(piece.of(task.initial(name, torch.empty(piece.shape, device="meta"))))
        for name, buffer in self.buffers.items():
            buffer.copy_(task.initial(name, buffer))
        self._publish()
        self.ema = {name: piece.flat.clone() for name, piece in self.slices.items()}

    def _mean_of_ranks(self, total: Tensor) -> Tensor:
        """The mean of what each rank found over equally many images."""
        if self.place.world > 1:
            c10d.all_reduce(total)
        return total / self.place.world

    def _sum_over_slices(self, squares: Tensor) -> Tensor:
        """What each rank found on its own slices, summed over all slices."""
        if self.peers is not None:
            c10d.all_reduce(squares, group=self.peers)
        return squares

    @torch.no_grad()
    def _update_ema(self, finite: Tensor) -> None:
        cfg = self.cfg.optim
        decay = torch.full_like(self.updates, cfg.ema)
        if cfg.ema_warmup:
            decay = torch.minimum(decay, (1 + self.updates) / (10 + self.updates))
        self.updates += finite
        weight = ((1 - decay) * finite).squeeze()  # a tensor: a number would have to wait for the device
        live = [piece.flat for piece in self.slices.values()]
        if live:
            torch._foreach_lerp_(list(self.ema.values()), live, [weight] * len(live))

    @torch.no_grad()
    def _ema_distance(self) -> Tensor:
        squares = torch.zeros((), device=self.place.device)
        for name, piece in self.slices.items():
            squares += (self.ema[name] - piece.flat).square().sum()
        return self._sum_over_slices(squares).sqrt()

    @torch.no_grad()
    def full_weights(self, which: str) -> dict[str, Tensor]:
        """The whole `live` or `ema` state dict, float32 on the CPU of rank 0; empty on the other ranks.

        Every rank must call it: the slices travel, one parameter at a time.
        """
        state = {name: buffer.to("cpu", copy=True) for name, buffer in self.buffers.items()}
        for name, shape in self.shapes.items():
            piece = self.slices.get(name)
            flat = None if piece is None else self.ema[name] if which == "ema" else piece.flat
            full = self._assemble(shape, 0 if piece is None else piece.start, flat)
            if self.place.is_main:
                state[name] = full.to("cpu", copy=True)
        return state if self.place.is_main else {}

    def _assemble(self, shape: torch.Size, start: int, flat: Tensor | None) -> Tensor:
        """The whole tensor of which this rank holds `flat` from element `start` on."""
        if self.peers is None:
            assert flat is not None
            return flat.view(shape)
        device, world = self.place.device, c10d.get_world_size(self.peers)
        length = 0 if flat is None else len(flat)
        spans = torch.empty(world, 2, dtype=torch.int64, device=device)
        c10d.all_gather_into_tensor(spans, torch.tensor([[start, length]], device=device), group=self.peers)
        longest = int(spans[:, 1].max())
        own = torch.zeros(longest, device=device)
        if flat is not None:
            own[:length] = flat
        every = torch.empty(world * longest, device=device)
        c10d.all_gather_into_tensor(every, own, group=self.peers)
        full = torch.empty(shape.numel(), device=device)
        for values, (first, count) in zip(every.view(world, longest), spans.tolist()):
            full[first : first + count] = values[:count]
        return full.view(shape)

    def _state(self) -> dict[str, Slice]:
        """All that a checkpoint holds, as views of this rank's memory."""
        state: dict[str, Slice] = {}
        for name, piece in self.slices.items():
            state |= {f"model.{name}": piece, f"ema.{name}": piece.like(self.ema[name])}
            state |= {f"{moment}.{name}": piece.like(self.moments[moment][name]) for moment in MOMENTS}
        whole = {f"model.{name}": buffer for name, buffer in self.buffers.items()} | {"updates": self.updates}
        return state | {name: Slice(value.shape, 0, value.view(-1)) for name, value in whole.items()}

    def save(self) -> dict[str, Slice]:
        """This rank's part of a checkpoint, copied to the CPU: training may go on while it is written.

        Who holds the same slices takes turns, and what is whole everywhere is rank 0's, so each element is in one part.
        """
        turn, copies = self.copies
        state = {name: piece for i, (name, piece) in enumerate(sorted(self._state().items())) if i % copies == turn}
        if self.peers is not None and c10d.get_rank(self.peers) != 0:
            state = {name: piece for name, piece in state.items() if not self._is_whole(name)}
        return {name: piece.like(piece.flat.to("cpu", copy=True)) for name, piece in state.items()}

    def _is_whole(self, name: str) -> bool:
        return name == "updates" or name.removeprefix("model.") in self.buffers

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read what the ranks of any engine saved, whatever their number.

        Raises:
            CheckpointException: on every rank, for a damaged checkpoint or one of another model.
        """
        # aside first: a checkpoint that turns out damaged must leave what is there as it was
        state = self._state()
        read = {name: piece.like(piece.flat.to("cpu", copy=True)) for name, piece in state.items()}
        load_slices(read, folder, c10d.group.WORLD if self.place.world > 1 else None)
        for name, piece in state.items():
            piece.flat.copy_(read[name].flat)
        self._publish()
