"""Where the time and the memory of a training step go: kernels, host, idle share, peak memory, MFU."""

import gc
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import profile

from mixar.cards import find_card
from mixar.config import Config, images_per_pass
from mixar.data.batch import Batch
from mixar.engine import Engine
from mixar.gpu.findings import Finding, attempt
from mixar.gpu.synthetic import batch_of, changed, single_engine, synchronise
from mixar.plan import make_plan, step_flops

WARM_UP, TIMED, LONGEST = 4, 5, 10
ATTENTION = re.compile(r"flash|fmha|efficient_attention|sdpa|dot_product_attention", re.I)
# what the names of its kernels contain
KERNEL = {"flash": "flash", "fa2": "flash", "fa3": "flash", "fa4": "flash", "cudnn": "cudnn|sdpa", "efficient": "fmha"}


class Launch(NamedTuple):
    """A kernel's run; `seconds` of the device."""

    name: str
    seconds: float


def profiles(cfg: Config, device: torch.device) -> Iterator[Finding]:
    """A step of one micro-batch of the whole model, eager and compiled, without TI-Mix."""
    for way in ("eager", "compiled"):
        name = f"profile: {way}"
        yield attempt(name, partial(measure, name, cfg, device, way == "compiled"))


def measure(name: str, cfg: Config, device: torch.device, compiled: bool) -> Finding:
    """Times of steps by themselves, then one step under torch's profiler, which slows the host down."""
    images = images_per_pass(cfg, ranks=1)
    cfg = changed(cfg, engine={"compile": compiled}, train={"batch": images}, ti_mix={"enabled": False})
    before = _allocated(device)
    engine = single_engine(cfg, device)
    batches = [[batch_of(cfg, images, number, device)] for number in range(WARM_UP + TIMED)]
    for batch in batches[:WARM_UP]:
        engine.step(batch, 0.0)
    synchronise(device)
    host, whole = _times(engine, batches[WARM_UP:], device)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    launches = launches_of(lambda: engine.step(batches[-1], 0.0), device)
    busy, kernels = sum(launch.seconds for launch in launches), [x for x in launches if not x.name.startswith("Mem")]
    figures: dict[str, Any] = {
        "images": images, "step, ms": 1e3 * whole, "host, ms": 1e3 * host, "device, ms": 1e3 * busy,
        "kernels": len(kernels), "idle share": max(0.0, 1 - busy / whole), "longest": longest(launches),
        "attention": sorted({launch.name for launch in launches if ATTENTION.search(launch.name)}),
    }  # fmt: skip
    card = find_card(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if card is not None:
        speed = card.bf16 if cfg.train.precision == "bf16" else card.fp32
        figures["MFU"] = images * step_flops(cfg, images, None)(0.0) / whole / speed
    faults = attention_faults(cfg, figures["attention"]) if device.type == "cuda" else []
    if peak is not None:
        planned = make_plan(cfg, images=1, gpus=1)["engines"]["ddp"]["memory"]["total"]
        figures |= {"peak memory, GiB": peak / 2**30, "planned, GiB": planned / 2**30}
        faults += memory_faults(peak, planned)
    return Finding.of(name, faults, figures)


def _allocated(device: torch.device) -> int:
    """The bytes that tensors hold, from which on the peak is counted anew."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _times(engine: Engine, batches: list[list[Batch]], device: torch.device) -> tuple[float, float]:
    """Seconds of a step until the host has launched it, and until the device is done; medians."""
    times = []
    for batch in batches:
        begun = time.perf_counter()
        engine.step(batch, 0.0)
        launched = time.perf_counter()
        synchronise(device)
        times.append((launched - begun, time.perf_counter() - begun))
    host, whole = (sorted(column)[len(column) // 2] for column in zip(*times))
    return host, whole


def launches_of(work: Callable[[], Any], device: torch.device) -> list[Launch]:
    """The kernels and copies that `work` runs on a card; on a CPU the operators, without those that they call."""
    with profile() as profiled:
        work()
        synchronise(device)
    if device.type == "cuda":
        events = [e for e in profiled.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        return [Launch(event.name, event.time_range.elapsed_us() / 1e6) for event in events]
    events = [event for event in profiled.events() if event.name.startswith(("aten::", "mixar::"))]
    return [Launch(event.name, event.self_cpu_time_total / 1e6) for event in events]


def longest(launches: list[Launch]) -> list[dict[str, Any]]:
    """The names that take the most time, with their number."""
    seconds: dict[str, float] = {}
    for launch in launches:
        seconds[launch.name] = seconds.get(launch.name, 0.0) + launch.seconds
    calls, order = Counter(launch.name for launch in launches), sorted(seconds, key=lambda name: -seconds[name])
    return [{"name": name, "calls": calls[name], "ms": 1e3 * seconds[name]} for name in order[:LONGEST]]


def attention_faults(cfg: Config, names: list[str]) -> list[str]:
    """Whether the attention kernels are those that `model.attention` asks for."""
    asked = cfg.model.attention
    if asked == "math":
        return []
    wanted = KERNEL["flash" if cfg.train.precision == "bf16" else "efficient"] if asked == "auto" else KERNEL[asked]
    if any(re.search(wanted, name, re.I) for name in names):
        return []
    return [f"model.attention={asked} ran {', '.join(names) or 'no attention kernel'}, not one named {wanted}"]


def memory_faults(peak: int, planned: int) -> list[str]:
    """The plan is an upper bound."""
    return [f"the peak is {peak / planned:.2f} of the planned memory"] if peak > planned else []
