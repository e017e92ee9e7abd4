"""One rank of `mixar.gpu.ranks`, whose weights are compared with those of one process."""

import sys

import torch

from mixar import dist
from mixar.config import load_config
from mixar.files import write_json
from mixar.gpu.ranks import steps_of


def main(config: str, expected: str, out: str) -> None:
    """As a rank of torchrun."""
    place = dist.start(timeout=60)
    figures, weights = steps_of(load_config(config), place)

    def write() -> None:
        before = torch.load(expected)
        both = [torch.cat([state[name].flatten().double() for name in before]) for state in (weights, before)]
        distance = ((both[0] - both[1]).norm() / both[1].norm()).item()
        write_json(out, figures | {"distance": distance})

    dist.on_main(place, write)  # the other ranks wait: one that leaves early is missed
    dist.leave()
    dist.end(0)  # with DeepSpeed, about one interpreter in ten aborts in threads that are left when it shuts down


if __name__ == "__main__":
    main(*sys.argv[1:])
