"""Parameters, steps and memory of a config, in seconds and without starting anything."""

import argparse
import json

from mixar.config import load_config
from mixar.plan import make_plan, render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="yaml file, such as configs/mixar_l.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    plan = make_plan(load_config(args.config, args.overrides))
    print(json.dumps(plan, indent=2) if args.json else render(plan))
