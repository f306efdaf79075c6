"""A-shape: the first tokens and a window of near ones (StreamingLLM, arXiv 2309.17453).

Query i reads key j if ``j < n_init`` or ``i - j < n_local``. Attention sinks take most of the weight that has nowhere to
go, and near tokens most of the rest; whatever lies between is lost. Blocks that hold one such pair are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._options import Option, Settings
from .._static import key_places, reaches, scaled, spread_heads
from ..plan import BlockPlan, Context, finish

KNOWN = {"n_init": Option(128, int, 1, heads=True), "n_local": Option(3968, int, 1, heads=True)}


class AShape:
    """Options: `n_init`, `n_local` (tokens), `density`."""

    reads = frozenset({"density", *KNOWN})

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.settings = Settings("a_shape", options, KNOWN)

    def select(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> BlockPlan:
        """Keep the sink and the window."""
        initial = self.settings.column("n_init", ctx, q)
        local = self.settings.column("n_local", ctx, q)
        place, reach = key_places(ctx, q.device), reaches(ctx, q.device)
        density = self.settings.density(ctx, q.shape[1])
        if density is None:
            return finish(spread_heads((place < initial) | (reach < local), q), ctx)
        return scaled(torch.minimum(place.clamp_min(0) / initial, reach / local), q, ctx, density)


SELECTOR = AShape
