"""Where a layer sits and how badly it fared: the block by role grid, and the worst layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..numerics.error import LayerRecord


def role(layer: LayerRecord) -> str:
    """Return the layer's path inside its block, without indices: ``self_attn.q_proj``, ``mlp.experts.up_proj``."""
    parts = layer.name.split(".")
    if layer.block is not None and str(layer.block) in parts:
        parts = parts[parts.index(str(layer.block)) + 1 :]
    return ".".join(part for part in parts if not part.isdigit())


def short_roles(roles: Sequence[str]) -> dict[str, str]:
    """Map each role to its last word where that is unambiguous.

    >>> short_roles(["self_attn.q_proj", "mlp.up_proj", "mlp.experts.up_proj"])
    {'self_attn.q_proj': 'q_proj', 'mlp.up_proj': 'mlp.up_proj', 'mlp.experts.up_proj': 'mlp.experts.up_proj'}
    """
    last = [name.rpartition(".")[2] for name in roles]
    return {name: end if last.count(end) == 1 else name for name, end in zip(roles, last, strict=True)}


def grid(
    layers: Sequence[LayerRecord],
    value: Callable[[LayerRecord], float | None] = lambda layer: layer.sqnr_db,
    worse: Callable[[float, float], float] = min,
) -> dict[str, dict[int, float]]:
    """Return ``{role: {block: value}}`` of the decoder stack, SQNR in dB by default; several experts show their worst."""
    cells: dict[str, dict[int, float]] = {}
    for layer in layers:
        found = value(layer)
        if layer.block is not None and found is not None:
            row = cells.setdefault(role(layer), {})
            row[layer.block] = worse(row.get(layer.block, found), found)
    return cells


def badness(layer: LayerRecord) -> tuple[float, str]:
    """Sort key that puts the worst layer first: not a number, then the lowest SQNR; ties by name."""
    return (-math.inf if math.isnan(layer.sqnr_db) else layer.sqnr_db, layer.name)


def worst(layers: Sequence[LayerRecord], count: int = 5) -> list[LayerRecord]:
    """Return the `count` layers with the lowest SQNR, the worst first."""
    return sorted(layers, key=badness)[:count]
