"""Parameters, steps, work and memory of a config, in seconds and without starting anything."""

import argparse
import json

from mixar.config import load_config, value_of
from mixar.plan import make_plan, render


def run(args: argparse.Namespace) -> None:
    cfg = load_config(args.config, args.overrides)
    if args.print is not None:
        print(value_of(cfg, args.print))
        return
    plan = make_plan(cfg, gpus=args.gpus, card=args.gpu)
    print(json.dumps(plan, indent=2) if args.json else render(plan))
