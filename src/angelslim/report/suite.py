"""A suite of long prompts as tables for the terminal and as one HTML page: averages first, then task by task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from .html import render
from .summary import plain_table

NONE = "–"
SUMMARY = ("tokens", "attention", "average", "95 %", "density", "TTFT ms", "selector ms", "dense calls")


def summary_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each length and attention: the mean over tasks, what was read, how long the first token took."""
    rows = []
    for mean in found["averages"]:
        cells = _cells(found, mean["length"], mean["attention"])
        selector = sum(sum(cell["selector_ms"]) for cell in cells) / sum(
            len(cell["scores"]) for cell in cells
        )
        dense = sum(
            count for cell in cells for reason, count in cell["fallbacks"].items() if reason != "decode"
        )
        rows.append(
            [
                str(mean["length"]),
                mean["attention"],
                f"{mean['value']:.1f}",
                f"{mean['low']:.1f}…{mean['high']:.1f}",
                NONE if mean["density"] is None else f"{mean['density']:.3f}",
                f"{mean['ttft']:.1f}",
                f"{selector:.1f}",
                str(dense),
            ]
        )
    return rows


def task_headings(found: Mapping[str, Any]) -> list[str]:
    """Return the headings of `task_rows`."""
    return ["tokens", "task", *found["attentions"]]


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
            rows.append([str(length), task, *(_value(by_name[name]) for name in found["attentions"])])
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
        ("Samples", str(found["samples"]), "of each task and length"),
        ("Seed", str(found["seed"]), "draws the prompts"),
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
