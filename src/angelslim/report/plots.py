"""The charts of the report: error by block and role, histograms, bars, quality against size.

Each function returns one inline SVG as safe markup (see `marks` and, where there are axes, `drawing`), or an empty string when the record has
nothing to show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluate.base import Score
from ..numerics.error import Histogram, LayerRecord
from . import words
from .drawing import AFTER, BEFORE, LINE, MUTED, SURFACE, canvas, place, shorten, to_svg
from .heat import OUTPUT_ERROR, SQNR, heat
from .layers import grid, short_roles
from .marks import Marks, stairs
from .record import RunRecord
from .rows import Row

CELL = 26  # height of a bar's row


def error_grid(layers: Sequence[LayerRecord]) -> str:
    """Draw SQNR (dB) as a grid of blocks x roles."""
    cells = grid(layers)
    names = short_roles(list(cells))
    return heat({names[role]: row for role, row in cells.items()}, SQNR, "by block and role")


def output_grid(layers: Sequence[LayerRecord]) -> str:
    """Draw the relative error of the layers' outputs, where a method knew it, as a grid of blocks x roles."""
    cells = grid(layers, lambda layer: layer.output_error, max)
    names = short_roles(list(cells))
    return heat({names[role]: row for role, row in cells.items()}, OUTPUT_ERROR, "by block and role")


def runs_grid(runs: Mapping[str, RunRecord]) -> str:
    """Draw the SQNR (dB) of each block's worst layer as a grid of blocks x runs."""
    worst = {}
    for name, record in runs.items():
        rows = grid(record.layers).values()
        blocks = sorted({block for row in rows for block in row})
        worst[shorten(name, 24)] = {b: min(row[b] for row in rows if b in row) for b in blocks}
    return heat(worst, SQNR, "of the worst layer of each block by run")


def histogram(data: Histogram, what: str) -> str:
    """Draw the counts before (filled) and after (line) on a logarithmic scale."""
    marks = Marks(310, 130)
    left, right, top, bottom = 8.0, 302.0, 6.0, 108.0
    low, high = math.log(0.5), math.log(1.6 * max(*data.before, *data.after, 1))
    bins = len(data.before)
    edges = [left + (right - left) * index / bins for index in range(bins + 1)]

    def heights(counts: Sequence[int]) -> list[float]:
        return [bottom - (bottom - top) * (math.log(n or 0.5) - low) / (high - low) for n in counts]

    if data.low < 0 < data.high:
        zero = left - (right - left) * data.low / (data.high - data.low)
        marks.line([(zero, bottom), (zero, top)], "line", 1)
    for run in stairs(edges, heights(data.before), bottom):
        marks.area(run, "before")
    for run in stairs(edges, heights(data.after), bottom):
        marks.line(run, "after", 1.4)
    for x, value, anchor in ((left, data.low, "start"), (right, data.high, "end")):
        marks.text(x, bottom + 7.68, f"{value:.3g}", "muted", size=11, anchor=anchor)
    marks.line([(left, bottom), (right, bottom)], "line", 0.8)
    return marks.svg(f"Histogram of the {what} before and after quantization")


def bars(
    table: Sequence[Row],
    values: Sequence[float],
    texts: Sequence[str],
    label: str,
    *,
    errors: Sequence[float] = (),
    limit: float | None = None,
) -> str:
    """Draw one horizontal bar a row from zero; `errors` are whiskers of one standard error."""
    if not any(math.isfinite(value) for value in values):
        return ""
    finite = [value if math.isfinite(value) else 0.0 for value in values]
    whiskers = list(errors) or [0.0] * len(finite)
    names = [shorten(row.name, 24) for row in table]
    left = 12 + 6.6 * max(map(len, names))
    right = 470 - 10 - 6.6 * max(map(len, texts))
    top = limit or max((a + b for a, b in zip(finite, whiskers, strict=True)), default=0) or 1.0
    marks = Marks(470, CELL * len(table) + 6)

    def across(value: float) -> float:
        return left + (right - left) * value / top

    for y, (row, value, error, text) in enumerate(zip(table, finite, whiskers, texts, strict=True)):
        middle, length = 2 + CELL * (y + 0.5), across(min(max(value, 0.0), top)) - left
        marks.rect(left, middle - 0.31 * CELL, length, 0.62 * CELL, "before" if row.baseline else "after")
        if error:
            ends = (across(max(value - error, 0.0)), across(min(value + error, top)))
            marks.line([(x, middle) for x in ends], "ink", 1.2)
        x = 0.0 if not math.isfinite(values[y]) else value + error
        marks.text(across(x) + 6, middle, text, "ink")
        marks.text(left - 3.5, middle, names[y], "ink", anchor="end")
    marks.line([(left, 2), (left, 2 + CELL * len(table))], "line", 0.8)
    return marks.svg(label)


def score_bars(table: Sequence[Row], metric: str, kind: Score) -> str:
    """Draw one metric for every row; rows without it say so."""
    found = [row.scores.get(metric) for row in table]
    return bars(
        table,
        [math.nan if score is None else score.value for score in found],
        [words.figure(score) for score in found],
        f"{words.metric_name(metric)} of each model",
        errors=[0.0 if score is None else words.spread(score) or 0.0 for score in found],
        limit=100.0 if kind.unit == "%" else None,
    )


def size_bars(table: Sequence[Row]) -> str:
    """Draw the bytes of the weights of every row."""
    texts = [words.megabytes(row.stored) + ("" if row.baseline else f" ({row.ratio:.2f}x)") for row in table]
    return bars(
        table, [row.stored / words.MEGABYTE for row in table], texts, "Size of the weights of each model"
    )


def quality_against_size(table: Sequence[Row], metric: str, kind: Score) -> str:
    """Draw a dot for each row with the metric: size to the right, quality upwards as its arrow says."""
    points = [(row, row.scores[metric]) for row in table if metric in row.scores]
    points = [(row, score) for row, score in points if math.isfinite(score.value)]
    if len(points) < 3:
        return ""
    with canvas(470, 260) as (figure, axes):
        place(axes, 52, 110, 8, 44)
        for row, score in points:
            x, color = row.stored / words.MEGABYTE, BEFORE if row.baseline else AFTER
            error = words.spread(score) or 0.0
            if error:
                ends = [score.value - error, score.value + error]
                axes.plot([x, x], ends, color=color, linewidth=1.2)
            axes.plot(
                x, score.value, "o", markersize=9, color=color, markeredgecolor=SURFACE, markeredgewidth=1.5
            )
        axes.margins(0.08, 0.15)
        axes.set_xlim(left=0)
        axes.locator_params(nbins=5)
        for (row, score), drop in zip(
            points, _apart(axes, [(r.stored / words.MEGABYTE, s.value) for r, s in points]), strict=True
        ):
            axes.annotate(
                shorten(row.name, 18),
                (row.stored / words.MEGABYTE, score.value),
                (9, drop),
                textcoords="offset points",
                va="center_baseline",
                annotation_clip=False,
            )
        axes.grid(color=LINE, linewidth=1)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        axes.tick_params(axis="y", labelcolor=MUTED)
        axes.set_xlabel("size of the weights (MB)", loc="left")
        return to_svg(figure, f"{words.metric_name(metric)} against size")


def _apart(axes: Any, points: Sequence[tuple[float, float]]) -> list[float]:
    """Return how far up to move each point's label so that labels of near points do not overlap."""
    placed: list[tuple[float, float]] = []
    moves = [0.0] * len(points)
    pixels = axes.transData.transform(points)
    for index in sorted(range(len(points)), key=lambda i: (-pixels[i][1], pixels[i][0])):
        x, y = pixels[index]
        near = [low for other, low in placed if abs(other - x) < 110]
        target = min([y, *(low - 14 for low in near)])
        moves[index] = target - y
        placed.append((x, target))
    return moves
