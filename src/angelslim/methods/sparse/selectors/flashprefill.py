"""FlashPrefill: blocks whose mean key draws nearly as much as the best one's, without a sum over the row.

For each query of a block the weight of a key block is ``exp(scaling * q . mean key)``; a block's score is the sum of them over
the queries. A row keeps the blocks with at least `alpha` times the largest score, the first `sink` tokens, a `window`
before its own block, and the prompt's last `last_blocks` blocks keep everything. No row is sorted, which is the point of it:
one comparison with a maximum. Scores are kept as logarithms, so the sums can not overflow.

The map is made one strip of query blocks at a time, of at most `CELLS` cells. At a density each row keeps its best blocks by the
same score. Details are those of its public description; the paper's kernel works on blocks of 128.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._budget import affordable, keep_density
from .._layout import Always, allowed_blocks, forced_blocks, real_keys, real_queries
from .._options import Option, Settings
from .._scores import block_means, products, split
from ..plan import BlockPlan, Context, finish

CELLS = 2**26
KNOWN = {
    "alpha": Option(0.2, float, 0.0, 1.0, heads=True),
    "sink": Option(256, int, 0),
    "window": Option(512, int, 0),
    "last_blocks": Option(2, int, 0),
}


class FlashPrefill:
    """Options: `alpha`, `sink` and `window` (tokens), `last_blocks`, `density`."""

    reads = frozenset({"density", *KNOWN})

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.settings = Settings("flashprefill", options, KNOWN)

    def select(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> BlockPlan:
        """Keep the blocks that come near each row's best."""
        one, score = self.settings.one, drawn(q, k, ctx)
        last = one("last_blocks", ctx) * ctx.block
        density = self.settings.density(ctx, q.shape[1])
        if density is not None:
            return finish(keep_density(score, ctx, density, Always(last=affordable(last, ctx, density))), ctx)
        least = self.settings.column("alpha", ctx, q).log() + score.amax(-1, keepdim=True)
        always = Always(
            max(-(-one("sink", ctx) // ctx.block), 1), max(-(-one("window", ctx) // ctx.block), 1), last
        )
        return finish(
            (score >= least) & allowed_blocks(ctx, q.device) | forced_blocks(ctx, q.device, always), ctx
        )


def drawn(q: Tensor, k: Tensor, ctx: Context) -> Tensor:
    """The logarithm of what the queries of a block together draw from the mean of each key block, float32 [B, H, nQ, nK]."""
    means = block_means(k, ctx.block, real_keys(ctx, k.device)).to(q.dtype)
    asked = real_queries(ctx, q.device)
    cells = q.shape[0] * q.shape[1] * ctx.block * means.shape[2]
    step = max(CELLS // cells, 1) * ctx.block
    rows = []
    for first in range(0, q.shape[2], step):
        part = slice(first, first + step)
        scores = products(q[:, :, part] * ctx.scaling, means).float()
        if asked is not None:
            scores = scores.masked_fill(~asked[:, None, part, None], -torch.inf)
        scores = F.pad(scores, (0, 0, 0, -scores.shape[2] % ctx.block), value=-math.inf)
        rows.append(split(scores, 2, ctx.block).logsumexp(3))
    return torch.cat(rows, 2).masked_fill(~allowed_blocks(ctx, q.device), -torch.inf)


SELECTOR = FlashPrefill
