"""Tri-shape: A-shape, with everything for the last queries (as in SCBench, arXiv 2412.10319, and TriangleMix, 2507.21526).

The tokens after a prompt are predicted from its last rows, so rows in the middle lose little by a narrow window. TriangleMix
uses it in the deeper layers only: list `density` or the widths a layer for that. At a density the last rows are dense only as
far as they take no more than a quarter of the area.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._budget import affordable
from .._layout import Always, last_rows
from .._options import Option, Settings
from .._static import key_places, reaches, scaled, spread_heads
from ..plan import BlockPlan, Context, finish

KNOWN = {
    "n_init": Option(128, int, 1, heads=True),
    "n_local": Option(3968, int, 1, heads=True),
    "n_last": Option(100, int, 0),
}


class TriShape:
    """Options: `n_init`, `n_local`, `n_last` (tokens), `density`."""

    reads = frozenset({"density", *KNOWN})

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.settings = Settings("tri_shape", options, KNOWN)

    def select(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> BlockPlan:
        """Keep the sink, the window, and all of the last rows."""
        initial = self.settings.column("n_init", ctx, q)
        local = self.settings.column("n_local", ctx, q)
        last = self.settings.one("n_last", ctx)
        place, reach = key_places(ctx, q.device), reaches(ctx, q.device)
        density = self.settings.density(ctx, q.shape[1])
        if density is None:
            mask = (place < initial) | (reach < local)
            return finish(spread_heads(mask | last_rows(ctx, q.device, last), q), ctx)
        entry = torch.minimum(place.clamp_min(0) / initial, reach / local)
        return scaled(entry, q, ctx, density, Always(last=affordable(last, ctx, density)))


SELECTOR = TriShape
