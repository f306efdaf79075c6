"""A selector on top of a model's own sparse attention (DeepSeek-V3.2, GLM with DSA).

Such a model has an *indexer* in each layer that picks, for every query, the keys it may read, and was trained with it.
transformers hands the picked keys to attention as `indices` int32 [B, Lq, topk], beside a causal mask. A selector then takes
away more: a query reads the keys that its indexer picked in the blocks that the plan lists. A query whose plan holds none
of its keys keeps them all, so no row is empty.

This is computed as masked attention, which tells what the combination would cost in quality and how much it would read; it
gains no time, since the model's own kernels gather single keys. Shapes: B batch rows, H heads, Lq queries, Lk keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import BlockPlan


def picked(mask: Tensor, indices: Tensor) -> Tensor:
    """What the model itself reads, bool [B, 1, Lq, Lk], of a causal mask of that shape and its indexer's keys."""
    chosen = torch.zeros(*indices.shape[:2], mask.shape[-1], dtype=torch.bool, device=mask.device)
    return mask & chosen.scatter_(-1, indices.long(), True)[:, None]


def narrowed(read: Tensor, plan: BlockPlan) -> Tensor:
    """The keys of `read` that lie in the plan's blocks, bool [B, H, Lq, Lk]."""
    listed = plan.to_mask().to(read.device)
    listed = listed.repeat_interleave(plan.block_q, 2)[:, :, : plan.q_len]
    both = read & listed.repeat_interleave(plan.block_k, 3)[..., : plan.kv_len]
    return both | (read & ~both.any(-1, keepdim=True))


def is_causal(mask: Tensor) -> bool:
    """Whether a mask [B, 1, Lq, Lk] is plain causality, for every batch row; waits for the device."""
    queries, keys = mask.shape[-2:]
    place = torch.arange(keys, device=mask.device)
    return bool((mask == (place <= place[keys - queries :, None])).all())


def share_read(read: Tensor) -> Tensor:
    """The pairs that are read over those that causality allows, float64 [B, H], for queries at the end of the keys."""
    queries, keys = read.shape[-2:]
    pairs = queries * keys - queries * (queries - 1) / 2
    return read.sum((-1, -2)).double() / pairs
