"""A grid of cells coloured by value: blocks across, roles (or runs) down.

Seven shades of one hue, from the best to the worst seventh of the range, so that readers who cannot tell red from
green lose nothing; where a cell has room the figure itself stands in it. A ring marks cells that were flagged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from . import words
from .drawing import INK, LEVEL_INKS, LEVELS, MUTED, canvas, place, to_svg

PAGE = 1000  # widest chart in pixels
CELL = 26  # height of a row
CHARACTER = 7.2  # a generous width of one character at 12 pixels
SMALL = 6.3  # and at 11


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
    """Write a share of one in percent, three significant digits."""
    return f"{100 * value:.3g} %"


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
    span = quantity.span(values)
    blocks = sorted({block for row in cells.values() for block in row})
    left = 16 + CHARACTER * max(map(len, cells))
    cell = min(72.0, (PAGE - left - 8) / len(blocks))
    with canvas(left + max(cell * len(blocks), 320) + 8, 28 + CELL * len(cells) + 46) as (figure, axes):
        place(axes, left, 8 + max(0, 320 - cell * len(blocks)), 4, 70)
        for y, (name, row) in enumerate(cells.items()):
            for x, block in enumerate(blocks):
                if block in row:
                    level = quantity.level(row[block], span)
                    _cell(axes, (x, y), quantity.write(row[block]), level, cell, (name, block) in flagged)
        axes.set(xlim=(0, len(blocks)), ylim=(len(cells), 0))
        every = math.ceil(24 / cell)
        axes.set_xticks([x + 0.5 for x in range(0, len(blocks), every)], [str(b) for b in blocks[::every]])
        axes.set_yticks([y + 0.5 - 1 / CELL for y in range(len(cells))], list(cells))
        axes.spines[:].set_visible(False)
        axes.set_xlabel("decoder block", loc="left")
        best, worst = span[::-1] if quantity.bad == "low" else span
        wrong = "lower" if quantity.bad == "low" else "higher"
        _legend(figure, left, quantity.end(best), f"{quantity.end(worst)}, {wrong} is worse")
        return to_svg(figure, f"{quantity.name} {what}")


def _cell(axes: Any, at: tuple[int, int], text: str, level: int, width: float, ringed: bool) -> None:
    from matplotlib.patches import Rectangle

    x, y = at
    gap_x, gap_y = 2 / width, 2 / CELL
    axes.add_patch(Rectangle((x, y), 1 - gap_x, 1 - gap_y, facecolor=LEVELS[level], linewidth=0))
    if ringed:
        inner = Rectangle((x + gap_x / 2, y + gap_y / 2), 1 - 2 * gap_x, 1 - 2 * gap_y, fill=False)
        inner.set(edgecolor=INK, linewidth=2)
        axes.add_patch(inner)
    if width >= 34 and SMALL * len(text) + 2 <= width:
        axes.text(
            x + 0.5 - gap_x / 2,
            y + 0.5 - gap_y / 2,
            text,
            ha="center",
            va="center_baseline",
            fontsize=11,
            color=LEVEL_INKS[level],
        )


def _legend(figure: Any, left: float, best: str, worst: str) -> None:
    """Draw the seven colours with the range they cover at the foot of the grid."""
    from matplotlib.patches import Rectangle

    width, height = figure.get_size_inches() * 72
    y, start = 8, left + 8 + SMALL * len(best)
    for index, color in enumerate(LEVELS):
        box = Rectangle((start + 22 * index, y), 20, 10, facecolor=color, linewidth=0, transform=None)
        figure.add_artist(box)
    for x, text in ((left, best), (start + 22 * len(LEVELS) + 6, worst)):
        figure.text(x / width, y / height, text, ha="left", va="bottom", fontsize=11, color=MUTED)
