"""One rank of `mixar.gpu.ranks`: three steps of an engine, whose weights are compared with those of one process."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from mixar import dist
from mixar.config import Config, images_per_pass, load_config
from mixar.dist import Place
from mixar.gpu.synthetic import batch_of, engine_of

STEPS = 3


def take_steps(cfg: Config, device: torch.device, file: Path) -> dict[str, Any]:
    """The steps in this process alone: losses and gradient norms; `file` gets the weights."""
    figures, weights = _steps(cfg, Place(0, 1, device))
    torch.save(weights, file)
    return figures


def _steps(cfg: Config, place: Place) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The same global batches for any number of ranks; a collective. The weights are complete on rank 0."""
    engine = engine_of(cfg, place)
    images = images_per_pass(cfg, place.world)
    passes = cfg.train.batch // images  # over all ranks
    figures: dict[str, Any] = {"loss": [], "gradient norm": []}
    for step in range(STEPS):
        numbers = range(step * passes + place.rank, (step + 1) * passes, place.world)
        info = engine.step([batch_of(cfg, images, number, place.device) for number in numbers], 0.0)
        figures["loss"].append(info.loss.item())
        figures["gradient norm"].append(info.grad_norm.item())
    return figures, engine.full_weights("live")


def main(config: str, expected: str, out: str) -> None:
    """As a rank of torchrun."""
    place = dist.start(timeout=60)
    figures, weights = _steps(load_config(config), place)
    if place.is_main:
        before = torch.load(expected)
        squares = sum((weights[name] - value).double().square().sum() for name, value in before.items())
        figures["distance"] = (squares / sum(value.double().square().sum() for value in before.values())) ** 0.5
        figures["distance"] = float(figures["distance"])
        Path(out).write_text(json.dumps(figures))
    dist.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
