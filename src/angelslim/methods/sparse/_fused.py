"""When selectors run as a few GPU programs (`kernels.selection`), and the counts these read.

A call without padding whose length and offset are whole blocks qualifies; every other one takes the PyTorch code.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...kernels.selection import fused
from ._budget import row_counts
from ._layout import Always
from .plan import Context


def ready(q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> bool:
    """Whether the programs can serve this call."""
    if ctx.kv_start is not None or ctx.kv_stop is not None:
        return False
    return not fused.refuses(q, k, v, ctx.block, ctx.q_offset)


def power(*numbers: int, least: int = 1) -> bool:
    """Whether all are powers of two of at least `least`."""
    return all(number >= least and number & (number - 1) == 0 for number in numbers)


def counts(
    ctx: Context, density: tuple[float, ...], device: torch.device, always: Always, alpha: tuple[float, ...]
) -> tuple[Tensor, int]:
    """`row_counts` as int32 [1, H or 1, nQ], kept on the device from call to call."""
    return _counts(ctx.block, ctx.q_offset, ctx.prompt_len, ctx.keys, density, device, always, alpha)


@lru_cache(maxsize=64)
def _counts(
    block: int,
    q_offset: int,
    prompt_len: int,
    keys: int,
    density: tuple[float, ...],
    device: torch.device,
    always: Always,
    alpha: tuple[float, ...],
) -> tuple[Tensor, int]:
    ctx = Context(0, 1, 1.0, q_offset, prompt_len, block, kv_len=keys)
    table, widest = row_counts(ctx, density, device, always, alpha)
    return table[..., 0].int().contiguous(), widest


def forced(ctx: Context, always: Always) -> fused.Forced:
    """What rows read in any case; rows that hold one of the prompt's last tokens are dense."""
    first = ctx.q_offset // ctx.block
    dense = -(-(ctx.prompt_len - always.last + 1) // ctx.block) - 1
    rows = (ctx.keys // ctx.block - max(dense, first)) if always.last else 0
    return fused.Forced(always.initial, always.window, dense_rows=max(rows, 0))
