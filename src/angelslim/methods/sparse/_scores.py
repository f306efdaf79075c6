"""What selectors measure: pooled scores of blocks, exact attention of the last queries, its columns and diagonals.

Legend: B batch rows, H query heads, Hkv key-value heads, Lq and Lk tokens, D head size, n and m blocks, R rows. Keys and
values are never repeated for their group. Padding and the end of a short block never enter a mean.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layout import allowed_blocks, block_distance, real_keys, real_queries
from .plan import Context


def products(q: Tensor, k: Tensor) -> Tensor:
    """The products of q [B, H, n, D] with k [B, Hkv, m, D] of each head's group, [B, H, n, m]."""
    batch, heads, rows, width = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, width)
    return (grouped @ k.transpose(-1, -2)).view(batch, heads, rows, k.shape[2])


def per_head(values: Tensor, heads: int) -> Tensor:
    """Values of the key-value heads [B, Hkv, ...] for each query head of their groups, [B, H, ...]."""
    return values.repeat_interleave(heads // values.shape[1], 1)


def split(x: Tensor, axis: int, size: int) -> Tensor:
    """Cut an axis, counted from the front, into pieces of `size`, which becomes the next axis."""
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def padded(x: Tensor, *places: int) -> Tensor:
    """`F.pad` with zeros; without places the tensor itself, which F.pad would copy."""
    return F.pad(x, places) if any(places) else x


def blocks_of(x: Tensor, size: int) -> Tensor:
    """Cut [..., L] into blocks, [..., n, size]; the end of the last one is zero, or False."""
    return split(padded(x, 0, -x.shape[-1] % size), x.dim() - 1, size)


def token_blocks(x: Tensor, size: int) -> Tensor:
    """Cut [B, H, L, D] into blocks, [B, H, n, size, D]; the end of the last one is zero."""
    return split(padded(x, 0, 0, 0, -x.shape[-2] % size), x.dim() - 2, size)


def block_means(x: Tensor, size: int, real: Tensor | None) -> Tensor:
    """The mean of the real tokens of each block of x [B, H, L, D], float32 [B, H, n, D]; zero where there are none."""
    if real is None and x.shape[-2] % size == 0:
        return token_blocks(x, size).mean(-2, dtype=torch.float32)
    if real is None:
        real = torch.ones(1, x.shape[-2], dtype=torch.bool, device=x.device)
    weight = blocks_of(real, size).float()[:, None, :, :, None]
    total = (token_blocks(x, size).float() * weight).sum(-2)
    return total / weight.sum(-2).clamp_min(1)


def pooled_scores(q: Tensor, k: Tensor, ctx: Context) -> Tensor:
    """The scaled product of the mean query and the mean key of each pair of blocks, float32 [B, H, nQ, nK]."""
    mean_q = block_means(q, ctx.block, real_queries(ctx, q.device))
    mean_k = block_means(k, ctx.block, real_keys(ctx, k.device))
    return products(mean_q, mean_k) * ctx.scaling


def softmax_where(scores: Tensor, allowed: Tensor, all_full: bool = False) -> Tensor:
    """The softmax over the last axis of what is allowed, float32; rows without anything allowed are zero.

    `all_full` promises that there are no such rows, which saves two passes over the map.
    """
    weights = torch.softmax(scores.masked_fill(~allowed, -torch.inf), -1, dtype=torch.float32)
    return weights if all_full else weights.nan_to_num(0.0)


def exact_rows(q: Tensor, k: Tensor, ctx: Context, rows: int) -> tuple[Tensor, Tensor]:
    """The attention of this call's last real queries over all keys, float32 [B, H, R, Lk], R at most `rows`.

    Also the position of the first of them, int64 [B or 1]; the R positions follow each other.
    """
    rows = min(rows, q.shape[2])
    if ctx.kv_stop is None:
        begin = torch.full((1,), ctx.keys - rows, dtype=torch.int64, device=q.device)
        asked = q[:, :, -rows:]
    else:
        begin = (ctx.kv_stop.to(q.device) - rows).clamp_min(ctx.q_offset)
        at = (begin - ctx.q_offset)[:, None] + torch.arange(rows, device=q.device)
        asked = q.gather(2, at[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    position = begin[:, None] + torch.arange(rows, device=q.device)
    scores = products(asked * ctx.scaling, k)
    real = real_keys(ctx, q.device)
    if real is not None:
        allowed = (torch.arange(ctx.keys, device=q.device) <= position[:, :, None]) & real[:, None]
        return softmax_where(scores, allowed[:, None]), begin
    # Only the last R keys are not seen by all of the last R queries: the others need no mask.
    late = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
    scores[..., -rows:].masked_fill_(late, -torch.inf)
    return torch.softmax(scores, -1, dtype=torch.float32), begin


def diagonal_sums(weights: Tensor, begin: Tensor, ctx: Context) -> Tensor:
    """Sum weights [B, H, R, Lk] of consecutive queries, the first at `begin`, by distance query - key, [B, H, Lk].

    Without padding the queries are the last ones: most diagonals cross all rows, and reading the rows with one place
    more in each turns them into columns without a copy. The few that start beside the first rows are sheared.
    """
    rows, keys = weights.shape[-2:]
    if ctx.kv_stop is not None:
        return _sheared_sums(weights, begin)
    first = keys - rows
    weights = weights.contiguous()
    size, stride = (*weights.shape[:3], first + 1), (*weights.stride()[:2], keys + 1, 1)
    near = weights.as_strided(size, stride).sum(-2).flip(-1)
    far = _sheared_sums(weights[..., :rows], torch.zeros_like(begin))
    return torch.cat([near, far[..., 1:]], -1)


def _sheared_sums(weights: Tensor, begin: Tensor) -> Tensor:
    """`diagonal_sums` for any `begin` [B or 1].

    Reversed along the keys and padded, each row begins one place later when the rows are read with one place less in
    each: a diagonal is then a column, and no scatter is needed.
    """
    rows, keys = weights.shape[-2:]
    sheared = F.pad(weights.flip(-1), (0, rows)).flatten(-2)[..., :-rows]
    sums = split(sheared, 2, keys + rows - 1).sum(-2)
    distance = torch.arange(keys, device=weights.device)
    place = distance + keys - 1 - begin[:, None]  # [B or 1, Lk]
    inside = (place >= 0) & (place < keys + rows - 1)
    place = place.clamp(0, keys + rows - 2)[:, None].expand(sums.shape[0], sums.shape[1], -1)
    return sums.gather(-1, place) * inside[:, None]


def spread_over_blocks(slash: Tensor, ctx: Context) -> Tensor:
    """The share of each token diagonal's weight that falls in each block, [B, H, nQ, nK], for slash [B, H, Lk].

    Blocks whose first positions are c apart hold ``b - |d - c|`` of the b pairs that the diagonal d has in that row:
    each weight is split between two neighbouring diagonals of blocks.
    """
    block, offset = ctx.block, ctx.q_offset % ctx.block
    cut = blocks_of(F.pad(slash, (2 * block - offset, block)), block)
    behind = torch.arange(block, device=slash.device) / block
    own, next_one = (cut * (1 - behind)).sum(-1), (cut * behind).sum(-1)
    shares = own + F.pad(next_one, (1, -1))
    # The first cut holds distances from -2 blocks on.
    place = (block_distance(ctx, slash.device) + 2).clamp_min(0)
    return shares[:, :, place] * allowed_blocks(ctx, slash.device)


def column_masses(weights: Tensor, ctx: Context) -> Tensor:
    """Sum weights [B, H, R, Lk] over the keys of each block, [B, H, R, nK]."""
    return blocks_of(weights, ctx.block).sum(-1)
