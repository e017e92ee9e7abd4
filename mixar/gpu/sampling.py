"""Sampling with and without compilation: equal images, seconds per image."""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from mixar.config import PRESETS, Config
from mixar.dist import fast_precision
from mixar.gpu.findings import Finding, attempt
from mixar.gpu.synthetic import SyntheticObjective, changed, few_blocks
from mixar.model import MixAR
from mixar.model.attention import prepare_attention
from mixar.ops import load
from mixar.sampling import MixARPipeline

IMAGES = 16
LEVELS = 1  # of 255, that rounding may change a pixel by


def sampling(cfg: Config, device: torch.device, images: int = IMAGES) -> Iterator[Finding]:
    """The preset `fastest`, for which the compiled step is made four times at most."""
    yield attempt("sampling: images", partial(_equal, few_blocks(cfg), device, images))
    yield attempt("sampling: speed", partial(_speed, cfg, device, images))


def _equal(cfg: Config, device: torch.device, images: int) -> Finding:
    """In float32, since a fused graph rounds to bfloat16 less often."""
    pixels, _ = sample_both(changed(cfg, model={"attention": "auto"}), device, images, "fp32")
    off, spread = (pixels["eager"].int() - pixels["compiled"].int()).abs(), pixels["eager"].float().std().item()
    figures = {"largest difference, levels": off.max().item(), "share that differs": (off > 0).float().mean().item(),
               "standard deviation, levels": spread}  # fmt: skip
    faults = [] if off.max() <= LEVELS else [f"compiled images differ by up to {off.max()} of 255 levels"]
    faults += [] if spread > 1 else ["the images are of one colour, so that they show nothing"]
    return Finding.of("sampling: images", faults, figures)


def _speed(cfg: Config, device: torch.device, images: int) -> Finding:
    _, figures = sample_both(cfg, device, images, fast_precision(device))
    return Finding("sampling: speed", "ok", "", figures)


def sample_both(
    cfg: Config, device: torch.device, images: int, precision: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The same images eager and compiled, uint8 [B, 3, H, W], and the seconds of each."""
    prepare_attention(cfg.model.attention, device)
    load(device.type)
    torch.compiler.reset()
    cfg = changed(cfg, ti_mix={"enabled": False})
    objective = SyntheticObjective(cfg, device)
    with torch.device("meta"):
        model = MixAR(cfg.model)
    state = {name: objective.initial(name, value).to(device) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    settings = replace(cfg.sample, **PRESETS["fastest"], batch=images)
    guided = cfg.model.guidance != "none"
    labels, seeds = torch.arange(images) % cfg.model.classes, torch.arange(images)
    pixels, figures = {}, {"images": images, "precision": precision}
    for way in ("eager", "compiled"):
        pipeline = MixARPipeline(
            model, objective.frozen.vae, objective.norm, objective.frozen.prior if guided else None, None, settings,
            device, precision, compile=way == "compiled",
        )  # fmt: skip
        seconds = []
        for _ in range(2):
            begun = time.perf_counter()
            pixels[way] = pipeline(labels, seeds)
            seconds.append(time.perf_counter() - begun)
        figures |= {f"{way}, s per image": seconds[1] / images, f"{way}, first call, s": seconds[0]}
    return pixels, figures
