"""Random numbers on the device against those of the CPU."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from mixar import rng
from mixar.config import Config
from mixar.gpu.findings import Finding, attempt
from mixar.rng import Stream

# logarithms and sines differ by a few units in the last place
TOLERANCE = 1e-5


def random_numbers(cfg: Config, device: torch.device) -> Iterator[Finding]:
    """What training and sampling draw: integers bit for bit, floats closely."""
    yield attempt("random numbers", partial(_compare, cfg.seed, device))


def _compare(seed: int, device: torch.device) -> Finding:
    index = torch.cat([torch.arange(1024), torch.tensor([2**31, 2**40, 2**62, -1])])
    exact: dict[str, Callable[..., Tensor]] = {
        "bits": partial(rng.bits, seed, Stream.NOISE),
        "bits of a large seed": partial(rng.bits, 2**62, Stream.PRIOR_TOKEN),
        "bits further on": lambda index, *shape: rng.bits(seed, Stream.SAMPLE_STEP, index, *shape, start=2**33),
        "uniform": partial(rng.uniform, seed, Stream.TIMESTEP),
        "permutation": lambda index, *shape: rng.permutation(seed, Stream.MASK_ORDER, index, shape[0]),
    }
    close: dict[str, Callable[..., Tensor]] = {
        "normal": partial(rng.normal, seed, Stream.POSTERIOR),
        "gumbel": partial(rng.gumbel, seed, Stream.PRIOR_GUMBEL),
    }
    faults, figures = [], {}
    for name, draw in exact.items():
        there, here = draw(index.to(device), 257).cpu(), draw(index, 257)
        figures[f"{name}, share that differs"] = share = (there != here).float().mean().item()
        if share:
            faults.append(f"{name} are not the CPU's")
    for name, draw in close.items():
        there, here = draw(index.to(device), 257).cpu(), draw(index, 257)
        figures[f"{name}, largest error"] = ((there - here).abs() / here.abs().clamp_min(1)).nan_to_num(0).max().item()
        if not torch.allclose(there, here, rtol=TOLERANCE, atol=TOLERANCE):
            faults.append(f"{name} are further from the CPU's than {TOLERANCE:g}")
    return Finding.of("random numbers", faults, figures)
