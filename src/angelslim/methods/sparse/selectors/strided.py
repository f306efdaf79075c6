"""Strided: the sink, a window, and every `stride`-th block diagonal up to the beginning (Sparse Transformer, arXiv 1904.10509).

In blocks, query I reads key J if ``I - J < window`` or ``(I - J) % stride == 0``: any token is reached in two layers.
MInference's variant of this name has a grid of single tokens that ends after 6144 tokens.

At a density d the grid gets coarser if it must, to every ``4 / d``-th diagonal, which is about half of a long row's
blocks, and the window is as wide as the rest allows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._layout import block_distance
from .._options import Option, Settings
from .._static import key_places, reaches, scaled, spread_heads
from ..plan import BlockPlan, Context, finish

KNOWN = {
    "n_init": Option(1024, int, 1, heads=True),
    "window": Option(2048, int, 1, heads=True),
    "stride": Option(8, int, 1, heads=True),
}
GRID_SHARE = 0.25


class Strided:
    """Options: `n_init`, `window` (tokens), `stride` (in blocks), `density`."""

    reads = frozenset({"density", *KNOWN})

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.settings = Settings("strided", options, KNOWN)

    def select(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> BlockPlan:
        """Keep the sink, the window and the grid."""
        stride = self.settings.column("stride", ctx, q)
        apart = block_distance(ctx, q.device)
        density = self.settings.density(ctx, q.shape[1])
        if density is None:
            near = reaches(ctx, q.device) < self.settings.column("window", ctx, q)
            sink = key_places(ctx, q.device) < self.settings.column("n_init", ctx, q)
            return finish(spread_heads(sink | near | (apart % stride == 0), q), ctx)
        coarse = [min(1 / (GRID_SHARE * max(share, 1e-6)), float(ctx.keys)) for share in density]
        stride = torch.maximum(stride, torch.tensor(coarse, device=q.device)[:, None, None].ceil())
        entry = apart + (apart % stride != 0) * float(-(-ctx.keys // ctx.block) + 1)
        return scaled(spread_heads(entry, q), q, ctx, density)


SELECTOR = Strided
