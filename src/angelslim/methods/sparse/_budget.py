"""How many blocks each row keeps, and which: the best ones up to a count, or up to a share of the mass.

**Iso-density.** Methods can be compared only at equal cost, so every selector can be given a `density`: the share of the
causal area (pairs of a query and a key) that the whole prompt may read. Rows get one common count k, as far as causality
gives them that many blocks, or the counts of a `Decay`; k is real and solved for by bisection, and the roundings of the
rows make up for each other, so the area is met to about one block. What rows read in any case counts, and a density
below that cannot be reached. The counts belong to the prompt, not to the call: a prompt read in chunks gets the rows it
would get at once. They are made on the host from lengths alone and remembered, so a GPU is not waited for; padding, whose
lengths live on the device, costs one wait.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ...kernels.attention.blocks import causal_area
from ._layout import COMMON, Always, allowed_blocks, forced_blocks, prompt_spans
from .plan import Context

HALVINGS = 48


def decayed(first: float, alpha: float, rows: int) -> Tensor:
    """Stem's counts before rounding, float64 [rows]: `first`, from row `first` on falling to ``alpha * first``."""
    row = torch.arange(rows, dtype=torch.float64)
    span = max(rows - 1 - first, 1.0)
    return first * (1 - (1 - alpha) * ((row - first) / span).clamp(0, 1))


@lru_cache(maxsize=256)
def prompt_counts(
    block: int, length: int, density: float, always: Always = COMMON, alpha: float = 1.0
) -> tuple[int, ...]:
    """The blocks of each row of a prompt of `length` tokens that together are `density` of the causal area."""
    rows = -(-length // block)
    row = torch.arange(rows)
    available = (row + 1).double()
    final = ((row + 1) * block).clamp_max(length) - 1
    least = torch.minimum(available, torch.full_like(available, always.initial + always.window))
    least = torch.where(final >= length - always.last, available, least)
    area = causal_area(block, block, 0, length).double()
    own = area[row, row]  # the diagonal block; all others of the row have the full width
    height = (torch.full_like(row, length) - row * block).clamp_max(block)
    unit = (height * block).double()
    target = density * float(area.sum())

    def counts(first: float) -> Tensor:
        return torch.minimum(torch.maximum(decayed(first, alpha, rows), least), available)

    low, high = 0.0, rows / max(alpha, 1e-3)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if float((own + (counts(middle) - 1) * unit).sum()) < target:
            low = middle
        else:
            high = middle
    return _whole(counts(high), least, available, unit)


def _whole(counts: Tensor, least: Tensor, available: Tensor, unit: Tensor) -> tuple[int, ...]:
    """Round counts so that the areas of the roundings cancel, row after row."""
    carry, found = 0.0, []
    for count, low, high, size in zip(
        counts.tolist(), least.tolist(), available.tolist(), unit.tolist(), strict=True
    ):
        near = min(max(round(count + carry / size), math.floor(count)), math.ceil(count))
        whole = min(max(near, low), high)
        carry += (count - whole) * size
        found.append(int(whole))
    return tuple(found)


def row_counts(
    ctx: Context,
    density: tuple[float, ...],
    device: torch.device,
    always: Always = COMMON,
    alpha: tuple[float, ...] = (1.0,),
) -> tuple[Tensor, int]:
    """Each row's count in the iso-density mode, int64 [B or 1, H or 1, nQ, 1], and the largest of them."""
    heads = max(len(density), len(alpha))
    density, alpha = density * (heads // len(density)), alpha * (heads // len(alpha))
    spans = prompt_spans(ctx)
    rows, first = -(-ctx.queries // ctx.block), ctx.q_offset // ctx.block
    crossing = int(ctx.q_offset % ctx.block > 0)  # rows then have two diagonal blocks
    table = []
    for begin, end in spans:
        sink = begin // ctx.block
        length = max(end - sink * ctx.block, 1)
        for target, fall in zip(density, alpha, strict=True):
            counts = prompt_counts(ctx.block, length, target, always, fall)
            wanted = [first + row - sink for row in range(rows)]
            table.append([counts[min(at, len(counts) - 1)] + crossing if at >= 0 else 1 for at in wanted])
    columns = -(-ctx.keys // ctx.block)
    widest = min(max(max(line) for line in table), columns)
    return torch.tensor(table, device=device).clamp_max(columns).view(len(spans), heads, rows, 1), widest


def keep_count(score: Tensor, ctx: Context, count: Tensor, widest: int, always: Always = COMMON) -> Tensor:
    """Keep each row's best blocks, bool [B, H, nQ, nK]: forced ones first, `count` in all; no more than `widest`."""
    forced, allowed = forced_blocks(ctx, score.device, always), allowed_blocks(ctx, score.device)
    ranked = score.float().masked_fill(~allowed, -torch.inf).masked_fill(forced, torch.inf)
    best = ranked.topk(widest, dim=-1).indices
    taken = torch.arange(widest, device=score.device) < count
    kept = torch.zeros_like(ranked, dtype=torch.bool)
    kept.scatter_(-1, best, taken.expand_as(best))
    return (kept & allowed) | forced


def keep_density(
    score: Tensor,
    ctx: Context,
    density: tuple[float, ...],
    always: Always = COMMON,
    alpha: tuple[float, ...] = (1.0,),
) -> Tensor:
    """Keep the best blocks of the map `score` [B, H, nQ, nK] up to a density, one for all heads or one a head."""
    count, widest = row_counts(ctx, density, score.device, always, alpha)
    return keep_count(score, ctx, count, widest, always)


def affordable(tokens: int, ctx: Context, density: tuple[float, ...]) -> int:
    """How many of the prompt's last tokens may be dense so that their rows take no more than a quarter of the area."""
    # m dense rows at the end of n are about 2 m / n of the area.
    return min(tokens, int(min(density) * ctx.prompt_len / 8) // ctx.block * ctx.block)


def keep_mass(score: Tensor, ctx: Context, share: Tensor, always: Always = COMMON) -> Tensor:
    """Keep in each row the fewest blocks that hold `share` [H or 1, 1, 1] of its score, forced ones first.

    `score` [B, H, nQ, nK] is a mass: not negative. A block is kept while the ones before it hold less than the share.
    """
    forced, allowed = forced_blocks(ctx, score.device, always), allowed_blocks(ctx, score.device)
    mass = score.float().masked_fill(~allowed, 0.0)
    order = mass.masked_fill(~allowed, -1.0).masked_fill(forced, torch.inf).argsort(-1, descending=True)
    sorted_mass = mass.gather(-1, order)
    before = sorted_mass.cumsum(-1) - sorted_mass
    taken = before < share * mass.sum(-1, keepdim=True)
    kept = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, order, taken)
    return (kept & allowed) | forced


def top(values: Tensor, counts: tuple[int, ...]) -> Tensor:
    """The largest `counts` entries along the last axis of [B, H, N], bool; one count for all heads or one a head."""
    counts = tuple(min(count, values.shape[-1]) for count in counts)
    widest = max(counts)
    best = values.topk(widest, dim=-1).indices
    limit = torch.tensor(counts, device=values.device)[:, None]
    taken = (torch.arange(widest, device=values.device) < limit).expand_as(best)
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, best, taken)
