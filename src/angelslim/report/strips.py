"""One row of dots for each group: where most members lie, and which ones lie apart.

A dot is one member (a layer, an expert). Flagged members are diamonds in another colour with their name beside
them, so that neither shape nor colour alone carries the message. The short line is the row's median.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from .drawing import AFTER, BAD, INK, LINE, MUTED, canvas, place, shorten, to_svg

WIDTH = 1000
ROW = 30
MOST = 4000  # dots in one chart; beyond, the ordinary ones are thinned out
LABELS = 6  # flagged members named in one row
TICKS = 6


@dataclass(frozen=True)
class Dot:
    """One member of a row."""

    value: float
    name: str
    flagged: bool = False


def strips(
    rows: Mapping[str, Sequence[Dot]],
    axis: str,
    label: str,
    *,
    log: bool = True,
    limit: tuple[float, str] | None = None,
) -> str:
    """Draw the rows over one axis called `axis`; `limit` is a value with its name, drawn as a dashed line.

    On a logarithmic axis members of value 0 or less stand at its left end.
    """
    kept = {name: _thinned(dots, len(rows)) for name, dots in rows.items()}
    values = [dot.value for dots in kept.values() for dot in dots if math.isfinite(dot.value)]
    values = [value for value in values if value > 0] if log else values
    if not values:
        return ""
    left = 28 + 7.2 * max(min(len(name), 28) for name in rows)
    low, high = _ends(values, limit, log)
    with canvas(WIDTH, ROW * len(rows) + 74) as (figure, axes):
        place(axes, left, 90, 20, 54)
        axes.set(xlim=(low, high), ylim=(len(rows) - 0.4, -0.6), xscale="log" if log else "linear")
        axes.grid(axis="x", color=LINE, linewidth=1)
        axes.set_axisbelow(True)
        for y, dots in enumerate(kept.values()):
            _row(axes, y, dots, low if log else -math.inf)
        if limit is not None:
            axes.axvline(limit[0], color=BAD, linewidth=1.2, linestyle=(0, (4, 3)))
            axes.annotate(
                limit[1],
                (limit[0], 1),
                (0, 4),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                fontsize=11,
                color=BAD,
            )
        _axis(axes, axis, (low, high), log)
        axes.set_yticks(range(len(rows)), [shorten(name, 28) for name in rows])
        axes.tick_params(axis="y", pad=14)
        axes.spines[:].set_visible(False)
        return to_svg(figure, label)


def _ends(values: Sequence[float], limit: tuple[float, str] | None, log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if limit is not None and high * (20 if log else 4) > limit[0] > 0:
        low, high = min(low, limit[0]), max(high, limit[0])
    if log:
        room = max((high / low) ** 0.03, 1.05)
        return low / room, high * room
    room = 0.03 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def _row(axes: Any, y: int, dots: Sequence[Dot], least: float) -> None:
    finite = [dot for dot in dots if math.isfinite(dot.value)]
    calm = [max(dot.value, least) for dot in finite if not dot.flagged]
    loud = [dot for dot in finite if dot.flagged]
    axes.plot(
        calm, [y] * len(calm), "o", color=AFTER, markersize=7, alpha=0.45, markeredgewidth=0, clip_on=False
    )
    if finite:
        middle = max(median(dot.value for dot in finite), least)
        axes.plot([middle, middle], [y - 0.3, y + 0.3], color=INK, linewidth=1.4, solid_capstyle="butt")
    axes.plot(
        [max(dot.value, least) for dot in loud],
        [y] * len(loud),
        "D",
        color=BAD,
        markersize=7,
        markeredgewidth=0,
        clip_on=False,
    )
    taken: list[float] = []
    for dot in sorted(loud, key=lambda dot: -dot.value):
        x = axes.transData.transform((max(dot.value, least), y))[0]
        width = 6.6 * len(dot.name) + 8
        if dot.name and len(taken) < LABELS and all(abs(x - other) > width for other in taken):
            taken.append(x)
            axes.annotate(
                dot.name,
                (max(dot.value, least), y),
                (0, -9),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=10,
                annotation_clip=False,
            )


def _axis(axes: Any, name: str, ends: tuple[float, float], log: bool) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator

    if log:
        ticks = log_ticks(*ends)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(TICKS))
    axes.tick_params(axis="x", labelcolor=MUTED)
    axes.set_xlabel(name, loc="left")


def log_ticks(low: float, high: float) -> list[float]:
    """Return a few round numbers between the ends: powers of ten, with 2 and 5 between them where there is room."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [m * 10.0**e for e in range(first, last + 1) for m in steps if low <= m * 10.0**e <= high]
        if len(found) <= TICKS + 2:
            return found or [low, high]
    every = -(-len(found) // TICKS)
    return found[::every]


def _thinned(dots: Sequence[Dot], rows: int) -> list[Dot]:
    """Keep every flagged dot, and so many of the others that the drawing stays small."""
    calm = sorted((dot for dot in dots if not dot.flagged), key=lambda dot: dot.value)
    step = -(-len(calm) * rows // MOST) or 1
    return [*calm[::step], *(dot for dot in dots if dot.flagged)]
