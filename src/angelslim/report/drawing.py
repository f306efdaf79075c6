"""Matplotlib figures as inline SVG that takes its colours from the page.

A figure is drawn with marker colours that occur nowhere else; in the finished SVG each is replaced by a CSS
variable, so that one drawing serves the light and the dark theme. Text stays text (searchable, and set in the
page's font), one unit is one CSS pixel, and nothing in the output depends on the day or the process.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from markupsafe import Markup

# Marker colour -> CSS variable of templates/report.css.
INK, MUTED, LINE, SURFACE = "#010101", "#020202", "#030303", "#040404"
BEFORE, AFTER, BAD = "#050505", "#060606", "#090909"
LEVELS = ("#070701", "#070702", "#070703", "#070704", "#070705", "#070706", "#070707")  # good .. bad
LEVEL_INKS = ("#080801", "#080802", "#080803", "#080804", "#080805", "#080806", "#080807")  # text on them
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    SURFACE: "surface",
    BEFORE: "before",
    AFTER: "after",
    BAD: "bad",
    **{color: f"level-{index}" for index, color in enumerate(LEVELS)},
    **{color: f"level-ink-{index}" for index, color in enumerate(LEVEL_INKS)},
}
DPI = 72  # one point of matplotlib is one unit of the SVG


def _style() -> dict[str, Any]:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "angelslim",
        "text.parse_math": False,  # a layer may be called anything, "$" included
        "font.family": "sans-serif",
        "font.size": 12,
        "text.color": INK,
        "axes.edgecolor": LINE,
        "axes.labelcolor": MUTED,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": INK,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "figure.facecolor": "none",
        "path.simplify": False,
    }


@contextmanager
def canvas(width: float, height: float) -> Iterator[tuple[Any, Any]]:
    """Yield a figure of `width` x `height` pixels and its axes, with the page's style."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style()):
        figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
        yield figure, figure.add_axes((0.0, 0.0, 1.0, 1.0))


def shorten(name: str, most: int) -> str:
    """Cut a name to at most `most` characters."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def place(axes: Any, left: float, right: float, top: float, bottom: float) -> None:
    """Give the axes margins in pixels."""
    width, height = axes.figure.get_size_inches() * DPI
    axes.set_position(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    )


def to_svg(figure: Any, label: str) -> Markup:
    """Render the figure; `label` is what a screen reader says. Call inside `canvas`."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"\s*<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # never referred to, and repeated from figure to figure
    text = re.sub(
        r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL
    )  # would style the page
    text = re.sub(r"font-family: [^;\"]*; ?", "", text)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)  # implied inside HTML
    text = text.replace("xlink:href", "href")
    width, height = (round(side * DPI) for side in figure.get_size_inches())
    head = f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
    text = re.sub(r"<svg[^>]*>", lambda _: f'{head}aria-label="{html.escape(label)}">', text, count=1)
    for marker, variable in VARIABLES.items():
        text = text.replace(marker, f"var(--{variable})")
    return Markup(text.strip())  # noqa: S704  matplotlib escapes every text that it draws
