"""Dilated: the sink and every `dilation`-th block diagonal of a stretched window (Longformer, arXiv 2004.05150).

The same number of blocks reaches `dilation` times as far as a plain window, with gaps. The gaps are whole blocks, since
inside a block a kernel saves nothing: in blocks, query I reads key J if ``0 <= I - J < width * dilation`` and
``(I - J) % dilation == 0``, where the width is `window` tokens. MInference's variant skips single diagonals of tokens.

At a density the window is scaled; a density that the grid cannot fill takes the gaps as well, near ones first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .._layout import block_distance
from .._options import Option, Settings
from .._static import key_places, scaled, spread_heads
from ..plan import BlockPlan, Context, finish

KNOWN = {
    "n_init": Option(1024, int, 1, heads=True),
    "window": Option(4096, int, 1, heads=True),
    "dilation": Option(2, int, 1, heads=True),
}


class Dilated:
    """Options: `n_init`, `window` (tokens that are read of the window), `dilation` (in blocks), `density`."""

    reads = frozenset({"density", *KNOWN})

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.settings = Settings("dilated", options, KNOWN)

    def select(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> BlockPlan:
        """Keep the sink and the grid inside the window."""
        step = self.settings.column("dilation", ctx, q)
        width = (self.settings.column("window", ctx, q) / ctx.block).ceil()
        apart = block_distance(ctx, q.device)
        on_grid = (apart >= 0) & (apart % step == 0)
        density = self.settings.density(ctx, q.shape[1])
        if density is None:
            sink = key_places(ctx, q.device) < self.settings.column("n_init", ctx, q)
            return finish(spread_heads(sink | (on_grid & (apart < width * step)), q), ctx)
        entry = apart + (~on_grid) * float(-(-ctx.keys // ctx.block) + 1)
        return scaled(spread_heads(entry, q), q, ctx, density)


SELECTOR = Dilated
