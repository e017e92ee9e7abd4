"""Speed against quality: samples drawn and scored at every point of a grid of sampling settings.

A row of the grid is drawn from the same seeds and labels as every other. All rows that were ever measured are kept in
one JSON, so the same command goes on with those that are missing; the table and the plot show those asked for.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

from PIL import Image
from torch import Tensor

from mixar.command_line import AXES, GRID, flag
from mixar.config import PRESETS, SampleConfig, to_dict
from mixar.environment import environment
from mixar.errors import UserError, did_you_mean
from mixar.evaluation.scoring import Scorer
from mixar.files import replacing, write_json, write_text
from mixar.plots import Mark, draw_plot
from mixar.process import check_writable
from mixar.sampling.sample_set import Drawing, differences, naming, parse_setting, place

Settings = dict[str, Any]
Row = dict[str, Any]
Drawings = list[tuple[Settings, list[Drawing]]]  # what is drawn at each point, a range of seeds each


def parse_grid(texts: list[str], given: list[str]) -> list[Settings]:
    """The points of a grid: the product of its axes; of the default one, also each preset.

    Args:
        texts: an axis each, as in `steps=4,8`; without any, the default grid's.
        given: the sampling flags that stand beside the grid.

    Raises:
        UserError: no such axis or value, an axis twice, or one that a flag holds fixed.
    """
    axes: dict[str, list[Any]] = {}
    for text in texts or GRID:
        name, equals, values = text.partition("=")
        if not equals:
            raise UserError(f"--grid {text} is no axis: write such as steps=4,8, and name the run before --grid")
        if name not in AXES:
            hint = did_you_mean(name, AXES)
            raise UserError(f"--grid {text}: there is no axis '{name}'.{hint} Known: {', '.join(AXES)}")
        if name in axes:
            raise UserError(f"--grid has the axis {name} twice: write all of its values once, as in {name}=a,b,c")
        with naming(lambda key: f"--grid {key}="):
            axes[name] = list(dict.fromkeys(parse_setting(name, value) for value in values.split(",")))
    for name in axes if texts else [*axes, "preset"]:
        if (fixed := flag(name)) in given:
            instead = f"drop {fixed}" if texts else f"drop {fixed}, or name the axes, such as --grid guidance=1,2,3"
            raise UserError(f"--grid tries its own {name}: {instead}")
    points = [dict(zip(axes, values)) for values in product(*axes.values())]
    return points if texts else [*points, *({"preset": name} for name in PRESETS)]


def grid_drawings(drawing: Drawing, points: list[Settings], repeats: int) -> Drawings:
    """What is drawn at each point: `repeats` times as many images, of seeds that follow on each other.

    Raises:
        UserError: settings that do not go together or that the model cannot follow; samples of others in the way.
    """
    if drawing.pipeline.prior is None and any("prior_steps" in point for point in points):
        raise UserError(f"this model has no prior to vary prior_steps of: write such as --grid {' '.join(GRID[:2])}")
    first, found = drawing.pipeline.settings.seed, []
    for point in points:
        try:
            with naming(lambda name: f"{name}="):
                drawn = drawing.with_settings(**point)
                parts = [drawn, *(drawn.with_settings(seed=first + i * drawing.count) for i in range(1, repeats))]
                for part in parts:
                    part.check()
        except UserError as error:
            raise UserError(f"--grid at {describe(point)}: {error}") from None
        found.append((point, parts))
    return found


def run_grid(drawing: Drawing, drawings: Drawings, scorer: Scorer, out: Path | None) -> None:
    """Measure the points that `out` holds no row of; write it after each, and in the end the table and the plot.

    Args:
        drawings: of `grid_drawings`.
        out: the JSON; by default `<eval>/<name>-grid.json`.

    Raises:
        UserError: before anything is drawn: images that cannot be scored, or rows of others in the way.
    """
    file = out or place(drawing.path, "eval") / f"{drawing.name}-grid.json"
    check_writable(file)
    head = {name: value for name, value in drawing.record.items() if name != "sampling"}
    head |= {"extractor": scorer.extractor.label, "reference": scorer.reference.digest}
    head |= {"device": environment()["device"]}  # seconds of different ones do not compare
    rows = read_rows(file, head)
    _write(file, head, rows)  # now rather than after an hour, should it not be possible
    keys = [
        {"settings": point, "repeats": len(parts), "sampling": to_dict(parts[0].pipeline.settings)}
        for point, parts in drawings
    ]
    known = [next((row for row in rows if key.items() <= row.items()), None) for key in keys]
    for row, (_, parts) in zip(known, drawings):
        for part in parts if row is None else []:
            scorer.check_receipt(receipt_of(part, file))
    asked: list[Row] = []
    for number, (key, row, (point, parts)) in enumerate(zip(keys, known, drawings), 1):
        if row is None:
            print(f"\n[{number}/{len(drawings)}] {describe(point)}")
            row = key | measure(parts, scorer, file)
            rows.append(row)
            _write(file, head, rows)
        asked.append(row)
    text = table(asked)
    print(f"\n{text}", flush=True)
    write_text(file.with_suffix(".md"), text + "\n")
    with replacing(file.with_suffix(".png")) as aside:
        plot(asked).save(aside, "PNG")
    print(f"the grid: {file}, the table: {file.with_suffix('.md')}, the plot: {file.with_suffix('.png')}")


def receipt_of(part: Drawing, grid: Path) -> Path:
    """Where the scores of `part` are told: beside the grid."""
    return grid.with_name(f"{part.name}.json")


def describe(point: Settings) -> str:
    """`steps=4 guidance=2.0`."""
    return " ".join(f"{name}={value}" for name, value in point.items())


def read_rows(file: Path, head: dict[str, Any]) -> list[Row]:
    """The rows that were measured before; none without a file.

    Raises:
        UserError: a file that is no grid, or whose rows are of another model, reference or device.
    """
    if not file.exists():
        return []
    try:
        before = json.loads(file.read_text())
        # old grids do not tell of the latents
        other = differences({name: before[name] for name in head if name != "latents" or name in before}, head)
        # newer settings were at their defaults
        rows = [row | {"sampling": to_dict(SampleConfig()) | row["sampling"]} for row in before["rows"]]
        if not all(row.keys() >= {"settings", "repeats", "seconds", "distance", "score"} for row in rows):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file} holds no grid: remove it, or name another file with --out") from None
    if other:
        raise UserError(f"{file} holds rows of other {', '.join(other)}: remove it, or name another file with --out")
    return rows


def _write(file: Path, head: dict[str, Any], rows: list[Row]) -> None:
    write_json(file, {**head, "environment": environment(), "rows": rows})


@dataclass
class Stopwatch:
    """Adds up how long batches take to be drawn, without what is done with them afterwards."""

    seconds: float = 0.0
    images: int = 0

    def watch(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """Pass batches [B, ...] on."""
        while True:
            start = perf_counter()
            images = next(batches, None)
            if images is None:
                return
            self.seconds += perf_counter() - start
            self.images += len(images)
            yield images


def measure(parts: list[Drawing], scorer: Scorer, grid: Path) -> Row:
    """Draw what is missing of each repeat and score it: seconds an image, and the scores over the repeats.

    One batch is drawn beforehand, so that nothing is compiled or allocated for the first time while the clock runs.
    Where less than one batch was missing, one is timed that is not kept: fewer images at a time take longer each.
    """
    size = min(parts[0].pipeline.settings.batch, parts[0].count)
    batch = parts[0].labels[:size], parts[0].seeds[:size]
    parts[0].pipeline(*batch)
    clock, receipts, scores = Stopwatch(), [], []
    for part in parts:
        part.write(part.folder, clock.watch)
        receipts.append(receipt_of(part, grid))
        scores.append(scorer.score(part.folder, receipts[-1]))
    if clock.images < size:
        clock = Stopwatch()
        list(clock.watch(parts[0].pipeline.stream(*batch)))
    distances = [score["distance"]["value"] for score in scores]
    row = {
        "seconds": clock.seconds / clock.images,
        "timed": clock.images,
        "distance": {
            "name": scores[0]["distance"]["name"],
            "mean": fmean(distances), "lowest": min(distances), "highest": max(distances),
        },
        "score": {"name": scores[0]["score"]["name"], "mean": fmean(score["score"]["mean"] for score in scores)},
        "receipts": [str(receipt) for receipt in receipts],
    }  # fmt: skip
    if "accuracy" in scores[0]:
        row["accuracy"] = fmean(score["accuracy"] for score in scores)
    return row


def pareto(rows: list[Row]) -> list[Row]:
    """The rows that no other beats in both speed and distance, the fastest first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["seconds"], row["distance"]["mean"])):
        if not front or row["distance"]["mean"] < front[-1]["distance"]["mean"]:
            front.append(row)
    return front


def columns(rows: list[Row]) -> list[str]:
    """The axes that any of the rows varies."""
    return [name for name in AXES if any(name in row["settings"] for row in rows)]


def table(rows: list[Row]) -> str:
    """The rows in markdown, marked where they are on the Pareto front and where the distance is lowest."""
    axes, front = columns(rows), pareto(rows)
    spread, accuracy = any(row["repeats"] > 1 for row in rows), any("accuracy" in row for row in rows)
    lines = [[*axes, "s an image", rows[0]["distance"]["name"], *(["lowest", "highest"] if spread else [])]]
    lines[0] += [rows[0]["score"]["name"], *(["accuracy"] if accuracy else []), ""]
    for row in rows:
        distance, known = row["distance"], {"preset": "", **row["sampling"], **row["settings"]}
        cells = [*(f"{known[name]}" for name in axes), f"{row['seconds']:.3g}", f"{distance['mean']:.3f}"]
        cells += [f"{distance[end]:.3f}" for end in ("lowest", "highest")] if spread else []
        cells += [f"{row['score']['mean']:.3f}", *([f"{row['accuracy']:.1%}"] if accuracy else [])]
        lines.append([*cells, "best" if row is front[-1] else "Pareto" if row in front else ""])
    widths = [max(3, *map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths))} |" for line in lines)


def plot(rows: list[Row]) -> Image.Image:
    """Seconds an image against the distance; presets by name, others on the Pareto front by the values of the axes."""
    axes, front = [name for name in columns(rows) if name != "preset"], pareto(rows)
    marks = []
    for row in rows:
        distance, settings = row["distance"], row["settings"]
        values = [str(settings[name]) for name in ("preset", *axes) if name in settings]
        x, ends = row["seconds"], (distance["mean"], distance["lowest"], distance["highest"])
        y, low, high = (max(end, 1e-6) for end in ends)  # the axis is logarithmic
        marks.append(Mark(x, y, low, high, " / ".join(values), "preset" in settings, row in front))
    note = f"line: Pareto front; labels: {' / '.join(axes) or 'presets'}"
    return draw_plot(marks, "seconds an image", rows[0]["distance"]["name"], note)
