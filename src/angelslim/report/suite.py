"""A suite of long prompts as tables for the terminal and as one HTML page: averages first, then families, then task by task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.table import Table

from .html import render
from .summary import plain_table

NONE = "–"
AT_ONCE = 4  # attentions side by side in a terminal of 80 columns
SUMMARY = (
    "attention",
    "tokens",
    "average (95 %)",
    "density",
    "TTFT ms",
    "times dense",
    "selector + kernel ms",
    "dense calls",
)  # fits a terminal of 80 columns


class Part(NamedTuple):
    """One table with what a reader needs to know of it."""

    heading: str
    note: str
    headings: list[str]
    rows: list[list[str]]


def parts(found: Mapping[str, Any]) -> list[Part]:
    """Return the tables of a suite, those without rows left out."""
    names = list(found["attentions"])
    every = [
        Part(
            "Means over tasks",
            "Density is the share of the causal area that was read. TTFT is the time to the first token, one prompt at a "
            "time, the median; “times dense” is the median of the ratios to dense attention on the same prompts, if that "
            "was asked for. Intervals are 95 % bootstrap intervals.",
            list(SUMMARY),
            summary_rows(found),
        ),
        Part(
            "Families",
            "The mean over the tasks of each family that were measured, and the mean of these means, with 95 % intervals.",
            ["family", "tokens", *names],
            _compared(found, "families", "family"),
        ),
        Part(
            "Task by task",
            "Percent, with the 95 % interval.",
            ["task", "tokens", *names],
            _compared(found, "rows", "task"),
        ),
        Part(
            "Dense calls",
            "How many calls of a layer were dense although sparse attention was asked for, and why; decoding always is.",
            ["attention", "tokens", "reason", "calls"],
            fallback_rows(found),
        ),
    ]
    return [part for part in every if part.rows]


def summary_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each length and attention: the mean over tasks, what was read, how long the first token took."""
    rows = []
    for mean in found["averages"]:
        cells = _cells(found, mean["length"], mean["attention"])
        dense = sum(
            count for cell in cells for reason, count in cell["fallbacks"].items() if reason != "decode"
        )
        rows.append(
            [
                mean["attention"],
                str(mean["length"]),
                _value(mean),
                NONE if mean["density"] is None else f"{mean['density']:.3f}",
                f"{mean['ttft']:.1f}",
                NONE if mean["times_dense"] is None else f"{mean['times_dense']:.2f}",
                f"{mean['selector_ms']:.1f} + {mean['kernel_ms']:.1f}" if mean["kernel_ms"] else NONE,
                str(dense),
            ]
        )
    return rows


def fallback_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each length, attention and reason of dense calls, but for decoding."""
    rows = []
    for mean in found["averages"]:
        counts: Counter[str] = Counter()
        for cell in _cells(found, mean["length"], mean["attention"]):
            counts.update(cell["fallbacks"])
        rows += [
            [mean["attention"], str(mean["length"]), reason, str(count)]
            for reason, count in sorted(counts.items())
            if reason != "decode"
        ]
    return rows


def suite_tables(found: Mapping[str, Any]) -> list[Table]:
    """Build the tables for the terminal; those with a column for each attention are split to fit its width."""
    title = f"{found['model']}: {found['suite']}"
    names = len(found["attentions"])
    tables = []
    for part in parts(found):
        name = f"{title}, {part.heading[0].lower()}{part.heading[1:]}"
        wide = part.headings[2:] == list(found["attentions"])
        for first in range(2, 2 + names, AT_ONCE) if wide else (2,):
            last = first + AT_ONCE if wide else None
            lines = [[*line[:2], *line[first:last]] for line in (part.headings, *part.rows)]
            tables.append(plain_table(name, lines[0], lines[1:]))
    return tables


def suite_html(found: Mapping[str, Any]) -> str:
    """Return the page."""
    best = max(found["averages"], key=lambda mean: mean["value"])
    tiles = [
        ("Best average", f"{best['value']:.1f}", f"{best['attention']}, {best['length']} tokens"),
        ("Samples", str(found["samples"]), f"of each task and length at most, seed {found['seed']}"),
        (
            "Budget of sparse attention",
            "its own" if found["density"] is None else f"{found['density']:g}",
            "the side of a block as usual"
            if found["block"] is None
            else f"blocks of {found['block']} tokens",
        ),
    ]
    return render(
        "suite",
        {
            "title": f"{found['model']}: {found['suite']}",
            "tiles": [{"name": name, "value": value, "note": note} for name, value, note in tiles],
            "parts": parts(found),
        },
    )


def _compared(found: Mapping[str, Any], part: str, key: str) -> list[list[str]]:
    """A row for each length and task, or family: the score with each attention and its interval."""
    values = {(row["length"], row[key], row["attention"]): _value(row) for row in found[part]}
    return [
        [name, str(length), *(values[length, name, attention] for attention in found["attentions"])]
        for length, name in dict.fromkeys((length, name) for length, name, _ in values)
    ]


def _cells(found: Mapping[str, Any], length: int, attention: str) -> list[dict[str, Any]]:
    return [row for row in found["rows"] if (row["length"], row["attention"]) == (length, attention)]


def _value(row: Mapping[str, Any]) -> str:
    return f"{row['value']:.1f} ({row['low']:.0f}…{row['high']:.0f})"
