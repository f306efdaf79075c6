"""What the static patterns share: blocks chosen by where they lie, never by what they hold.

A pattern with its own widths is a mask. At a given density its widths are scaled until the area fits: `entry`, the scale at
which a block enters the pattern, is then the score, smallest first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._budget import keep_density
from ._layout import COMMON, Always, distances, starts
from .plan import BlockPlan, Context, finish


def key_places(ctx: Context, device: torch.device) -> Tensor:
    """How far each key block begins after the first real key, int64 [B or 1, 1, 1, nK]; below 0 if it begins before."""
    begin = torch.arange(-(-ctx.keys // ctx.block), device=device) * ctx.block
    return begin[None, None, None] - starts(ctx, device)[:, None, None, None]


def reaches(ctx: Context, device: torch.device) -> Tensor:
    """The smallest distance, at least 0, of a query to a key in each block, float32 [nQ, nK]."""
    return distances(ctx, device)[0].clamp_min(0).float()


def spread_heads(mask: Tensor, q: Tensor) -> Tensor:
    """A mask or score with one entry for all batch rows or heads, for each of q's; a view."""
    return mask.expand(q.shape[0], q.shape[1], *mask.shape[-2:])


def scaled(
    entry: Tensor, q: Tensor, ctx: Context, density: tuple[float, ...], always: Always = COMMON
) -> BlockPlan:
    """The plan of a pattern whose widths are scaled to a density; `entry` [B or 1, H or 1, nQ, nK] or [nQ, nK]."""
    score = -entry if entry.dim() == 4 else -entry[None, None]
    return finish(keep_density(spread_heads(score, q), ctx, density, always), ctx)
