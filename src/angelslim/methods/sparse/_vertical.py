"""Vertical columns and slash diagonals: from chosen tokens or weights to blocks.

A column is a key that all later queries read, a slash a distance at which every query reads. Kernels read blocks, so both are
rounded to blocks in one of two ways:

* `cover`: every block that holds a chosen column, or that a chosen diagonal crosses. It contains the paper's tokens and may be
  much more than they are: 1000 columns far apart fill 1000 blocks.
* `count`: as many whole blocks as the chosen tokens would fill, those with the most weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._budget import top
from ._layout import block_distance, distances
from ._scores import blocks_of
from .plan import Context


def cover_columns(columns: Tensor, ctx: Context) -> Tensor:
    """The key blocks that hold a chosen column, bool [B, H, 1, nK], of columns [B, H, Lk]."""
    return blocks_of(columns, ctx.block).any(-1)[:, :, None]


def cover_slashes(slashes: Tensor, ctx: Context) -> Tensor:
    """The blocks that a chosen diagonal crosses, bool [B, H, nQ, nK], of slashes [B, H, Lk] over distances."""
    before = torch.nn.functional.pad(slashes.to(torch.int32).cumsum(-1, dtype=torch.int32), (1, 0))
    nearest, farthest = distances(ctx, slashes.device)
    first, last = nearest.clamp(0, ctx.keys), (farthest + 1).clamp(0, ctx.keys)
    return before[:, :, last] > before[:, :, first]


def count_columns(weights: Tensor, counts: tuple[int, ...], ctx: Context) -> Tensor:
    """The heaviest `counts` key blocks, bool [B, H, 1, nK], of column weights [B, H, Lk]."""
    return top(blocks_of(weights, ctx.block).sum(-1), counts)[:, :, None]


def count_slashes(weights: Tensor, counts: tuple[int, ...], ctx: Context) -> Tensor:
    """The heaviest `counts` block diagonals, bool [B, H, nQ, nK], of diagonal weights [B, H, Lk].

    A block diagonal has the weights of `block` distances, from a multiple of it on.
    """
    chosen = top(blocks_of(weights, ctx.block).sum(-1), counts)
    apart = block_distance(ctx, weights.device)
    return chosen[:, :, apart.clamp_min(0)] & (apart >= 0)
