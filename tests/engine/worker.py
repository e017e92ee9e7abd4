"""One rank of a launch that trains several runs, one after the other: `worker.py CONFIG [[key=value, ...], ...]`."""

import json
import sys

from mixar import dist
from mixar.config import load_config
from mixar.train import train

if __name__ == "__main__":
    for overrides in json.loads(sys.argv[2]):
        train(load_config(sys.argv[1], overrides))
    dist.leave()
    dist.end(0)
