"""The result in a few lines: a table for the terminal and the same table as markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from functools import partial

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ..base import console
from . import words
from .layers import worst
from .record import RunRecord
from .rows import Row, quality_metrics, rows

Column = tuple[str, Callable[[Row], str]]


def columns(table: Sequence[Row]) -> list[Column]:
    """Return the heading and the cell writer of each column: quality first, then cost."""
    result: list[Column] = [("model", lambda row: row.name)]
    measured = quality_metrics(table)
    for metric, score in measured.items():
        unit = f" ({score.unit})" if score.unit else ""
        result.append((f"{metric}{unit} {words.arrow(score)}", partial(_measured, metric)))
    if not measured:
        result.append(("quality", lambda _: words.NOT_EVALUATED))
    result += [
        ("size (MB)", lambda row: f"{row.stored / words.MEGABYTE:,.2f}"),
        ("bits/weight", lambda row: f"{row.bits:.2f}"),
        ("ratio", lambda row: f"{row.ratio:.2f}x"),
    ]
    if any("decode" in row.scores for row in table):
        result.append(("tokens/s", partial(_measured, "decode")))
    return result


def _measured(metric: str, row: Row) -> str:
    return words.figure(row.scores.get(metric))


def cells(records: Sequence[RunRecord]) -> tuple[list[str], list[list[str]]]:
    """Return the comparison as text: the headings and the rows."""
    table = rows(records)
    shown = columns(table)
    return [heading for heading, _ in shown], [[write(row) for _, write in shown] for row in table]


def results_table(records: Sequence[RunRecord]) -> Table:
    """Build the terminal table: the original, then each run; it fits 80 columns for two tasks."""
    headings, lines = cells(records)
    return plain_table(", ".join(dict.fromkeys(record.model for record in records)), headings, lines)


def layers_table(record: RunRecord, count: int = 5) -> Table:
    """Build the terminal table of the layers that lost most; schemes are named if the layers differ in them."""
    bad = worst(record.layers, count)
    headings = ["layer", "shape", "bits/weight", "SQNR (dB) ↑", "error ↓"]
    lines = [
        [
            layer.name,
            f"{layer.shape[0]} x {layer.shape[1]}",
            f"{layer.bits_per_weight:.2f}",
            words.decibels(layer.sqnr_db),
            words.percent(layer.relative_error),
        ]
        for layer in bad
    ]
    if mixed(record):
        headings.append("scheme")
        lines = [[*line, layer.scheme] for line, layer in zip(lines, bad, strict=True)]
    return plain_table(f"worst {len(lines)} of {len(record.layers)} layers", headings, lines)


def mixed(record: RunRecord) -> bool:
    """Say whether the run's layers have different schemes."""
    return len({layer.scheme for layer in record.layers}) > 1


def plain_table(title: str, headings: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """Build a table of the console, escaped, with as few rules as it takes to read it."""
    grid = console.table(
        escape(title), [_stacked(text) for text in headings], [[escape(c) for c in line] for line in lines]
    )
    grid.box = SIMPLE_HEAD
    grid.padding = (0, 1, 0, 0)
    grid.show_edge = grid.pad_edge = False
    return grid


def _stacked(heading: str) -> str:
    """Break a long heading, so that its column is no wider than its figures."""
    for mark in (" ", "/") if len(heading) > 7 else ():
        first, found, rest = heading.partition(mark)
        if found:
            return escape(f"{first}{mark.strip()}\n{rest}")
    return escape(heading)


def to_markdown(records: Sequence[RunRecord]) -> str:
    """Write the table of `results_table` as markdown."""
    headings, lines = cells(records)
    align = ["---", *["---:"] * (len(headings) - 1)]
    return "".join(f"| {' | '.join(map(markdown_cell, line))} |\n" for line in [headings, align, *lines])


def markdown_cell(text: str) -> str:
    """Make any text safe inside a markdown table: no markup, no cell breaks."""
    text = html.escape(" ".join(text.split()), quote=False).replace("`", "'")
    return re.sub(r"([|\[\]\\])", r"\\\1", text)
