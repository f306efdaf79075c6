"""A grid of cells coloured by value: blocks across, roles (or runs) down.

Seven shades of one hue, from the best to the worst seventh of the range, so that readers who cannot tell red from
green lose nothing; where a cell has room the figure itself stands in it. A ring marks cells that were flagged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from . import words
from .drawing import LEVELS
from .marks import Marks

PAGE = 1000  # widest chart in pixels
CELL = 26  # height of a row
GAP = 2  # between cells
TOP, FOOT = 4, 70  # margins; at the foot stand the blocks' numbers, a title and the legend
CHARACTER = 7.2  # a generous width of one character at 12 pixels
SMALL = 6.3  # and at 11
LEGEND = 8 + 22 * len(LEVELS) + 6  # width of the colours of the legend


@dataclass(frozen=True)
class Quantity:
    """What a grid shows: its name, which end is bad, how a figure is written."""

    name: str
    bad: Literal["low", "high"]
    write: Callable[[float], str]  # a figure in a cell
    end: Callable[[float], str]  # an end of the range, with its unit
    whole: bool = False  # widen the range to whole numbers
    log: bool = False  # shades follow the logarithm

    def span(self, values: Collection[float]) -> tuple[float, float]:
        """Return the range that the shades divide."""
        low, high = min(values), max(values)
        if self.whole:
            low, high = math.floor(low), math.ceil(high)
        return (low, high) if high > low else (low, low + 1)

    def level(self, value: float, span: tuple[float, float]) -> int:
        """Return the shade of a value: 0 is the best seventh of the range."""
        if not math.isfinite(value):
            return 0 if (value > 0) == (self.bad == "low") and not math.isnan(value) else len(LEVELS) - 1
        low, high, value = (self._place(x) for x in (*span, value))
        bad = (high - value) if self.bad == "low" else (value - low)
        return min(len(LEVELS) - 1, int(bad / ((high - low) or 1.0) * len(LEVELS)))

    def _place(self, value: float) -> float:
        return math.log(max(value, 1e-30)) if self.log else value


def compact(value: float) -> str:
    """Write a figure of any size in a few characters.

    >>> compact(0.00123), compact(12345.0), compact(3.14159)
    ('0.00123', '1.23e+04', '3.14')
    """
    return f"{value:.3g}"


def share(value: float) -> str:
    """Write a share of one in percent, three significant digits; what is left of roundings is no figure.

    >>> share(0.12345), share(3e-8)
    ('12.3 %', '<0.001 %')
    """
    return "<0.001 %" if 0 < value < 1e-5 else f"{100 * value:.3g} %"


SQNR = Quantity(
    "Signal to noise ratio",
    "low",
    lambda value: f"{value:.1f}" if math.isfinite(value) else words.decibels(value)[:5],
    lambda value: f"{value:.0f} dB",
    whole=True,
)
OUTPUT_ERROR = Quantity("Relative error of the outputs", "high", share, share, log=True)


def heat(
    cells: Mapping[str, Mapping[int, float]],
    quantity: Quantity,
    what: str,
    flagged: Collection[tuple[str, int]] = (),
) -> str:
    """Draw one row of blocks for each entry; the darker (in the dark theme: lighter) the worse."""
    values = [value for row in cells.values() for value in row.values() if math.isfinite(value)]
    if not values:
        return ""
    span, same = quantity.span(values), len(set(map(quantity.write, values))) == 1
    blocks = sorted({block for row in cells.values() for block in row})
    left = 16 + CHARACTER * max(map(len, cells))
    cell = min(72.0, (PAGE - left - 8) / len(blocks))
    best, worst = map(quantity.end, span[::-1] if quantity.bad == "low" else span)
    wrong = f"{'lower' if quantity.bad == 'low' else 'higher'} is worse"
    legend = LEGEND + SMALL * len(f"{best}{worst}, {wrong}")
    marks = Marks(left + max(cell * len(blocks), legend) + 8, TOP + CELL * len(cells) + FOOT)
    for y, (name, row) in enumerate(cells.items()):
        for x, block in enumerate(blocks):
            if block in row:
                level = 0 if same and math.isfinite(row[block]) else quantity.level(row[block], span)
                at = (left + cell * x, TOP + CELL * y)
                _cell(marks, at, quantity.write(row[block]), level, cell, (name, block) in flagged)
        marks.text(left - 3.5, TOP + CELL * y + CELL / 2 - 1, name, "ink", anchor="end")
    bottom, every = TOP + CELL * len(cells), math.ceil(24 / cell)
    for x in range(0, len(blocks), every):
        marks.text(left + cell * (x + 0.5), bottom + 8.06, str(blocks[x]), "muted", anchor="middle")
    marks.text(left, bottom + 24.06, "decoder block", "muted")
    if same:
        marks.text(left, marks.height - 14.82, f"the same everywhere; {wrong}", "muted", size=11)
    else:
        _legend(marks, left, best, f"{worst}, {wrong}")
    return marks.svg(f"{quantity.name} {what}")


def _cell(marks: Marks, at: tuple[float, float], text: str, level: int, width: float, ringed: bool) -> None:
    x, y = at
    marks.rect(x, y, width - GAP, CELL - GAP, f"level-{level}")
    if ringed:
        marks.ring(x + GAP / 2, y + GAP / 2, width - 2 * GAP, CELL - 2 * GAP, "ink", 2)
    if width >= 34 and SMALL * len(text) + 2 <= width:
        middle = (x + (width - GAP) / 2, y + (CELL - GAP) / 2)
        marks.text(*middle, text, f"level-ink-{level}", size=11, anchor="middle")


def _legend(marks: Marks, left: float, best: str, worst: str) -> None:
    """Draw the seven colours with the range they cover at the foot of the grid; beside its words it is LEGEND wide."""
    y, start = marks.height - 18, left + 8 + SMALL * len(best)
    for index in range(len(LEVELS)):
        marks.rect(start + 22 * index, y, 20, 10, f"level-{index}")
    for x, text in ((left, best), (start + 22 * len(LEVELS) + 6, worst)):
        marks.text(x, y + 3.18, text, "muted", size=11)
