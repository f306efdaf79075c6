"""A suite of long prompts as tables for the terminal and as one HTML page: averages first, then task by task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from .html import render
from .summary import plain_table

NONE = "–"
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


def task_headings(found: Mapping[str, Any]) -> list[str]:
    """Return the headings of `task_rows`."""
    return ["task", "tokens", *found["attentions"]]


def task_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each length and task: the score with each attention and its 95 % interval."""
    rows = []
    for length in found["lengths"]:
        for task in dict.fromkeys(row["task"] for row in found["rows"] if row["length"] == length):
            by_name = {
                row["attention"]: row
                for row in found["rows"]
                if (row["length"], row["task"]) == (length, task)
            }
            rows.append([task, str(length), *(_value(by_name[name]) for name in found["attentions"])])
    return rows


def suite_tables(found: Mapping[str, Any]) -> tuple[Table, Table]:
    """Build the two tables for the terminal."""
    title = f"{found['model']}: {found['suite']}"
    return (
        plain_table(f"{title}, means over tasks", SUMMARY, summary_rows(found)),
        plain_table(f"{title}, task by task", task_headings(found), task_rows(found)),
    )


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
            "summary_headings": SUMMARY,
            "summary": summary_rows(found),
            "task_headings": task_headings(found),
            "tasks": task_rows(found),
        },
    )


def _cells(found: Mapping[str, Any], length: int, attention: str) -> list[dict[str, Any]]:
    return [row for row in found["rows"] if (row["length"], row["attention"]) == (length, attention)]


def _value(row: Mapping[str, Any]) -> str:
    return f"{row['value']:.1f} ({row['low']:.0f}…{row['high']:.0f})"
