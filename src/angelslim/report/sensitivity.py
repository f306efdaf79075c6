"""A sensitivity analysis as a table for the terminal and as one HTML page, with lines to paste into a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from ..numerics.analysis import rank_correlation
from .columns import sensitivity_columns
from .drawing import AFTER, LINE, MUTED, canvas, place, shorten, to_svg
from .findings import LayerSensitivity, Sensitivity
from .heat import Quantity, compact, heat, share
from .html import render
from .layers import short_roles
from .marks import Marks
from .strips import log_ticks
from .summary import plain_table

ROWS = 2000
BARS = 15
BLOCK_ERROR = Quantity("Error of the block's output", "high", share, share, log=True)
KL = Quantity("KL of the next token", "high", compact, lambda value: f"{value:.3g} nats", log=True)
FEW = 4  # layers from which a rank correlation says something


def sensitivity_table(found: Sensitivity, count: int = 10) -> Table:
    """Build the terminal table of the most sensitive layers."""
    columns, shown = sensitivity_columns(found.layers), found.layers[:count]
    lines = [[layer.name, *(column.text(layer) for column in columns)] for layer in shown]
    title = f"the {len(shown)} most sensitive of {len(found.layers)} layers"
    return plain_table(title, ["layer", *(column.heading for column in columns)], lines)


def recipe_lines(found: Sensitivity) -> str:
    """Return the YAML that keeps the suggested layers in full precision."""
    lines = [f"extends: {found.recipe}", "compression:", "  quantization:", "    ignore_layers:"]
    return "\n".join([*lines, *(f"      - {_quoted(entry)}" for entry in found.suggestion)])


def _quoted(entry: str) -> str:
    plain = entry.replace("_", "").replace(".", "").isalnum()
    return entry if plain else "'" + entry.replace("'", "''") + "'"


def remarks(found: Sensitivity) -> list[str]:
    """Return what is worth saying beside the table."""
    lines = [f"{found.model}, {found.scheme}; {found.samples} calibration samples, {found.tokens:,} tokens."]
    if found.together is not None:
        lines.append(
            f"All layers at once: KL {compact(found.together)} nats per token ({found.kl_samples} samples); "
            f"the sum over single layers is {compact(sum(layer.kl or 0.0 for layer in found.layers))}."
        )
        order = _agreement(found.layers)
        if order is not None:
            lines.append(f"Block error and KL rank the layers alike with a correlation of {order:.2f}.")
    return lines


def advice(found: Sensitivity) -> str:
    """Return what the suggestion costs and what it covers."""
    total = sum(map(_harm, found.layers)) or 1.0
    kept = sum(_harm(layer) for layer in found.layers if layer.name in set(found.kept))
    what = "summed KL" if found.together is not None else "summed squared block errors"
    named = f"These {len(found.kept)} layers have" if len(found.kept) > 1 else "This layer has"
    return (
        f"{named} {100 * kept / total:.0f} % of the {what}; keeping them takes "
        f"{found.bits[1]:.2f} bits per weight instead of {found.bits[0]:.2f}."
    )


def _harm(layer: LayerSensitivity) -> float:
    return (layer.block_error or 0.0) ** 2 if layer.kl is None else max(layer.kl, 0.0)


def _agreement(layers: Sequence[LayerSensitivity]) -> float | None:
    """Return the rank correlation of block error and KL, where enough layers have both."""
    both = [(layer.block_error, layer.kl) for layer in layers if layer.kl is not None]
    if len(both) < FEW:
        return None
    return rank_correlation([error for error, _ in both], [kl for _, kl in both])


def sensitivity_html(found: Sensitivity) -> str:
    """Return the page."""
    columns, rows = sensitivity_columns(found.layers), found.layers[:ROWS]
    shown = {
        "title": f"{found.model}: sensitivity to {found.recipe}",
        "subtitle": "Each layer rounded to nearest while all others stay exact. " + " ".join(remarks(found)),
        "notes": [],
        "tiles": _tiles(found),
        "flagged": [],
        "flagged_note": "",
        "suggestion": recipe_lines(found) if found.kept else "",
        "suggestion_note": advice(found),
        "figures": _figures(found),
        "histograms": [],
        "histograms_note": "",
        "table_title": "All layers",
        "columns": columns,
        "rows": [
            {
                "name": layer.name,
                "cells": [(column.text(layer), column.key(layer)) for column in columns],
                "remark": layer.note,
            }
            for layer in rows
        ],
        "left_out": len(found.layers) - len(rows),
        "remarks": any(layer.note for layer in rows),
    }
    return render("findings", shown)


def _tiles(found: Sensitivity) -> list[dict[str, str]]:
    worst = max(found.layers, key=lambda layer: layer.block_error)
    tiles = [
        ("Layers", str(len(found.layers)), "rounded one by one"),
        ("Largest block error", share(worst.block_error), worst.name),
    ]
    measured = [layer for layer in found.layers if layer.kl is not None]
    if measured:
        top = max(measured, key=lambda layer: layer.kl or 0.0)
        tiles.append(("Largest KL", compact(top.kl or 0.0), top.name))
        tiles.append(("KL of all together", compact(found.together or 0.0), "nats per token"))
    tiles.append(("Bits per weight", f"{found.bits[0]:.2f}", f"{found.bits[1]:.2f} with the suggestion"))
    return [{"name": name, "value": value, "unit": "", "note": note} for name, value, note in tiles]


def _figures(found: Sensitivity) -> list[dict[str, Any]]:
    figures = [
        {
            "title": f"The {min(BARS, len(found.layers))} most sensitive layers",
            "note": "",
            "svg": _bars(found),
        },
        {
            "title": "Error of the block's output, by block and role",
            "note": "The norm of the change over the norm of the output, when only that layer is rounded.",
            "svg": _grid(found.layers, "block_error", BLOCK_ERROR),
        },
        {
            "title": "KL of the next token, by block and role",
            "note": "Nats per token, from the original's distribution to that with only the layer rounded.",
            "svg": _grid(found.layers, "kl", KL),
        },
        {
            "title": "Block error against KL",
            "note": "One dot a layer. Where the dots lie on a line, the cheap figure is enough.",
            "svg": _scatter(found.layers),
        },
    ]
    return [figure for figure in figures if figure["svg"]]


def _grid(layers: Sequence[LayerSensitivity], field: str, quantity: Quantity) -> str:
    cells: dict[str, dict[int, float]] = {}
    for layer in layers:
        value = getattr(layer, field)
        if layer.block is not None and value is not None:
            row = cells.setdefault(layer.role, {})
            row[layer.block] = max(row.get(layer.block, value), value)
    names = short_roles(list(cells))
    return heat({names[role]: row for role, row in sorted(cells.items())}, quantity, "by block and role")


def _bars(found: Sensitivity) -> str:
    """Draw the worst layers as bars: the KL with its standard error, else the block error."""
    shown = found.layers[:BARS]
    measured = found.together is not None
    values = [max(layer.kl or 0.0, 0.0) if measured else layer.block_error for layer in shown]
    errors = [(layer.kl_stderr or 0.0) if measured else 0.0 for layer in shown]
    texts = [compact(value) if measured else share(value) for value in values]
    top = max(a + b for a, b in zip(values, errors, strict=True)) or 1.0
    names = [shorten(layer.name, 48) for layer in shown]
    left, width, row = 16 + 6.8 * max(map(len, names)), 1000.0, 26.0
    right = width - 12 - 6.6 * max(map(len, texts))
    marks = Marks(width, row * len(shown) + 26)
    for y, (name, value, error, text) in enumerate(zip(names, values, errors, texts, strict=True)):
        middle, length = 2 + row * (y + 0.5), (right - left) * value / top
        marks.rect(left, middle - 0.31 * row, length, 0.62 * row, "after")
        ends = [left + (right - left) * x / top for x in (max(value - error, 0.0), value + error)]
        if error:
            marks.line([(x, middle) for x in ends], "ink", 1.2)
        marks.text(max(ends) + 6, middle, text, "ink")
        marks.text(left - 6, middle, name, "ink", anchor="end")
    bottom = 2 + row * len(shown)
    marks.line([(left, 2), (left, bottom)], "line", 0.8)
    axis = "KL, nats per token (lines: one standard error to each side)"
    marks.text(left, bottom + 12, axis if measured else "relative error of the block's output", "muted")
    return marks.svg("The most sensitive layers")


def _scatter(layers: Sequence[LayerSensitivity]) -> str:
    points = [(layer.block_error, layer.kl) for layer in layers if layer.kl is not None]
    points = [(x, y) for x, y in points if x > 0 and y > 0]
    if len(points) < FEW:
        return ""
    from matplotlib.ticker import NullLocator

    with canvas(520, 320) as (figure, axes):
        place(axes, 76, 12, 10, 48)
        axes.plot(
            [100 * x for x, _ in points],
            [y for _, y in points],
            "o",
            color=AFTER,
            markersize=7,
            alpha=0.55,
            markeredgewidth=0,
        )
        axes.set(xscale="log", yscale="log")
        axes.margins(0.08)
        for axis, ends in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            axis.set_minor_locator(NullLocator())
            axis.set_ticks(ticks := log_ticks(*ends), [f"{tick:g}" for tick in ticks])
        axes.grid(color=LINE, linewidth=1)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        axes.tick_params(labelcolor=MUTED)
        axes.set_xlabel("relative error of the block's output (%)", loc="left")
        axes.set_ylabel("KL (nats per token)", loc="bottom", fontsize=11)
        return to_svg(figure, "Block error against KL of each layer")
