"""FlexPrefill: each head is tried on its last queries, then pooled or vertical-slash (arXiv 2502.20766).

The exact attention of the last `last` queries, summed by key block, is compared with what mean query times mean key says of
the same blocks: the square root of their Jensen-Shannon divergence (natural logarithm). Where it is below `tau` the pooled
map can be trusted and the head is *query-aware*: all of the pooled map's blocks compete, and the fewest that hold the share
`gamma` of it are kept, besides the `min_budget` heaviest columns and diagonals. Else the head is *vertical-slash*: the columns
that hold `gamma` of the last queries' mass are counted, so are the diagonals, and as many tokens' worth of whole block
columns and block diagonals are read, from `min_budget` to `max_budget` tokens.

The first block column and the diagonal are always read; prompts of at most two blocks or `min_budget` tokens are dense. All
heads are done at once and nothing waits for the GPU. At a density each row keeps its best blocks by the head's own score.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._budget import keep_density
from .._layout import allowed_blocks, block_distance, real_keys
from .._options import Option, Settings
from .._scores import (
    block_means,
    blocks_of,
    column_masses,
    diagonal_sums,
    exact_rows,
    pooled_scores,
    products,
    softmax_where,
)
from ..plan import BlockPlan, Context, finish

KNOWN = {
    "gamma": Option(0.9, float, 0.0, 1.0, heads=True),
    "tau": Option(0.1, float, 0.0, heads=True),
    "min_budget": Option(512, int, 0),
    "max_budget": Option(None, int, 1),
    "last": Option(128, int, 1),
}


class FlexPrefill:
    """Options: `gamma`, `tau`, `min_budget`, `max_budget`, `last` (tokens), `density`."""

    reads = frozenset({"density", *KNOWN})

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.settings = Settings("flexprefill", options, KNOWN)

    def select(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> BlockPlan:
        """Keep the pooled map's best blocks, or columns and diagonals, head by head."""
        one, allowed = self.settings.one, allowed_blocks(ctx, q.device)
        density, least = self.settings.density(ctx, q.shape[1]), one("min_budget", ctx)
        if density is None and ctx.prompt_len <= max(2 * ctx.block, least):
            return finish(allowed.expand(q.shape[0], q.shape[1], -1, -1), ctx)
        weights, begin = exact_rows(q, k, ctx, one("last", ctx))
        columns = column_masses(weights, ctx).mean(2)
        tau = self.settings.column("tau", ctx, q)[..., 0]
        aware = (divergence(estimate(q, k, ctx, one("last", ctx)), columns) < tau)[..., None, None]
        pooled = softmax_where(pooled_scores(q, k, ctx), allowed)
        slash = diagonal_sums(weights, begin, ctx) / weights.shape[2]
        diagonals, apart = blocks_of(slash, ctx.block).sum(-1), block_distance(ctx, q.device)
        if density is not None:
            lines = torch.maximum(columns[:, :, None], diagonals[:, :, apart.clamp_min(0)] * (apart >= 0))
            return finish(keep_density(torch.where(aware, pooled, lines), ctx, density), ctx)
        gamma = self.settings.column("gamma", ctx, q)[..., 0]
        low, high = -(-least // ctx.block), -(-(one("max_budget", ctx) or ctx.keys) // ctx.block)
        kept = []
        for tokens, blocks in ((weights.mean(2), columns), (slash, diagonals)):
            count = (tokens_for(tokens, gamma) // ctx.block + 1).clamp(low, max(low, high))
            count = torch.where(aware[..., 0, 0], torch.full_like(count, low), count)
            rank = blocks.argsort(-1, descending=True).argsort(-1)
            kept.append(rank < count[..., None])
        lines = kept[0][:, :, None] | (kept[1][:, :, apart.clamp_min(0)] & (apart >= 0))
        return finish(lines | (aware & most_of_map(pooled, gamma)), ctx)


def estimate(q: Tensor, k: Tensor, ctx: Context, last: int) -> Tensor:
    """What mean query and mean keys say the last real queries read, a distribution over key blocks [B, H, nK]."""
    last = min(last, q.shape[2])
    end = torch.full((1,), ctx.keys, device=q.device) if ctx.kv_stop is None else ctx.kv_stop.to(q.device)
    place = ctx.q_offset + torch.arange(q.shape[2], device=q.device)
    chosen = (place >= end[:, None] - last) & (place < end[:, None])
    mean_q = block_means(q, q.shape[2], chosen)
    mean_k = block_means(k, ctx.block, real_keys(ctx, k.device))
    columns = torch.arange(-(-ctx.keys // ctx.block), device=q.device) * ctx.block
    seen = (columns < end[:, None])[:, None, None] & allowed_blocks(ctx, q.device)[:, :, -1:]
    return softmax_where(products(mean_q, mean_k) * ctx.scaling, seen)[:, :, 0]


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """The square root of the Jensen-Shannon divergence of two distributions over the last axis, in nats."""
    middle = (p + q) / 2
    terms = torch.xlogy(p, p) + torch.xlogy(q, q) - 2 * torch.xlogy(middle, middle)
    return (terms.sum(-1) / 2).clamp_min(0).sqrt()


def tokens_for(weights: Tensor, share: Tensor) -> Tensor:
    """How many of the heaviest entries of [B, H, N] hold `share` [H or 1, 1] of the sum, int64 [B, H]."""
    heaviest = weights.sort(-1, descending=True).values.cumsum(-1)
    return (heaviest < share * weights.sum(-1, keepdim=True)).sum(-1) + 1


def most_of_map(mass: Tensor, share: Tensor) -> Tensor:
    """The fewest blocks of a whole map [B, H, nQ, nK] that hold `share` [H or 1, 1] of it, bool."""
    heaviest, order = mass.flatten(2).sort(-1, descending=True)
    taken = heaviest.cumsum(-1) - heaviest < share * heaviest.sum(-1, keepdim=True)
    return torch.zeros_like(taken).scatter_(-1, order, taken).view_as(mass)


SELECTOR = FlexPrefill
