"""VecAttention: the single keys that come near the best one, for each small group of queries.

Queries are averaged in groups of `rows`. A group keeps the keys whose product with its mean is at least the group's largest plus
``log(threshold)``: with a softmax they would have at least that share of the largest weight. Its kernel gathers single keys;
ours reads blocks, so a block of queries reads the blocks with a key that one of its groups keeps.

The scores of single keys are reduced to blocks one strip of groups at a time, of at most `CELLS` cells. At a density a block's
score is that of its best key, relative to the group's largest. Details are those of its public description.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._budget import keep_density
from .._layout import allowed_blocks, real_keys, real_queries
from .._options import Option, Settings
from .._scores import block_means, products, split
from ..plan import BlockPlan, Context, finish

CELLS = 2**26
KNOWN = {"threshold": Option(0.1, float, 0.0, 1.0, heads=True), "rows": Option(64, int, 1)}


class VecAttention:
    """Options: `threshold`, `rows` (queries of a group; the largest common divisor with the block is used), `density`."""

    reads = frozenset({"density", *KNOWN})

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.settings = Settings("vecattention", options, KNOWN)

    def select(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> BlockPlan:
        """Keep the blocks with a key that comes near the best."""
        score = best_keys(q, k, ctx, math.gcd(self.settings.one("rows", ctx), ctx.block))
        density = self.settings.density(ctx, q.shape[1])
        if density is not None:
            return finish(keep_density(score, ctx, density), ctx)
        least = self.settings.column("threshold", ctx, q).log()
        return finish((score >= least) & allowed_blocks(ctx, q.device), ctx)


def best_keys(q: Tensor, k: Tensor, ctx: Context, rows: int) -> Tensor:
    """The largest product of a group's mean query with a key of each block, less the group's largest, at most 0.

    Of the groups of a query block the best counts; float32 [B, H, nQ, nK].
    """
    asked, real = real_queries(ctx, q.device), real_keys(ctx, k.device)
    means = block_means(q, rows, asked).to(q.dtype) * ctx.scaling
    last = (torch.arange(means.shape[2], device=q.device) + 1) * rows
    last = ctx.q_offset + last.clamp_max(q.shape[2]) - 1
    place, per_block = torch.arange(ctx.keys, device=q.device), ctx.block // rows
    cells = q.shape[0] * q.shape[1] * per_block * ctx.keys
    step = max(CELLS // cells, 1) * per_block
    found = []
    for first in range(0, means.shape[2], step):
        part = slice(first, first + step)
        allowed = (place <= last[part, None])[None, None]
        allowed = allowed if real is None else allowed & real[:, None, None]
        scores = products(means[:, :, part], k).float().masked_fill(~allowed, -torch.inf)
        scores = F.pad(scores, (0, -ctx.keys % ctx.block), value=-math.inf)
        best = split(scores, 3, ctx.block).amax(-1)
        best = (best - best.amax(-1, keepdim=True)).nan_to_num(-torch.inf)
        if asked is not None:  # a group of padding alone has no mean
            some = F.pad(asked, (0, -asked.shape[1] % rows)).unfold(1, rows, rows).any(-1)
            best = best.masked_fill(~some[:, None, part, None], -torch.inf)
        best = F.pad(best, (0, 0, 0, -best.shape[2] % per_block), value=-math.inf)
        found.append(split(best, 2, per_block).amax(3))
    return torch.cat(found, 2)


SELECTOR = VecAttention
