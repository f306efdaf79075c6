"""What the looks into the runs say about the mechanisms, as figures: `mechanisms` says what each look holds.

Each method that was watched has its gap to full precision beside the means of its looks, and each published explanation
is put as a question with the figures that answer it. Nothing is judged here.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from .study import TITLES
from .summary import Rows, difference, finals, runs_by_place

QUESTIONS = (
    (
        "Does the bias free weights from the dead zone?",
        ("escaped", "never_left", "pull"),
        ("absmean_g128", "tequila_1e-3", "tequila_1e-2", "tequila_1e-1", "twn", "twn_phase"),
    ),
    (
        "Does the addition keep the gradient in more directions, and does that last?",
        ("rank", "fours_moved"),
        (
            "sherry_none",
            "sherry_linear",
            "sherry_cosine",
            "sherry_exponential",
            "sherry_early",
            "sherry_phase",
        ),
    ),
    (
        "How much does the run rest on what is taken away?",
        ("training", "exported"),
        (
            "sherry_none",
            "sherry_linear",
            "sherry_cosine",
            "sherry_exponential",
            "sherry_early",
            "sherry_phase",
        ),
    ),
)


def watched(rows: Rows, method: str) -> list[dict[str, Any]]:
    """Return the final runs of a method that were looked into."""
    return [row for row in runs_by_place(rows, method).values() if row.get("looks")]


def curve(runs: list[dict[str, Any]], key: str) -> list[list[float]]:
    """Return (step, mean over runs) of one figure."""
    found: dict[float, list[float]] = {}
    for row in runs:
        for look in row["looks"]:
            if key in look:
                found.setdefault(look["step"], []).append(look[key])
    return [[step, statistics.fmean(values)] for step, values in sorted(found.items())]


def findings_of(rows: Rows) -> dict[str, Any]:
    """Return the content of ``lowbit_mechanisms.json``, empty when no run was watched."""
    methods = [name for name in TITLES if watched(rows, name)]
    if not methods:
        return {}
    return {
        "gaps": {
            name: {"title": TITLES[name], **gap}
            for name in ("fp", *methods)
            if (gap := difference(finals(rows, name), finals(rows, "fp"))) is not None
        },
        "questions": [
            {"question": question, "methods": _answers(rows, keys, [n for n in names if n in methods])}
            for question, keys, names in QUESTIONS
        ],
    }


def _answers(rows: Rows, keys: tuple[str, ...], names: list[str]) -> Mapping[str, Any]:
    found = {}
    for name in names:
        runs = [row for row in watched(rows, name) if any(key in row["looks"][0] for key in keys)]
        if not runs:
            continue  # looked into before this was part of a look
        curves = {key: points for key in keys if (points := curve(runs, key))}
        found[name] = {
            "runs": len(runs),
            "curves": curves,
            "means": {
                key: statistics.fmean(value for step, value in points if step or len(points) == 1)
                for key, points in curves.items()
            },
        }
        if "training" in curves:
            rests = [
                [step, exported - training]
                for (step, training), (_, exported) in zip(
                    curves["training"], curves["exported"], strict=True
                )
            ]
            found[name]["to_unlearn"] = {"largest": max(value for _, value in rests), "curve": rests}
    return found
