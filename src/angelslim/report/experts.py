"""How evenly the calibration tokens fell on the experts of a mixture: who saw little, who saw nothing.

A statistic taken over ten tokens says little about an expert that will see millions, so every layer of experts gets
a row: the fewest, the median and the most tokens that one of its experts was given, and which ones had none.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from .record import ExpertUse
from .strips import Dot, strips

NAMED = 8  # experts that one cell names
LITTLE = 0.1  # of the even share


def section(experts: Sequence[ExpertUse]) -> dict[str, Any]:
    """Return what the page shows about experts; empty when the record holds none."""
    layers: dict[str, list[ExpertUse]] = {}
    for use in experts:
        layers.setdefault(use.module, []).append(use)
    if not layers:
        return {}
    return {
        "summary": _summary(experts, layers),
        "headings": ["Layer", "Experts", "Tokens", "Fewest", "Median", "Most", "Least used", "Never routed"],
        "lines": [_line(module, uses) for module, uses in layers.items()],
        "notes": _notes(experts),
        "chart": _chart(layers),
    }


def _summary(experts: Sequence[ExpertUse], layers: dict[str, list[ExpertUse]]) -> str:
    never = sum(use.tokens == 0 for use in experts)
    little = sum(0 < use.tokens < LITTLE * _even(layers[use.module]) for use in experts)
    text = f"{len(experts)} experts in {len(layers)} layer{'s' if len(layers) > 1 else ''}. "
    text += f"{never or 'None'} never saw a calibration token" + ("" if never else ": every one was reached")
    return f"{text}; {little} saw less than a tenth of the even share."


def _even(uses: Sequence[ExpertUse]) -> float:
    return sum(use.tokens for use in uses) / len(uses)


def _line(module: str, uses: Sequence[ExpertUse]) -> list[str]:
    counts = [use.tokens for use in uses]
    ranked = sorted((use for use in uses if use.tokens), key=lambda use: (use.tokens, use.expert))
    least = ", ".join(f"{use.expert} ({use.tokens:,})" for use in ranked[:3])
    never = [use.expert for use in uses if not use.tokens]
    named = ", ".join(map(str, never[:NAMED])) + (
        f" and {len(never) - NAMED} more" if len(never) > NAMED else ""
    )
    return [
        module,
        str(len(uses)),
        f"{max(use.of for use in uses):,}",
        f"{min(counts):,}",
        f"{median(counts):,.0f}",
        f"{max(counts):,}",
        least or "–",
        named or "–",
    ]


def _notes(experts: Sequence[ExpertUse]) -> list[str]:
    counts: dict[str, int] = {}
    for use in experts:
        if use.note:
            counts[use.note] = counts.get(use.note, 0) + 1
    return [f"{count} experts: {note}" for note, count in counts.items()]


def _chart(layers: dict[str, list[ExpertUse]]) -> str:
    rows = {module: _dots(uses) for module, uses in layers.items()}
    names = _shortest(list(rows))
    return strips(
        {names[module]: dots for module, dots in rows.items()},
        "share of the layer's calibration tokens that an expert was given (diamond: some were given none)",
        "Share of the calibration tokens that each expert was given",
    )


def _dots(uses: Sequence[ExpertUse]) -> list[Dot]:
    """Return a dot for each expert that was reached, and one for all that were not."""
    never = sum(use.tokens == 0 for use in uses)
    dots = [Dot(use.tokens / use.of, "") for use in uses if use.tokens]
    return dots + ([Dot(0.0, f"{never} without any", True)] if never else [])


def _shortest(modules: Sequence[str]) -> dict[str, str]:
    """Leave out what all names share at their beginning and end."""
    parts = [module.split(".") for module in modules]
    if len(parts) < 2:
        return {module: module for module in modules}
    shortest = min(map(len, parts))
    start = next((i for i in range(shortest) if len({tuple(p[: i + 1]) for p in parts}) > 1), shortest)
    end = next((i for i in range(shortest - start) if len({p[-1 - i] for p in parts}) > 1), 0)
    return {m: "layer " + ".".join(p[start : len(p) - end]) for m, p in zip(modules, parts, strict=True)}
