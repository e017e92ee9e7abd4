"""The configs that ship with mixar. Each is one complete run, and can be named in place of a file."""

import argparse

from mixar.errors import UserError
from mixar.files import write_text
from mixar.resources import CONFIGS, config_names


def run(args: argparse.Namespace) -> None:
    names = [args.name] if args.name else config_names()
    texts = {name: (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8") for name in names}
    if args.copy:
        for name in names:
            if (there := args.copy / f"{name}.yaml").exists():
                raise UserError(f"{there} exists and is never replaced: remove it, or name another folder")
        for name, text in texts.items():
            write_text(args.copy / f"{name}.yaml", text)
        print(f"{len(names)} in {args.copy}: train one with mixar train {args.copy / names[0]}.yaml")
    elif args.name:
        print(texts[args.name], end="")
    else:
        for name, text in texts.items():
            print(f"{name:<{max(map(len, names))}}  {text.partition(chr(10))[0].removeprefix('# ')}")
