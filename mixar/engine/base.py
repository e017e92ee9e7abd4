"""The interface of engines and what they share; they differ in which rank holds which slice of the weights."""

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
    """The result of an optimizer step, on the device: reading its values waits for the device.

    Attributes:
        loss: [], the mean over the step's images of all ranks.
        grad_norm: [], the norm of the mean gradient of all ranks, before clipping.
        finite: [], 1 if the step was taken, 0 if it was skipped because of a non-finite loss or gradient norm; the same
            on all ranks.
        scalars: sums and counts over this rank's images.
        ema_distance: [], ‖ema - live‖ over all parameters; None if it was not measured in this step.
    """

    loss: Tensor
    grad_norm: Tensor
    finite: Tensor
    scalars: Scalars
    ema_distance: Tensor | None = None


class Trainable(Protocol):
    """The interface of a task that an engine trains."""

    def build(self) -> nn.Module:
        """The network. The engine builds it without values, and fills it by `initial`."""

    def initial(self, name: str, like: Tensor) -> Tensor:
        """The initial value of a parameter or buffer, float32 on the CPU, the same on every rank."""

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay acts on this parameter."""

    def loss(self, model: nn.Module, batch: Any, epoch: float) -> tuple[Tensor, Scalars]:
        """The mean loss of the batch's images, and scalars as (sum, count)."""

    # A task may also have `survey(model, batches, mean)`, for a loss that is not a mean over images: it is called
    # without gradients before a step with several passes or several ranks. `mean` takes the mean over the ranks.


class Engine(ABC):
    """Accumulation, clipping, finite check, AdamW, EMA and learning rate over the ranks of a run.

    The trainer uses `step`, `full_weights`, `save` and `load`, and does not know how the weights are sharded. All four
    are collectives. Weights, gradients, moments and EMA are float32; bf16 is autocast.

    Attributes, set by the subclass:
        model: the module that a step calls.
        optimizer: AdamW on the slices.
        shapes: of every trained parameter, by name, in the same order on every rank.
        slices: this rank's share of the float32 weights, by parameter name; none of them is empty.
        moments: AdamW's two moments of the same elements, 1-D, by moment and parameter name.
        buffers: the model's buffers, complete on every rank.
        peers: the ranks that together hold all slices once; None if each holds all of them.
        copies: (i, n): this rank is the i-th of n that hold the same slices.
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
        self.updates = torch.zeros(1, device=place.device)  # number of steps taken, without skipped ones

    def step(self, batches: Sequence[Any], epoch: float, measure: bool = False) -> StepInfo:
        """One optimizer step over the micro-batches of this rank, `epoch` epochs into the run.

        Args:
            measure: also compute the distance between EMA and live weights.
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
        """The context of a micro-batch; the ranks need to exchange gradients only in the last one."""
        return nullcontext()

    @abstractmethod
    def _backward(self, loss: Tensor, count: int) -> None:
        """The backward pass of one of `count` micro-batches."""

    @abstractmethod
    def _update(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip, and step if loss and gradient are finite: the gradient norm and whether it stepped, [] each."""

    @abstractmethod
    def _publish(self) -> None:
        """Copy the slices, just written to, and `updates` to the tensors that training reads."""

    def _begin(self, task: Trainable) -> None:
        """Fill the weights, and start the EMA from them; the last call of a constructor."""
        for name, piece in self.slices.items():
            piece.flat.copy_(piece.of(task.initial(name, torch.empty(piece.shape, device="meta"))))
        for name, buffer in self.buffers.items():
            buffer.copy_(task.initial(name, buffer))
        self._publish()
        self.ema = {name: piece.flat.clone() for name, piece in self.slices.items()}

    def _mean_of_ranks(self, total: Tensor) -> Tensor:
        """The mean over ranks of `total`, which is over equally many images on each."""
        if self.place.world > 1:
            c10d.all_reduce(total)
        return total / self.place.world

    def _sum_over_slices(self, squares: Tensor) -> Tensor:
        """The sum over all slices of `squares`, which is over this rank's own."""
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
        weight = ((1 - decay) * finite).squeeze()  # a tensor, since a number would wait for the device
        live, ema = [piece.flat for piece in self.slices.values()], list(self.ema.values())
        if live and self.place.device.type == "cuda":  # a lerp by a tensor would be one launch per parameter
            moves = torch._foreach_sub(live, ema)
            torch._foreach_mul_(moves, weight)
            torch._foreach_add_(ema, moves)
        elif live:
            torch._foreach_lerp_(ema, live, [weight] * len(live))

    @torch.no_grad()
    def _ema_distance(self) -> Tensor:
        squares = torch.zeros((), device=self.place.device)
        for name, piece in self.slices.items():
            squares += (self.ema[name] - piece.flat).square().sum()
        return self._sum_over_slices(squares).sqrt()

    @torch.no_grad()
    def full_weights(self, which: str) -> dict[str, Tensor]:
        """The complete `live` or `ema` state dict, float32 on the CPU of rank 0; empty on the other ranks.

        A collective: the slices are gathered, one parameter at a time.
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
        """The complete tensor of which this rank holds `flat`, starting at element `start`."""
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
        """Everything that a checkpoint holds, as views of this rank's memory."""
        state: dict[str, Slice] = {}
        for name, piece in self.slices.items():
            state |= {f"model.{name}": piece, f"ema.{name}": piece.like(self.ema[name])}
            state |= {f"{moment}.{name}": piece.like(self.moments[moment][name]) for moment in MOMENTS}
        whole = {f"model.{name}": buffer for name, buffer in self.buffers.items()} | {"updates": self.updates}
        return state | {name: Slice(value.shape, 0, value.view(-1)) for name, value in whole.items()}

    def save(self) -> dict[str, Slice]:
        """This rank's part of a checkpoint, copied to the CPU, so that training can continue while it is written.

        Ranks with identical slices divide the saving among themselves, and rank 0 saves what is complete on every rank,
        so that each element is saved once.
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
        """Load a checkpoint of any engine and any number of ranks.

        Raises:
            CheckpointException: on every rank, if the checkpoint is damaged or belongs to another model.
        """
        # into copies first: a damaged checkpoint must leave the current state unchanged
        state = self._state()
        read = {name: piece.like(piece.flat.to("cpu", copy=True)) for name, piece in state.items()}
        load_slices(read, folder, c10d.group.WORLD if self.place.world > 1 else None)
        for name, piece in state.items():
            piece.flat.copy_(read[name].flat)
        self._publish()
