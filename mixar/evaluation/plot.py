"""A plot of speed against quality, with its Pareto front, by matplotlib."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixar.files import replacing

# Okabe and Ito's colours, which colour-blind readers can tell apart; the shapes differ as well
FRONT, NAMED, OTHER = "#0072B2", "#D55E00", "#8C8C8C"


@dataclass(frozen=True)
class Mark:
    """A point of the plot.

    Attributes:
        low, high: the spread of y.
        label: its settings, listed beside the plot where it is `named` or on the front.
        named: a preset.
        front: on the Pareto front, whose points a line connects.
    """

    x: float
    y: float
    low: float
    high: float
    label: str
    named: bool
    front: bool


def draw_plot(path: Path, marks: list[Mark], x_title: str, y_title: str, label_title: str) -> None:
    """Write a PNG of the marks, whose numbers must be positive, on log axes.

    Labels are numbered and listed beside the axes: written into them, those of close points would overlap.

    Raises:
        UserError: `path` cannot be written.
    """
    from matplotlib.figure import Figure  # needed for plots alone
    from matplotlib.lines import Line2D

    figure = Figure((9, 6), dpi=200, layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel=x_title, ylabel=y_title)
    axes.grid(color="#E4E4E4")
    axes.set_axisbelow(True)
    axes.set_xlim(_set_ticks(axes.xaxis, [mark.x for mark in marks]))
    axes.set_ylim(_set_ticks(axes.yaxis, [y for mark in marks for y in (mark.low, mark.high)]))

    marks = sorted(marks, key=lambda mark: mark.x)
    front = [mark for mark in marks if mark.front]
    axes.plot([mark.x for mark in front], [mark.y for mark in front], color=FRONT, zorder=2)
    listed: list[Line2D] = []
    for mark in marks:
        colour, shape = (NAMED, "D") if mark.named else (FRONT, "o") if mark.front else (OTHER, ".")
        spread = [[mark.y - mark.low], [mark.high - mark.y]]
        shown = mark.named or mark.front
        axes.errorbar(mark.x, mark.y, spread, color=colour, capsize=3, zorder=3)
        axes.plot(mark.x, mark.y, shape, color=colour, markersize=13 if shown else 9, markeredgecolor="white", zorder=4)
        if shown:
            number = len(listed) + 1
            axes.annotate(str(number), (mark.x, mark.y), color="white", size=8, ha="center", va="center_baseline",
                          zorder=5)  # fmt: skip
            listed.append(Line2D([], [], color=colour, marker=shape, linestyle="", label=f"{number}   {mark.label}"))
    listed += [Line2D([], [], color=FRONT, label="Pareto front")]
    listed += [Line2D([], [], color=OTHER, marker=".", linestyle="", label="other settings")]
    figure.legend(
        handles=listed, loc="outside right upper", title=label_title, alignment="left", frameon=False, fontsize=9
    )
    with replacing(path) as part:
        figure.savefig(part, format="png")


def _set_ticks(axis: Any, values: list[float]) -> tuple[float, float]:
    """Give a log axis round numbers as ticks, evenly apart where it is short; returns its ends around the values."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator

    margin = max(1.05, (max(values) / min(values)) ** 0.07)
    low, high = min(values) / margin, max(values) * margin
    axis.set_major_locator(MaxNLocator(6) if high < 6 * low else LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_locator(NullLocator())
    return low, high
