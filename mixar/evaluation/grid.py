"""Speed against quality: samples made and scored at every point of a grid of sampling settings.

All rows of the grid use the same seeds and labels. Every row that was ever measured is kept in one JSON, so that the
same command measures only the missing ones; the table and the plot show the rows asked for.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

from torch import Tensor

from mixar.config import renamed, to_dict
from mixar.environment import environment
from mixar.errors import UserError
from mixar.evaluation.plot import Mark, draw_plot
from mixar.evaluation.scoring import Scorer
from mixar.files import check_writable, write_json, write_text
from mixar.sampling.record import complete, differences
from mixar.sampling.sample_set import SampleSet, output_folder
from mixar.sampling_flags import AXES, GRID, Settings, spelling

Row = dict[str, Any]
Points = list[tuple[Settings, list[SampleSet]]]  # the sets of each point, one per range of seeds


def sample_sets(samples: SampleSet, points: list[Settings], repeats: int) -> Points:
    """The sets of each point: `samples` under its settings, `repeats` times with consecutive ranges of seeds.

    Raises:
        UserError: settings that do not go together or that the model cannot follow; folders with other samples.
    """
    if samples.pipeline.prior is None and any("prior_steps" in point for point in points):
        raise UserError(f"this model has no prior to vary prior_steps of: write such as --grid {' '.join(GRID[:2])}")
    first, found = samples.pipeline.settings.seed, []
    for point in points:
        try:
            with spelling(lambda name, value: f"{name}={value}"):
                here = samples.with_settings(**point)
                sets = [here, *(here.with_settings(seed=first + i * samples.count) for i in range(1, repeats))]
                for each in sets:
                    each.check()
        except UserError as error:
            raise UserError(f"--grid at {describe(point)}: {error}") from None
        found.append((point, sets))
    return found


def run_grid(samples: SampleSet, points: Points, scorer: Scorer, out: Path | None) -> None:
    """Measure the points without a row in `out`, which is written after each; then write the table and the plot.

    Args:
        points: from `sample_sets`.
        out: the JSON; by default `<eval>/<name>-grid.json`.

    Raises:
        UserError: before anything is sampled: images that cannot be scored, or a file with other rows.
    """
    file = out or output_folder(samples.path, "eval") / f"{samples.name}-grid.json"
    check_writable(file)
    head = {name: value for name, value in samples.record.items() if name != "sampling"}
    head |= {"extractor": scorer.extractor.label, "reference": scorer.reference.digest}
    head |= {"device": environment()["device"]}  # times on different devices cannot be compared
    rows = read_rows(file, head)
    _write(file, head, rows)  # a failure to write is found now rather than after an hour
    keys = [
        {"settings": point, "repeats": len(sets), "sampling": to_dict(sets[0].pipeline.settings)}
        for point, sets in points
    ]
    known = [next((row for row in rows if key.items() <= row.items()), None) for key in keys]
    for row, (_, sets) in zip(known, points):
        for each in sets if row is None else []:
            scorer.check_receipt(receipt_of(each, file))
    asked: list[Row] = []
    for number, (key, row, (point, sets)) in enumerate(zip(keys, known, points), 1):
        if row is None:
            print(f"\n[{number}/{len(points)}] {describe(point)}")
            row = key | measure(sets, scorer, file)
            rows.append(row)
            _write(file, head, rows)
        asked.append(row)
    text = table(asked)
    print(f"\n{text}", flush=True)
    write_text(file.with_suffix(".md"), text + "\n")
    plot(file.with_suffix(".png"), asked)
    print(f"the grid: {file}, the table: {file.with_suffix('.md')}, the plot: {file.with_suffix('.png')}")


def receipt_of(samples: SampleSet, grid: Path) -> Path:
    """The file for the scores of `samples`, beside the grid."""
    return grid.with_name(f"{samples.name}.json")


def describe(point: Settings) -> str:
    """`steps=4 cfg_scale=2.0`."""
    return " ".join(f"{name}={value}" for name, value in point.items())


def read_rows(file: Path, head: dict[str, Any]) -> list[Row]:
    """The rows that were measured before; none where there is no file.

    Raises:
        UserError: a file that is not a grid, or whose rows belong to another model, reference or device.
    """
    if not file.exists():
        return []
    try:
        before = json.loads(file.read_text())
        # old grids do not record the latents
        other = differences({name: before[name] for name in head if name != "latents" or name in before}, head)
        rows = [
            row | {"sampling": complete(row["sampling"]), "settings": renamed(row["settings"])}
            for row in before["rows"]
        ]
        if not all(row.keys() >= {"settings", "repeats", "seconds", "distance", "score"} for row in rows):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file} is not a grid: remove it, or name another file with --out") from None
    if other:
        raise UserError(f"{file} holds rows of other {', '.join(other)}: remove it, or name another file with --out")
    return rows


def _write(file: Path, head: dict[str, Any], rows: list[Row]) -> None:
    write_json(file, {**head, "environment": environment(), "rows": rows})


@dataclass
class Stopwatch:
    """The time that sampling of batches takes, without what is done with them afterwards."""

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


def measure(sets: list[SampleSet], scorer: Scorer, grid: Path) -> Row:
    """Complete and score each set: seconds per image, and the scores over the sets.

    One batch is sampled beforehand, so that nothing is compiled or allocated for the first time while the clock runs.
    Where less than one batch was missing, an extra one is timed and dropped: small batches take longer per image.
    """
    first = sets[0]
    size = min(first.pipeline.settings.batch, first.count)
    batch = first.labels[:size], first.seeds[:size]
    first.pipeline(*batch)
    clock, receipts, scores = Stopwatch(), [], []
    for each in sets:
        each.write(each.folder, clock.watch)
        receipts.append(receipt_of(each, grid))
        scores.append(scorer.score(each.folder, receipts[-1]))
    if clock.images < size:
        clock = Stopwatch()
        list(clock.watch(first.pipeline.stream(*batch)))
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
    """The rows that no other row beats in both speed and distance, the fastest first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["seconds"], row["distance"]["mean"])):
        if not front or row["distance"]["mean"] < front[-1]["distance"]["mean"]:
            front.append(row)
    return front


def columns(rows: list[Row]) -> list[str]:
    """The axes that any of the rows varies."""
    return [name for name in AXES if any(name in row["settings"] for row in rows)]


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table; those on the Pareto front and the one of the lowest distance are marked."""
    axes, front = columns(rows), pareto(rows)
    spread, accuracy = any(row["repeats"] > 1 for row in rows), any("accuracy" in row for row in rows)
    lines = [[*axes, "s/image", rows[0]["distance"]["name"], *(["lowest", "highest"] if spread else [])]]
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


def plot(path: Path, rows: list[Row]) -> None:
    """Plot seconds per image against the distance; presets and the Pareto front are labelled by their settings."""
    axes, front = [name for name in columns(rows) if name != "preset"], pareto(rows)
    marks = []
    for row in rows:
        distance, settings = row["distance"], row["settings"]
        values = [str(settings[name]) for name in ("preset", *axes) if name in settings]
        ends = (distance["mean"], distance["lowest"], distance["highest"])
        y, low, high = (max(end, 1e-6) for end in ends)  # the axis is logarithmic
        marks.append(Mark(row["seconds"], y, low, high, " / ".join(values), "preset" in settings, row in front))
    draw_plot(path, marks, "seconds per image", rows[0]["distance"]["name"], " / ".join(axes) or "presets")
