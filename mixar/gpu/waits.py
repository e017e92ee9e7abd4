"""Whether the host waits for the device within a training step, which leaves the device idle."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mixar.config import Config, images_per_pass
from mixar.gpu.findings import PACKAGE, Finding, attempt
from mixar.gpu.synthetic import batch_of, changed, modes, single_engine

ON_THE_HOST = ("masked_counts", "_asking")  # they read what the host itself has drawn, whatever the device
EPOCH = 0.5  # where TI-Mix mixes half of the tokens


def waits(cfg: Config, device: torch.device) -> Iterator[Finding]:
    """Two micro-batches of a step in each mode, with every wait an error."""
    for mode, form in modes(cfg).items():
        name = f"waits: {mode}"
        yield attempt(name, partial(_step, name, form, device))


def _step(name: str, cfg: Config, device: torch.device) -> Finding:
    images = images_per_pass(cfg, ranks=1)
    engine = single_engine(changed(cfg, engine={"compile": False}), device)
    batches = [batch_of(cfg, images, number, device) for number in range(4)]
    engine.step(batches[:2], EPOCH)  # tables that are kept are made in the first step
    with never_waiting(device):
        info = engine.step(batches[2:], EPOCH)
    loss = info.loss.item()
    return Finding.of(name, [] if info.finite else [f"the loss is {loss}"], {"loss": loss})


@contextmanager
def never_waiting(device: torch.device) -> Iterator[None]:
    """Make it an error to wait for a card. A CPU waits for nothing: there, reading a tensor's value is one.

    Raises:
        RuntimeError: something waited, at its place on a card, at the end on a CPU.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with Reads() as reads:
        yield
    if found := set(reads.sites) - set(ON_THE_HOST):
        raise RuntimeError(f"a value is read in {', '.join(sorted(found))}")


class Reads(TorchFunctionMode):
    """Notes which function of mixar reads a tensor's value, for which the host would have to wait for a device.

    Attributes:
        sites: number of reads by function; `outside` of mixar.
    """

    READS = (
        "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu", "nonzero", "masked_select",
        "unique", "is_nonzero", "equal", "allclose",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.sites: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor) and args[1].dtype == torch.bool
        if getattr(func, "__name__", "") in self.READS or by_mask:
            self.sites[_caller()] += 1
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    frame: Any = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return frame.f_code.co_name if frame is not None else "outside"
