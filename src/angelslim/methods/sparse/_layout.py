"""Where tokens and blocks lie: positions, padding, and the blocks that every row must or may read.

Legend: B batch rows, nQ query blocks, nK key blocks, b the block in tokens. Query block I holds the positions
``q_offset + I*b`` to ``q_offset + (I+1)*b - 1``; key block J holds ``J*b`` to ``(J+1)*b - 1``. Without padding a mask has
one entry for all batch rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .plan import Context, diagonal


class Always(NamedTuple):
    """What rows read whatever their scores say: the first `initial` blocks, the last `window` blocks up to their own
    (itself included), and everything for the prompt's `last` tokens. The defaults are the rules of `plan.finish`.
    """

    initial: int = 1
    window: int = 1
    last: int = 0


COMMON = Always()


def starts(ctx: Context, device: torch.device) -> Tensor:
    """The first real key of each batch row, int64 [B or 1]."""
    if ctx.kv_start is None:
        return torch.zeros(1, dtype=torch.int64, device=device)
    return ctx.kv_start.to(device)


def ends(ctx: Context, device: torch.device) -> Tensor:
    """Where the prompt of each batch row ends, int64 [B or 1]: `prompt_len` less the padding on the right."""
    end = torch.full((1,), ctx.prompt_len, dtype=torch.int64, device=device)
    return end if ctx.kv_stop is None else end - ctx.keys + ctx.kv_stop.to(device)


def prompt_spans(ctx: Context) -> list[tuple[int, int]]:
    """Where the prompt of each batch row begins and ends, on the host; without padding one entry for all of them."""
    if ctx.kv_start is None and ctx.kv_stop is None:
        return [(0, ctx.prompt_len)]
    host = torch.device("cpu")
    begin, end = starts(ctx, host).tolist(), ends(ctx, host).tolist()
    batch = max(len(begin), len(end))
    return list(zip(begin * (batch // len(begin)), end * (batch // len(end)), strict=True))


def real_keys(ctx: Context, device: torch.device) -> Tensor | None:
    """Which keys are no padding, bool [B, Lk]; None when all are real."""
    if ctx.kv_start is None and ctx.kv_stop is None:
        return None
    place = torch.arange(ctx.keys, device=device)
    real = place >= starts(ctx, device)[:, None]
    return real if ctx.kv_stop is None else real & (place < ctx.kv_stop.to(device)[:, None])


def real_queries(ctx: Context, device: torch.device) -> Tensor | None:
    """Which queries are no padding, bool [B, Lq]; None when all are real."""
    real = real_keys(ctx, device)
    return None if real is None else real[:, ctx.q_offset :]


def allowed_blocks(ctx: Context, device: torch.device) -> Tensor:
    """The blocks that rows may read, bool [B or 1, 1, nQ, nK]: causal, and with real keys in them."""
    _, last = diagonal(ctx.block, ctx.block, ctx.q_offset, ctx.keys, device=device)
    columns = torch.arange(-(-ctx.keys // ctx.block), device=device)
    allowed = (columns <= last[:, None])[None, None]
    if ctx.kv_start is not None:
        allowed = allowed & (columns >= (starts(ctx, device) // ctx.block)[:, None, None, None])
    if ctx.kv_stop is not None:
        allowed = allowed & (columns * ctx.block < ctx.kv_stop.to(device)[:, None, None, None])
    return allowed


def forced_blocks(ctx: Context, device: torch.device, always: Always = COMMON) -> Tensor:
    """The blocks that rows read in any case, bool [B or 1, 1, nQ, nK]; all of them are allowed."""
    first, _ = diagonal(ctx.block, ctx.block, ctx.q_offset, ctx.keys, device=device)
    columns = torch.arange(-(-ctx.keys // ctx.block), device=device)
    sink = (starts(ctx, device) // ctx.block)[:, None, None, None]
    near = columns > first[:, None] - always.window
    forced = near | (columns < sink + always.initial)
    if always.last:
        forced = forced | last_rows(ctx, device, always.last)
    return forced & allowed_blocks(ctx, device)


def last_rows(ctx: Context, device: torch.device, tokens: int) -> Tensor:
    """Which query blocks hold one of the prompt's last `tokens` tokens, bool [B or 1, 1, nQ, 1]."""
    row = torch.arange(-(-ctx.queries // ctx.block), device=device)
    final = (ctx.q_offset + (row + 1) * ctx.block).clamp_max(ctx.keys) - 1
    return (final >= ends(ctx, device)[:, None] - tokens)[:, None, :, None]


def distances(ctx: Context, device: torch.device) -> tuple[Tensor, Tensor]:
    """The smallest and the largest distance of a query to a key in each block, two int64 [nQ, nK]; may be negative."""
    query = torch.arange(-(-ctx.queries // ctx.block), device=device)[:, None] * ctx.block + ctx.q_offset
    key = torch.arange(-(-ctx.keys // ctx.block), device=device) * ctx.block
    nearest = query - (key + ctx.block).clamp_max(ctx.keys) + 1
    return nearest, (query + ctx.block).clamp_max(ctx.keys) - 1 - key


def block_distance(ctx: Context, device: torch.device) -> Tensor:
    """How many blocks a key block lies before a query block's first position, int64 [nQ, nK]."""
    query = torch.arange(-(-ctx.queries // ctx.block), device=device)[:, None] * ctx.block + ctx.q_offset
    return query // ctx.block - torch.arange(-(-ctx.keys // ctx.block), device=device)
