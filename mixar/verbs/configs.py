"""The configs that ship with mixar. Each describes a complete run, and its name serves in place of a file."""

import argparse

from mixar.config import config_files
from mixar.errors import UserError
from mixar.files import write_text
from mixar.resources import CONFIGS, config_names


def run(args: argparse.Namespace) -> None:
    names = [args.name] if args.name else config_names()
    texts = {name: (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8") for name in names}
    if args.copy:
        files = {file.relative_to(CONFIGS) for name in names for file in config_files(name)}  # with their bases
        for file in files:
            if (there := args.copy / file).exists():
                raise UserError(f"{there} exists and is never replaced: remove it, or name another folder")
        for file in files:
            write_text(args.copy / file, (CONFIGS / file).read_text(encoding="utf-8"))
        print(f"{len(files)} in {args.copy}: train one with mixar train {args.copy / names[0]}.yaml")
    elif args.name:
        print(texts[args.name], end="")
    else:
        for name, text in texts.items():
            print(f"{name:<{max(map(len, names))}}  {text.partition(chr(10))[0].removeprefix('# ')}")
