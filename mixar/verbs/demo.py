"""The whole method on small images, on a CPU, in minutes: codecs, shards, prior, MixAR, samples, scores, a picture."""

import argparse
from pathlib import Path
from typing import Any

from mixar.demo.compare import compare
from mixar.demo.report import run_demo
from mixar.demo.stages import SHORT, Demo, Length

MINUTES = 15.0  # of a demo of other images than the digits, whose configs say how long they train


def run(args: argparse.Namespace) -> None:
    length = SHORT if args.short else Length()
    out = args.out or Path(
        "runs", ("demo" if args.images == "digits" else f"demo-{Path(args.images).name}") + "-short" * args.short
    )
    minutes = args.minutes
    if minutes is None and args.images != "digits" and not args.short:
        minutes = MINUTES
    demo = Demo(out, args.images, length, minutes)
    if args.compare:
        _print_table(compare(demo))
        return
    report = run_demo(demo)
    fid, rfid, psnr = report["fid"], report["rfid"], report["psnr"]
    accuracy = {name: f"{share:13.1%}" for name, share in report["accuracy"].items()}
    print(f"""
{"":24}{"distance":>10}{"as labelled" if accuracy else "":>13}
{"discrete prior":24}{fid["prior"]:10.2f}{accuracy.get("prior", "")}
{"MixAR":24}{fid["mixar"]:10.2f}{accuracy.get("mixar", "")}
{"reconstruction by VAE":24}{rfid["vae"]:10.2f}   {psnr["vae"]:.1f} dB
{"... by the tokenizer":24}{rfid["tokenizer"]:10.2f}   {psnr["tokenizer"]:.1f} dB
(Frechet distances in the features of a small {report["measured_with"]["features"]}; not an Inception FID)

{out / "report.png"}   {out / "report.json"}   {report["seconds"]["total"]:.0f} s in all
Next:
  mixar sample {out / "mixar"} --labels 0-{demo.classes - 1} --grid
  mixar train demo/mixar --dry-run
  tensorboard --logdir {out}""")


def _print_table(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'guidance':10}{'parameters':>12}{'tokens':>8}{'s/step':>9}{'s/image':>9}{'distance':>10}")
    for row in rows:
        print(f"{row['guidance']:10}{row['parameters']:12,}{row['tokens']:8}{row['seconds_per_step']:9.3f}"
              f"{row['seconds_per_image']:9.4f}{row['fid']:10.2f}")  # fmt: skip
