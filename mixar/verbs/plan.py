"""Parameters, steps, work and memory of a config, in seconds and without starting anything.

    mixar plan CONFIG [key=value ...] --gpus 32 --gpu h100
    mixar plan CONFIG --print run_dir

With --gpus also memory a rank by part, bytes moved, images/s and days under each engine, and what that assumes.
"""

import argparse
import json

from mixar.cards import CARDS
from mixar.config import load_config, value_of
from mixar.plan import make_plan, render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="yaml file, such as configs/mixar_l.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpus", type=int, metavar="N", help="of the whole run, in nodes of eight")
    parser.add_argument("--gpu", choices=CARDS, default="h100", help="the card, with --gpus (default: h100)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--print", metavar="KEY", help="print the value of one key of the config as it is, for scripts")


def run(args: argparse.Namespace) -> None:
    cfg = load_config(args.config, args.overrides)
    if args.print is not None:
        print(value_of(cfg, args.print))
        return
    plan = make_plan(cfg, gpus=args.gpus, card=args.gpu)
    print(json.dumps(plan, indent=2) if args.json else render(plan))
