"""Means of a suite's rows: over its tasks, over each family of LongBench, and the times that belong to them.

Intervals are 95 % bootstrap intervals that resample the prompts within each task, for tasks are fixed and prompts are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000  # of the bootstrap
DENSE = "dense"
WARM_UP = 1  # prompts of each task whose time does not count, while kernels are compiled
OVER_FAMILIES = "mean over families"
Row = dict[str, Any]


def warm(values: list[float]) -> list[float]:
    """Return the times that count: all but those of the first prompts, or these if there are no others."""
    return values[WARM_UP:] or values


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean."""
    return _ends(_drawn(values, np.random.default_rng(seed)))


def averages(rows: Sequence[Row]) -> list[Row]:
    """Return for each length and attention the mean over tasks, what was read, and the times."""
    found = []
    for length, name in _kinds(rows):
        cells, dense = _of(rows, length, name), _of(rows, length, DENSE)
        densities = [cell["density"] for cell in cells if cell["density"] is not None]
        found.append(
            {
                "task": "average",
                "length": length,
                "attention": name,
                **_mean([cells]),
                "density": float(np.mean(densities)) if densities else None,
                "ttft": float(np.median([cell["ttft"] for cell in cells])),
                "times_dense": times_dense(cells, dense),
                "selector_ms": _median(cells, "selector_ms"),
                "kernel_ms": _median(cells, "kernel_ms"),
            }
        )
    return found


def families(rows: Sequence[Row]) -> list[Row]:
    """Return for each length, family and attention the mean over the family's tasks, then the mean over families.

    LongBench's own tables have these; its overall score is the mean over families. Empty for a suite without families.
    """
    found = []
    for length, name in _kinds(rows):
        cells = [cell for cell in _of(rows, length, name) if cell.get("family")]
        members: dict[str, list[Row]] = {}
        for cell in cells:
            members.setdefault(cell["family"], []).append(cell)
        groups = [(family, [own]) for family, own in members.items()]
        groups += [(OVER_FAMILIES, list(members.values()))] if members else []
        found += [
            {"family": family, "length": length, "attention": name, **_mean(parts)}
            for family, parts in groups
        ]
    return found


def times_dense(cells: Sequence[Row], dense: Sequence[Row]) -> float | None:
    """How many times sooner the first token came than with dense attention: the median over prompts, which both read in turn."""
    by_task = {cell["task"]: cell["ttft_ms"] for cell in dense}
    ratios = [
        plain / spent
        for cell in cells
        if cell["task"] in by_task
        for plain, spent in zip(warm(by_task[cell["task"]]), warm(cell["ttft_ms"]), strict=True)
    ]
    return float(np.median(ratios)) if ratios else None


def _median(cells: Sequence[Row], part: str) -> float:
    return float(np.median([ms for cell in cells for ms in warm(cell[part])]))


def _kinds(rows: Sequence[Row]) -> list[tuple[int, str]]:
    return list(dict.fromkeys((row["length"], row["attention"]) for row in rows))


def _of(rows: Sequence[Row], length: int, attention: str) -> list[Row]:
    return [row for row in rows if (row["length"], row["attention"]) == (length, attention)]


def _mean(groups: Sequence[Sequence[Row]]) -> dict[str, float]:
    """The mean over groups of the means over their tasks, in percent, with its interval."""
    rng = np.random.default_rng(0)
    drawn = [np.mean([_drawn(cell["scores"], rng) for cell in cells], axis=0) for cells in groups]
    low, high = _ends(100 * np.mean(drawn, axis=0))
    value = np.mean([np.mean([cell["value"] for cell in cells]) for cells in groups])
    return {"value": float(value), "low": low, "high": high}


def _drawn(scores: Sequence[float], rng: np.random.Generator) -> NDArray[np.float64]:
    found: NDArray[np.float64] = rng.choice(np.asarray(scores), (RESAMPLES, len(scores))).mean(1)
    return found


def _ends(means: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
