"""The reference: masked attention, exact for every token, one block of queries at a time.

It reads every key and masks what the plan does not list, so it is as slow as dense attention; it runs anywhere, in
any dtype (sums in float32, or in float64 for float64 inputs), and is what the other kernels are compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Case, Kernel, check
from .blocks import BlockPlan


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scaling: float,
    kv_start: Tensor | None = None,
    kv_stop: Tensor | None = None,
) -> Tensor:
    """See `base.Run`; memory is one row of blocks: B x H x block_q x Lk scores."""
    check(q, k, v, plan)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, q_len, _ = q.shape
    grouped = (batch, k.shape[1], heads // k.shape[1], -1)
    keys, values = k.to(wide), v.to(wide)
    listed = plan.to_mask().to(q.device)
    columns = torch.arange(plan.kv_len, device=q.device)
    real = torch.ones(batch, 1, 1, plan.kv_len, dtype=torch.bool, device=q.device)
    if kv_start is not None:
        real = real & (columns >= kv_start.to(q.device)[:, None, None, None])
    if kv_stop is not None:
        real = real & (columns < kv_stop.to(q.device)[:, None, None, None])
    out = q.new_empty(batch, q_len, heads, v.shape[-1]).transpose(1, 2)
    for row in range(plan.rows):
        tokens = slice(row * plan.block_q, min((row + 1) * plan.block_q, q_len))
        queries = q[:, :, tokens].to(wide).reshape(*grouped, q.shape[-1])
        scores = (queries @ keys[:, :, None].transpose(-1, -2)).flatten(1, 2) * scaling
        positions = torch.arange(tokens.start, tokens.stop, device=q.device)[:, None] + plan.q_offset
        kept = listed[:, :, row, None, :].repeat_interleave(plan.block_k, -1)[..., : plan.kv_len]
        scores = scores.masked_fill(~(kept & (columns <= positions) & real), -torch.inf)
        weights = scores.softmax(-1).nan_to_num(0.0)  # a query without keys: zeros
        mixed = weights.reshape(*grouped, plan.kv_len) @ values[:, :, None]
        out[:, :, tokens] = mixed.flatten(1, 2).to(q.dtype)
    return out


def refuses(case: Case) -> str:
    """It computes everything."""
    return ""


KERNEL = Kernel("dense", run, refuses)
