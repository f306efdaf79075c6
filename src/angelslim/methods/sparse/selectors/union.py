"""Union: pooled cells, exact columns and diagonals of the last rows, dense last rows, sink and window.

Every published score is blind to something. A mean over a block hides a short needle that few queries ask for; the exact
attention of the last rows sees it, but knows only what those rows want. This selector adds up three estimates of the mass
that a query block gives a key block:

* *cells*: each block is cut into `cells` parts; mean query times mean key of the parts, softmax over a row's key cells, summed
  in key blocks, and the root mean square over a block's query cells: a mean that one needy cell can still raise. It costs
  ``cells^2 / block^2`` of the products of dense attention, so long prompts get fewer (`cells_for`);
* *columns*: the mean mass of each key block in the exact attention of the last `last` queries, at weight `LINES`; in the blocks
  these queries are in, what the neediest of them gives it, at full weight;
* *diagonals*: the mean mass at each distance in the same rows, split among the blocks that the diagonal crosses, at `LINES`.

The weight, the root mean square and the sum kept the most mass, or were level with what did, on calibration text and recall of
`tiny-lm` among sums, products and maxima of these estimates; the differences there are below one point.

On top come the last `last_blocks` query blocks, all of them, and a window of `window_blocks`. The native budget is the fewest
blocks of each row that hold `mass` of the combined score. At a density the last rows are dense only as far as they take no more
than a quarter of the area, and the window is what every method keeps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....base.errors import ConfigError
from ....kernels.selection import fused
from .._budget import affordable, keep_density, keep_mass
from .._fused import counts, forced, power, ready
from .._layout import Always, real_keys, real_queries
from .._options import Option, Settings
from .._scores import (
    block_means,
    blocks_of,
    column_masses,
    diagonal_sums,
    exact_rows,
    padded,
    products,
    softmax_where,
    split,
    spread_over_blocks,
)
from ..plan import BlockPlan, Context, finish

KNOWN = {
    "mass": Option(0.9, float, 0.0, 1.0, heads=True),
    "cells": Option(None, int, 1),
    "last": Option(64, int, 1),
    "last_blocks": Option(2, int, 0),
    "window_blocks": Option(2, int, 1),
}
LINES = 0.25
MOST_CELLS, MAP_SIDE = 8, 4096
MAP_CELLS = 2**26  # of one strip, which reads no keys after its last query


class Union:
    """Options: `mass`, `cells` (a block is cut into), `last` (queries), `last_blocks`, `window_blocks`, `density`."""

    reads = frozenset({"density", *KNOWN})

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.settings = Settings("union", options, KNOWN)

    def select(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> BlockPlan:
        """Keep the blocks that any of the estimates wants most."""
        one = self.settings.one
        cells, last = (
            one("cells", ctx) or cells_for(ctx.block, ctx.prompt_len),
            one("last_blocks", ctx) * ctx.block,
        )
        if ctx.block % cells:
            raise ConfigError(
                f"A block of {ctx.block} tokens cannot be cut into {cells} cells.", fix="Choose a divisor."
            )
        density, asking = self.settings.density(ctx, q.shape[1]), one("last", ctx)
        if density is not None and asking <= ctx.block and power(asking, least=16) and ready(q, k, v, ctx):
            return _fused(q, k, ctx, density, cells, asking, Always(last=affordable(last, ctx, density)))
        score = cell_masses(q, k, ctx, cells) + last_row_masses(q, k, ctx, asking)
        if density is None:
            always = Always(window=one("window_blocks", ctx), last=last)
            return finish(keep_mass(score, ctx, self.settings.column("mass", ctx, q), always), ctx)
        return finish(keep_density(score, ctx, density, Always(last=affordable(last, ctx, density))), ctx)


def _fused(
    q: Tensor, k: Tensor, ctx: Context, density: tuple[float, ...], cells: int, last: int, always: Always
) -> BlockPlan:
    """The plan at a density by GPU programs."""
    count, widest = counts(ctx, density, q.device, always, (1.0,))
    return fused.choose(
        fused.cell_masses(q, k, cells, ctx.q_offset, ctx.block, ctx.scaling),
        count,
        widest,
        block=ctx.block,
        q_offset=ctx.q_offset,
        forced=forced(ctx, always),
        lines=fused.last_lines(q, k, last, ctx.block, ctx.scaling),
        weight=LINES,
    )


def cells_for(block: int, prompt_len: int) -> int:
    """How many cells a block is cut into unless told: 8, and half as many until a prompt has no more than 4096 cells."""
    cells = math.gcd(block, MOST_CELLS)
    while cells > 1 and prompt_len * cells > MAP_SIDE * block:
        cells //= 2
    return cells


def cell_masses(q: Tensor, k: Tensor, ctx: Context, cells: int) -> Tensor:
    """The mass that each query block's cells give each key block by their means, float32 [B, H, nQ, nK]: root mean square."""
    size = ctx.block // cells
    keys = real_keys(ctx, k.device)
    mean_q = (block_means(q, size, real_queries(ctx, q.device)) * ctx.scaling).to(q.dtype)
    mean_k = block_means(k, size, keys).to(k.dtype)
    columns = -(-ctx.keys // ctx.block)
    begin = torch.arange(mean_k.shape[2], device=q.device) * size
    final = (ctx.q_offset + (torch.arange(mean_q.shape[2], device=q.device) + 1) * size).clamp_max(
        ctx.keys
    ) - 1
    filled = None if keys is None else blocks_of(keys, size).any(-1)[:, None, None]
    step = max(MAP_CELLS // (q.shape[0] * q.shape[1] * cells * mean_k.shape[2]), 1) * cells
    rows = []
    for first in range(0, mean_q.shape[2], step):
        part = slice(first, min(first + step, mean_q.shape[2]))
        seen = min(-(-(ctx.q_offset + part.stop * size) // size), mean_k.shape[2])
        allowed = begin[:seen] <= final[part, None]
        if filled is not None:
            allowed = allowed & filled[..., :seen]
        scores = products(mean_q[:, :, part], mean_k[:, :, :seen])
        mass = blocks_of(softmax_where(scores, allowed, all_full=filled is None), cells).sum(-1)
        mass = padded(mass, 0, columns - mass.shape[3], 0, -mass.shape[2] % cells)
        rows.append(split(mass, 2, cells).square().mean(3).sqrt())
    return torch.cat(rows, 2)


def last_row_masses(q: Tensor, k: Tensor, ctx: Context, last: int) -> Tensor:
    """What the exact attention of the last queries says of each block by its column and diagonal, [B, H, nQ, nK]."""
    weights, begin = exact_rows(q, k, ctx, last)
    columns = column_masses(weights, ctx)
    slash = diagonal_sums(weights, begin, ctx) / weights.shape[2]
    row = torch.arange(-(-q.shape[2] // ctx.block), device=q.device)
    final = (ctx.q_offset + (row + 1) * ctx.block).clamp_max(ctx.keys) - 1
    asking = (final >= begin[:, None])[:, None, :, None]
    mean, most = columns.mean(2, keepdim=True), columns.amax(2, keepdim=True)
    return torch.where(asking, most, LINES * mean) + LINES * spread_over_blocks(slash, ctx)


SELECTOR = Union
