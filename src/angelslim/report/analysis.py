"""An analysis as a table for the terminal and as one HTML page: grids of blocks x roles, strips, overlaid histograms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from ..numerics.error import Histogram
from . import words
from .columns import GRID_FIELDS, GRIDS, LAYER, Column, chosen, flags, known
from .drawing import AFTER, BEFORE, LINE, MUTED, canvas, place, to_svg
from .findings import Analysis, LayerFinding
from .heat import compact, heat, share
from .html import render
from .layers import short_roles
from .strips import Dot, strips
from .summary import plain_table

ROWS = 2000  # layers that the page's table holds; the CSV file has all
STRIPS = (
    ("input_scale", "static activation scale"),
    ("scale", "largest weight scale of a layer"),
    ("amax", "largest weight of a layer"),
)


def analysis_table(analysis: Analysis, count: int = 10) -> Table:
    """Build the terminal table of the worst layers."""
    columns, shown = chosen(analysis), analysis.layers[:count]
    lines = [[layer.name, *(column.text(layer) for column in columns)] for layer in shown]
    return plain_table(
        _title(analysis, len(shown)), ["layer", *(column.heading for column in columns)], lines
    )


def _title(analysis: Analysis, count: int) -> str:
    what = f"{analysis.compressed} against {analysis.original}" if analysis.original else analysis.compressed
    return f"{what}: worst {count} of {len(analysis.layers)} layers"


def verdict(analysis: Analysis, count: int = 10) -> list[str]:
    """Return lines on the layers that stand out, for the terminal."""
    found = analysis.flagged
    if not found:
        return ["No layer stands out."]
    lines = [f"{len(found)} of {len(analysis.layers)} layers stand out:"]
    lines += [f"  {layer.name}: {flags(layer, analysis.limits)}" for layer in found[:count]]
    return lines + ([f"  and {len(found) - count} more"] if len(found) > count else [])


def analysis_html(analysis: Analysis) -> str:
    """Return the page."""
    columns, rows = known(LAYER, analysis.layers), analysis.layers[:ROWS]
    drawn = [layer for layer in rows if layer.histogram is not None]
    spread, scale = analysis.limits["spread"], analysis.limits["scale"]
    shown = {
        "title": f"{analysis.compressed}: "
        + (f"weights against {analysis.original}" if analysis.original else "scales and weights"),
        "subtitle": _subtitle(analysis),
        "notes": analysis.notes,
        "tiles": _tiles(analysis),
        "flagged": [(layer.name, flags(layer, analysis.limits)) for layer in analysis.flagged[:ROWS]],
        "flagged_note": f"A scale above {scale:g}, or a figure more than {spread:g} robust standard deviations (σ) on "
        "the bad side of the median of the layers with the same role.",
        "suggestion": "",
        "figures": [*_grids(analysis.layers), *_strips(analysis)],
        "histograms": [_histogram(layer) for layer in drawn],
        "histograms_note": f"The {len(drawn)} layers with the lowest SQNR, share of the weights in each of 128 equal bins, "
        "on a logarithmic scale.",
        "table_title": "All layers",
        "columns": columns,
        "rows": [_row(layer, columns, analysis.limits) for layer in rows],
        "left_out": len(analysis.layers) - len(rows),
        "remarks": any(layer.flags or layer.note for layer in rows),
    }
    return render("findings", shown)


def _subtitle(analysis: Analysis) -> str:
    schemes = list(dict.fromkeys(layer.scheme for layer in analysis.layers))
    more = f" and {len(schemes) - 1} more schemes" if len(schemes) > 1 else ""
    known_errors = any(layer.sqnr_db is not None for layer in analysis.layers)
    errors = "Errors are measured against the original." if analysis.measured else ""
    errors = errors or ("Errors are those that the run recorded." if known_errors else "")
    return f"{analysis.format}: {schemes[0]}{more}. {errors}".strip()


def _tiles(analysis: Analysis) -> list[dict[str, str]]:
    layers = analysis.layers
    tiles = [_tile("Layers", str(len(layers)), f"{len(analysis.flagged)} stand out")]
    for field, best, name in (
        ("sqnr_db", min, "Lowest SQNR"),
        ("output_error", max, "Largest output error"),
        ("flushed", max, "Most flushed to zero"),
        ("input_scale", max, "Largest input scale"),
        ("scale", max, "Largest weight scale"),
        ("kurtosis", max, "Largest kurtosis"),
    ):
        column = next(column for column in LAYER if column.field == field)
        found = {layer.name: value for layer in layers if (value := getattr(layer, field)) is not None}
        if found:
            name_of = best(found, key=lambda key: found[key])  # type: ignore[operator]
            unit = "dB" if field == "sqnr_db" else ""
            tiles.append(_tile(name, column.write(found[name_of]), name_of, unit))
    return tiles


def _tile(name: str, value: str, note: str, unit: str = "") -> dict[str, str]:
    return {"name": name, "value": value, "unit": unit, "note": note}


def _grids(layers: Sequence[LayerFinding]) -> list[dict[str, Any]]:
    """Draw each figure that is known and differs between layers as blocks x roles; experts show their worst."""
    figures = []
    for field, quantity in zip(GRID_FIELDS, GRIDS, strict=True):
        worse = min if quantity.bad == "low" else max
        cells: dict[str, dict[int, float]] = {}
        rings = set()
        for layer in layers:
            value = getattr(layer, field)
            if layer.block is None or value is None:
                continue
            row = cells.setdefault(layer.role, {})
            row[layer.block] = worse(row.get(layer.block, value), value)
            if any(flag.column == field for flag in layer.flags):
                rings.add((layer.role, layer.block))
        names = short_roles(list(cells))
        values = {value for row in cells.values() for value in row.values()}
        if len(values) < 2:
            continue
        svg = heat(
            {names[role]: dict(sorted(row.items())) for role, row in sorted(cells.items())},
            quantity,
            "by block and role",
            {(names[role], block) for role, block in rings},
        )
        note = "A ring marks layers that stand out among those of their role." if rings else ""
        figures.append({"title": f"{quantity.name}, by block and role", "note": note, "svg": svg})
    return [figure for figure in figures if figure["svg"]]


def _strips(analysis: Analysis) -> list[dict[str, Any]]:
    """Draw scales and largest weights: one dot a layer, one row a role."""
    figures = []
    for field, axis in STRIPS:
        rows: dict[str, list[Dot]] = {}
        for layer in analysis.layers:
            value = getattr(layer, field)
            if value is not None:
                loud = any(flag.column == field for flag in layer.flags)
                name = layer.role if layer.block is None else f"block {layer.block}"
                rows.setdefault(layer.role, []).append(Dot(value, name, loud))
        names = short_roles(list(rows))
        limit = (analysis.limits["scale"], "limit") if "scale" in field else None
        svg = strips({names[r]: dots for r, dots in sorted(rows.items())}, axis, axis, limit=limit)
        note = "One dot a layer; the line is the median of the role. Diamonds are layers that stand out."
        figures.append({"title": f"{axis[0].upper()}{axis[1:]}", "note": note, "svg": svg})
    return [figure for figure in figures if figure["svg"]]


def _histogram(layer: LayerFinding) -> dict[str, Any]:
    assert layer.histogram is not None
    figures = []
    if layer.sqnr_db is not None:
        figures.append("exact" if layer.sqnr_db == math.inf else f"SQNR {words.decibels(layer.sqnr_db)} dB")
    figures += [f"KL {compact(layer.kl)}"] if layer.kl is not None else []
    figures += [f"W1 {compact(layer.wasserstein)}"] if layer.wasserstein is not None else []
    figures += [f"{share(layer.flushed)} to zero"] if layer.flushed is not None else []
    return {"title": layer.name, "svg": overlay(layer.histogram, layer.name), "note": ", ".join(figures)}


def overlay(data: Histogram, name: str) -> str:
    """Draw two distributions over the same bins: the original filled, the copy as a line."""
    edges = np.linspace(data.low, data.high, len(data.before) + 1)
    total = max(sum(data.before), 1)
    before, after = (np.array(counts) / total for counts in (data.before, data.after))
    least = 0.5 / total
    with canvas(470, 220) as (figure, axes):
        place(axes, 74, 12, 8, 44)
        axes.stairs(before, edges, fill=True, color=BEFORE, linewidth=0, baseline=least)
        axes.stairs(after, edges, color=AFTER, linewidth=1.4, baseline=least)
        axes.set_yscale("log")
        axes.set(xlim=(data.low, data.high), ylim=(least, 2 * max(before.max(), after.max(), 2 * least)))
        axes.minorticks_off()
        axes.set_yticks(*_shares(least, max(before.max(), after.max())))
        axes.locator_params(axis="x", nbins=6)
        axes.tick_params(axis="y", labelcolor=MUTED)
        axes.grid(axis="y", color=LINE, linewidth=1)
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("value of the weight", loc="left")
        axes.set_ylabel("share of weights in a bin", loc="bottom", fontsize=11)
        return to_svg(figure, f"Weights of {name} before and after quantization")


def _shares(low: float, high: float) -> tuple[list[float], list[str]]:
    """Return at most six powers of ten between two shares, and how they are written."""
    powers = list(range(math.ceil(math.log10(low)), math.floor(math.log10(max(high, low))) + 1))
    powers = powers[:: max(1, -(-len(powers) // 5))]
    return [10.0**power for power in powers], [share(10.0**power) for power in powers]


def _row(layer: LayerFinding, columns: Sequence[Column], limits: dict[str, float]) -> dict[str, Any]:
    remark = "; ".join(filter(None, (flags(layer, limits), layer.note)))
    return {
        "name": layer.name,
        "cells": [(column.text(layer), column.key(layer)) for column in columns],
        "remark": remark,
    }
