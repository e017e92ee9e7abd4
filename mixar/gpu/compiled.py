"""The compiled training step against the eager one, and the number of compilations after the first steps."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch._dynamo.utils import counters

from mixar.config import Config, images_per_pass
from mixar.gpu.findings import Finding, attempt
from mixar.gpu.synthetic import batch_of, changed, modes, single_engine, synchronise
from mixar.gpu.waits import never_waiting

STEPS = 50
WARM_UP = 3  # steps in which graphs may be made
# relative, of loss and gradient norm: a fused graph rounds to bfloat16 less often
CLOSE = {"bf16": (1e-2, 5e-2), "fp32": (1e-5, 1e-3)}


def compiled_steps(cfg: Config, device: torch.device, steps: int = STEPS) -> Iterator[Finding]:
    """Each mode eager and compiled from the same weights and batches; without dropout, which they draw differently."""
    for mode, form in modes(changed(cfg, model={"dropout": 0.0})).items():
        name = f"compiled step: {mode}"
        yield attempt(name, partial(compare, name, form, device, steps))


def compare(name: str, cfg: Config, device: torch.device, steps: int) -> Finding:
    """The first step of both, then `steps` compiled ones, in whose course λ falls from 1 to 0."""
    torch.compiler.reset()
    counters.clear()
    images = images_per_pass(cfg, ranks=1)
    figures: dict[str, Any] = {}
    faults = []
    for way in ("eager", "compiled"):
        engine = single_engine(changed(cfg, engine={"compile": way == "compiled"}), device)
        begun = time.perf_counter()
        info = engine.step([batch_of(cfg, images, 0, device)], 1 / steps)
        figures |= {f"{way} loss": info.loss.item(), f"{way} gradient norm": info.grad_norm.item()}
    figures["first compiled step, s"] = time.perf_counter() - begun
    for what, limit in zip(("loss", "gradient norm"), CLOSE[cfg.train.precision]):
        plain, fused = figures[f"eager {what}"], figures[f"compiled {what}"]
        if not abs(plain - fused) <= limit * abs(plain):
            faults.append(f"the {what} is {fused:.6g} compiled, {plain:.6g} eager")
    made = 0
    for step in range(1, steps):
        engine.step([batch_of(cfg, images, step, device)], (step + 1) / steps)
        if step == WARM_UP - 1:
            made = counters["stats"]["unique_graphs"]
    synchronise(device)
    figures |= {"graphs": made, "recompiles": counters["stats"]["unique_graphs"] - made,
                "graph breaks": sum(counters["graph_break"].values()), "steps": steps}  # fmt: skip
    faults += [f"{figures[what]} {what}" for what in ("recompiles", "graph breaks") if figures[what]]
    faults += [] if made else ["nothing was compiled"]
    if device.type == "cuda":  # on a CPU the watch itself would be compiled
        batch = batch_of(cfg, images, steps, device)
        with never_waiting(device):
            engine.step([batch], 1.0)
    return Finding.of(name, faults, figures)
