"""Which layers stand out, and why.

Two rules, each of which is enough for a flag:

* a weight or activation *scale* above a fixed limit (1.5, where the public tool asks for clipping: with FP8 that is
  a magnitude of 672);
* a figure more than `spread` robust standard deviations (see `numerics.analysis.robust_scores`) on the bad side of the
  median of the layers with the same role. A q_proj is compared with the other q_proj, since roles differ by
  nature. Magnitudes are compared by their logarithm. Roles with fewer than `FEWEST` layers have no ordinary ones.

Every figure has a floor for the deviation, so that layers that agree closely are not told apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..numerics.analysis import robust_scores
from ..report.findings import Flag, LayerFinding

SCALE_LIMIT = 1.5
SPREAD = 6.0
FEWEST = 5
SCALES = ("scale", "input_scale")


@dataclass(frozen=True)
class Rule:
    """How a figure is compared with those of the same role."""

    column: str
    bad: float  # +1: high values are bad, -1: low ones
    log: bool  # compare logarithms
    floor: float  # least standard deviation


RULES = (
    Rule("amax", 1, True, 0.1),
    Rule("kurtosis", 1, True, 0.1),
    Rule("scale", 1, True, 0.1),
    Rule("input_scale", 1, True, 0.1),
    Rule("sqnr_db", -1, False, 1.0),
    Rule("output_error", 1, True, 0.1),
    Rule("flushed", 1, False, 0.01),
    Rule("clipped", 1, False, 0.001),
)


def flag(layers: Sequence[LayerFinding], scale_limit: float, spread: float) -> list[LayerFinding]:
    """Return the layers with their flags."""
    flags: dict[str, list[Flag]] = {layer.name: [] for layer in layers}
    roles: dict[str, list[LayerFinding]] = {}
    for layer in layers:
        roles.setdefault(layer.role, []).append(layer)
        for column in SCALES:
            value = getattr(layer, column)
            if value is not None and value > scale_limit:
                flags[layer.name].append(Flag(column, value, None))
    for members in roles.values():
        for rule in RULES:
            for name, found in _apart(members, rule, spread):
                if all(found.column != known.column for known in flags[name]):
                    flags[name].append(found)
    return [replace(layer, flags=tuple(flags[layer.name])) for layer in layers]


def _apart(members: Sequence[LayerFinding], rule: Rule, spread: float) -> list[tuple[str, Flag]]:
    """Return the members of one role that one rule flags."""
    known = [(layer.name, value) for layer in members if (value := getattr(layer, rule.column)) is not None]
    known = [(name, value) for name, value in known if math.isfinite(value) and (value > 0 or not rule.log)]
    if len(known) < FEWEST:
        return []
    places = [rule.bad * (math.log(value) if rule.log else value) for _, value in known]
    scores = robust_scores(places, rule.floor)
    return [
        (name, Flag(rule.column, value, score))
        for (name, value), score in zip(known, scores, strict=True)
        if score > spread
    ]


def ranked(layers: Sequence[LayerFinding]) -> list[LayerFinding]:
    """Return the layers, the worst first: those with flags, then by SQNR or, where it is not known, by kurtosis."""

    def badness(layer: LayerFinding) -> tuple[bool, float, str]:
        return (not layer.flags, -layer.kurtosis if layer.sqnr_db is None else layer.sqnr_db, layer.name)

    return sorted(layers, key=badness)
