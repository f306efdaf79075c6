"""The oracle: blocks by the attention mass they really have; for measurements, since it costs as much as attention.

It shows how far any choice of the same number of blocks a row could come. Without `density` it keeps the fewest blocks
that hold the share `mass` of each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._budget import keep_density, keep_mass
from .._layout import real_keys, real_queries
from .._options import Option, Settings
from .._scores import column_masses, products, softmax_where
from ..plan import BlockPlan, Context, finish

KNOWN = {"mass": Option(0.9, float, 0.0, 1.0, heads=True)}


class Oracle:
    """Options: `mass`, `density`."""

    reads = frozenset({"density", *KNOWN})

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.settings = Settings("oracle", options, KNOWN)

    def select(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> BlockPlan:
        """Compute the whole attention map, one row of blocks at a time, and keep the heaviest blocks."""
        score = block_masses(q, k, ctx)
        density = self.settings.density(ctx, q.shape[1])
        if density is None:
            return finish(keep_mass(score, ctx, self.settings.column("mass", ctx, q)), ctx)
        return finish(keep_density(score, ctx, density), ctx)


def block_masses(q: Tensor, k: Tensor, ctx: Context) -> Tensor:
    """The exact attention mass of each block, summed over its queries, float32 [B, H, nQ, nK]."""
    keys, asked = real_keys(ctx, q.device), real_queries(ctx, q.device)
    place, rows = torch.arange(ctx.keys, device=q.device), []
    for first in range(0, q.shape[2], ctx.block):
        part = q[:, :, first : first + ctx.block]
        position = ctx.q_offset + first + torch.arange(part.shape[2], device=q.device)
        allowed = (place <= position[:, None])[None]
        if keys is not None and asked is not None:
            allowed = allowed & keys[:, None] & asked[:, first : first + ctx.block, None]
        weights = softmax_where(products(part, k) * ctx.scaling, allowed[:, None])
        rows.append(column_masses(weights, ctx).sum(-2))
    return torch.stack(rows, 2)


SELECTOR = Oracle
