"""Charts of rectangles, lines and text, written as SVG marks without a plotting library.

Most charts of a report are no more than that, and loading a plotting library would take longer than compressing a
small model. Coordinates are CSS pixels, y downwards; colours are names of the variables in ``templates/report.css``,
so that one drawing serves the light and the dark theme. Text stays text. Charts with real axes use `drawing`.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from markupsafe import Markup

Point = tuple[float, float]
BASELINE = 0.38  # of the font size, from the middle of a digit down to the line that it stands on


class Marks:
    """A drawing of `width` x `height` pixels; later marks lie on top."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self._marks: list[str] = []

    def rect(self, x: float, y: float, width: float, height: float, color: str) -> None:
        """Fill a rectangle whose upper left corner is (x, y)."""
        place = _attributes(x=x, y=y, width=width, height=height)
        self._marks.append(f'<rect {place} style="fill: var(--{color})"/>')

    def ring(self, x: float, y: float, width: float, height: float, color: str, stroke: float) -> None:
        """Draw the outline of a rectangle; `stroke` is its width, half of it to each side."""
        place = _attributes(x=x, y=y, width=width, height=height)
        self._marks.append(f'<rect {place} style="{_stroke(color, stroke)}"/>')

    def area(self, points: Sequence[Point], color: str) -> None:
        """Fill a polygon."""
        self._marks.append(f'<path d="{_path(points)} z" style="fill: var(--{color})"/>')

    def line(self, points: Sequence[Point], color: str, stroke: float) -> None:
        """Draw straight lines from point to point."""
        self._marks.append(f'<path d="{_path(points)}" style="{_stroke(color, stroke)}"/>')

    def text(
        self, x: float, middle: float, text: str, color: str, *, size: float = 12, anchor: str = "start"
    ) -> None:
        """Write `text` with its digits centred on the height `middle`; `anchor` is SVG's text-anchor."""
        style = f"font-size: {_number(size)}px; text-anchor: {anchor}; fill: var(--{color})"
        place = _attributes(x=x, y=middle + BASELINE * size)
        self._marks.append(f'<text {place} style="{style}">{html.escape(text)}</text>')

    def svg(self, label: str) -> Markup:
        """Return the drawing; `label` is what a screen reader says."""
        width, height = round(self.width), round(self.height)
        head = f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
        marks = "\n".join(self._marks)
        return Markup(f'{head} aria-label="{html.escape(label)}">\n{marks}\n</svg>')  # noqa: S704  escaped above


def stairs(edges: Sequence[float], heights: Sequence[float], floor: float) -> list[list[Point]]:
    """Return the outlines of the steps ``heights[i]`` over ``edges[i] .. edges[i + 1]``.

    Each is one run of steps above `floor` (y downwards: smaller than it), from the floor and back to it.

    >>> stairs([0, 1, 2, 3], [5, 9, 7], 9)
    [[(0, 9), (0, 5), (1, 5), (1, 9)], [(2, 9), (2, 7), (3, 7), (3, 9)]]
    """
    runs: list[list[Point]] = []
    standing = False
    for left, right, height in zip(edges, edges[1:], heights, strict=False):
        if height < floor:
            if not standing:
                runs.append([(left, floor)])
            runs[-1] += [(left, height), (right, height)]
        elif standing:
            runs[-1].append((left, floor))
        standing = height < floor
    if standing:
        runs[-1].append((edges[-1], floor))
    return runs


def _attributes(**values: float) -> str:
    return " ".join(f'{name}="{_number(value)}"' for name, value in values.items())


def _stroke(color: str, width: float) -> str:
    return f"fill: none; stroke: var(--{color}); stroke-width: {_number(width)}"


def _path(points: Iterable[Point]) -> str:
    return "M " + " L ".join(f"{_number(x)} {_number(y)}" for x, y in points)


def _number(value: float) -> str:
    """Write a coordinate to a thousandth of a pixel, without needless zeros.

    >>> _number(12.5), _number(-0.0001), _number(100)
    ('12.5', '0', '100')
    """
    return f"{round(value, 3) + 0.0:.3f}".rstrip("0").rstrip(".")
