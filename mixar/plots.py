"""A plot of two measures against each other, both on log axes, drawn with Pillow."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 1800, 1200  # drawn for twice the pixels that it is looked at with
LEFT, TOP, RIGHT, BOTTOM = 150, 130, 1750, 1080  # of the frame
INK, GREY, PALE, FRONT, NAMED = "#222222", "#777777", "#e4e4e4", "#1f6fb4", "#c8401e"
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Mark:
    """A point of the plot.

    Attributes:
        low, high: the spread of y.
        label: written beside the point, where there is room for it or it is `named`.
        named: has a name of its own, and a colour.
        front: connected with the others on the front.
    """

    x: float
    y: float
    low: float
    high: float
    label: str
    named: bool
    front: bool


def draw_plot(marks: list[Mark], x_title: str, y_title: str, note: str) -> Image.Image:
    """The marks, whose numbers must be positive, with titled axes and the `note` below."""
    sheet = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(sheet)
    small, large = ImageFont.load_default(28), ImageFont.load_default(32)
    x_axis = Axis.around([mark.x for mark in marks], LEFT, RIGHT)
    y_axis = Axis.around([y for mark in marks for y in (mark.low, mark.high)], BOTTOM, TOP)
    for tick in x_axis.ticks():
        pen.line((x_axis.at(tick), TOP, x_axis.at(tick), BOTTOM), PALE, 2)
        pen.text((x_axis.at(tick), BOTTOM + 12), f"{tick:.6g}", INK, small, anchor="mt")
    for tick in y_axis.ticks():
        pen.line((LEFT, y_axis.at(tick), RIGHT, y_axis.at(tick)), PALE, 2)
        pen.text((LEFT - 14, y_axis.at(tick)), f"{tick:.6g}", INK, small, anchor="rm")
    pen.rectangle((LEFT, TOP, RIGHT, BOTTOM), outline=INK, width=2)
    pen.text(((LEFT + RIGHT) / 2, BOTTOM + 60), x_title, INK, large, anchor="mt")
    pen.text((24, TOP - 30), y_title, INK, large, anchor="ls")
    pen.text((RIGHT, 40), note, GREY, small, anchor="rs")

    at = {mark: (x_axis.at(mark.x), y_axis.at(mark.y)) for mark in marks}
    front = [at[mark] for mark in sorted(marks, key=lambda mark: mark.x) if mark.front]
    pen.line(front, FRONT, 4, joint="curve")
    taken = list(_along(front))
    for mark, (x, y) in at.items():
        colour = NAMED if mark.named else FRONT if mark.front else GREY
        low, high = y_axis.at(mark.low), y_axis.at(mark.high)
        for end in (low, high):
            pen.line((x - 7, end, x + 7, end), colour, 3)
        pen.line((x, low, x, high), colour, 3)
        size = 11 if mark.named or mark.front else 8
        pen.ellipse((x - size, y - size, x + size, y + size), colour, "white", 2)
        taken += [(x - size, y - size, x + size, y + size), (x - 4, high, x + 4, low)]
    for mark in sorted(marks, key=lambda mark: not mark.named):  # names first: they are always written
        if mark.named or mark.front:
            _write_label(pen, mark, at[mark], small, taken)
    return sheet


def _write_label(
    pen: ImageDraw.ImageDraw, mark: Mark, at: tuple[float, float], font: "ImageFont.FreeTypeFont | ImageFont.ImageFont",
    taken: list[Box],
) -> None:  # fmt: skip
    """Write a mark's label at the nearest place around it that touches nothing."""
    width, height = pen.textlength(mark.label, font), 28
    for reach in (18, 40, 70, 110, 160) if mark.named else (18, 30):
        for step in range(16):
            # the label's centre on an ellipse around the mark that keeps the label's edge `reach` away
            angle = math.pi * (step / 8 + (-0.25 if mark.named else -0.75))  # little lies below a front
            x = at[0] + math.cos(angle) * (reach + width / 2)
            y = at[1] - math.sin(angle) * (reach + height / 2)
            box = (x - width / 2 - 4, y - height / 2 - 2, x + width / 2 + 4, y + height / 2 + 2)
            inside = box[0] > LEFT and box[2] < RIGHT and box[1] > TOP and box[3] < BOTTOM
            if inside and not any(_touch(box, other) for other in taken):
                colour = NAMED if mark.named else FRONT
                if reach > 40:
                    pen.line((*at, min(max(at[0], box[0]), box[2]), min(max(at[1], box[1]), box[3])), colour, 2)
                pen.text((x, y), mark.label, colour, font, anchor="mm")
                taken.append(box)
                return


def _touch(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _along(line: list[tuple[float, float]]) -> Iterator[Box]:
    """Small boxes that cover a line of many pieces."""
    for (x0, y0), (x1, y1) in pairwise(line):
        pieces = 1 + int(math.hypot(x1 - x0, y1 - y0) / 8)
        for i in range(pieces + 1):
            x, y = x0 + (x1 - x0) * i / pieces, y0 + (y1 - y0) * i / pieces
            yield x - 5, y - 5, x + 5, y + 5


@dataclass(frozen=True)
class Axis:
    """A log axis from `low` at pixel `start` to `high` at pixel `end`."""

    low: float
    high: float
    start: int
    end: int

    @classmethod
    def around(cls, values: list[float], start: int, end: int) -> "Axis":
        """One that holds the values with a margin."""
        margin = max(1.05, (max(values) / min(values)) ** 0.07)
        return cls(min(values) / margin, max(values) * margin, start, end)

    def at(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (self.end - self.start) * math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        """Round numbers on the axis, about four to twelve."""
        if self.high / self.low < 6:  # too narrow for powers: evenly apart
            raw = (self.high - self.low) / 6
            power = 10.0 ** math.floor(math.log10(raw))
            step = next(size * power for size in (1, 2, 5, 10) if size * power >= raw)
            return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        sizes = (1, 2, 3, 5, 7) if self.high / self.low < 30 else (1, 2, 5) if self.high / self.low < 1000 else (1,)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        return [s * 10.0**p for p in powers for s in sizes if self.low <= s * 10.0**p <= self.high]
