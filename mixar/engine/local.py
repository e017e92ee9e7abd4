"""The engine of one process."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from mixar.config import OptimConfig
from mixar.dist import Place
from mixar.engine.base import LossFunction, Scalars, StepInfo


class LocalEngine:
    """One process, float32 weights, autocast for bf16.

    Args:
        model: on the device; its weights are taken as they are.
        loss: (model, batch, epoch) to the mean loss of the batch's images, and its scalars.
        lr: the learning rate after so many epochs.
        precision: `bf16` or `fp32`.
    """

    def __init__(
        self, model: nn.Module, loss: LossFunction, optimizer: torch.optim.AdamW, cfg: OptimConfig,
        lr: Callable[[float], float], place: Place, precision: str,
    ) -> None:  # fmt: skip
        self.model, self.loss, self.optimizer, self.cfg, self.lr = model, loss, optimizer, cfg, lr
        self.place, self.precision = place, precision
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.updates = torch.zeros((), device=place.device)  # steps taken, skipped ones not counted
        # Adam's state exists from the start, so that a checkpoint can be read into it
        for p in self.parameters.values():
            optimizer.state[p] = {
                "step": torch.zeros((), device=place.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    def step(self, batches: Sequence[Any], epoch: float) -> StepInfo:
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(epoch)
        total = torch.zeros((), device=self.place.device)
        scalars: Scalars = {}
        for batch in batches:
            with self.place.autocast(self.precision):
                loss, parts = self.loss(self.model, batch, epoch)
            (loss / len(batches)).backward()
            total += loss.detach() / len(batches)
            for name, value in parts.items():
                scalars[name] = scalars[name] + value if name in scalars else value
        parameters = list(self.parameters.values())
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.cfg.clip or torch.inf)
        finite = (torch.isfinite(norm) & torch.isfinite(total)).float()
        self.optimizer.grad_scale, self.optimizer.found_inf = None, 1 - finite  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._update_ema(parameters, finite)
        return StepInfo(total, norm, finite, scalars)

    @torch.no_grad()
    def _update_ema(self, parameters: list[nn.Parameter], finite: Tensor) -> None:
        decay = torch.as_tensor(self.cfg.ema, device=self.place.device)
        if self.cfg.ema_warmup:
            decay = torch.minimum(decay, (1 + self.updates) / (10 + self.updates))
        self.updates += finite
        weight = (1 - decay) * finite  # a tensor: a number would have to wait for the device
        torch._foreach_lerp_(list(self.ema.values()), list[Tensor](parameters), [weight] * len(parameters))

    def full_weights(self, which: str) -> dict[str, Tensor]:
        state = {name: value.detach().to("cpu", copy=True) for name, value in self.model.state_dict().items()}
        if which == "ema":
            state |= {name: value.to("cpu", copy=True) for name, value in self.ema.items()}
        return state

    def ema_distance(self) -> Tensor:
        """‖ema - live‖ over all parameters: []."""
        pairs = zip(self.ema.values(), self.parameters.values())
        return torch.stack([(e - p.detach()).square().sum() for e, p in pairs]).sum().sqrt()

    def _state(self) -> dict[str, Tensor]:
        state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        state |= {f"ema.{name}": value for name, value in self.ema.items()}
        for name, p in self.parameters.items():
            state |= {f"{key}.{name}": value for key, value in self.optimizer.state[p].items()}
        return state | {"updates": self.updates}

    def save(self, folder: Path) -> None:
        with _one_process():
            dcp.save(self._state(), checkpoint_id=folder, no_dist=True)

    def load(self, folder: Path) -> None:
        with _one_process():
            dcp.load(self._state(), checkpoint_id=folder, no_dist=True)  # in place: every tensor exists already


@contextmanager
def _one_process() -> Iterator[None]:
    """Keep torch from warning that `no_dist` means a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
