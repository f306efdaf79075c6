"""The block-sparse kernel for Hopper GPUs, in Gluon: one warp copies, two groups of warps compute (`_gluon_code`).

It computes the common case of prompts: whole blocks of 128, 16-bit queries, keys and values of head size 64 or 128,
no padding. Everything else is `triton_flash`'s, and so is what does not lie in memory as the copy engine wants it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ._flat import descriptor, flatten
from .base import check
from .blocks import BlockPlan

LOG2E = 1.4426950408889634
SIDE = 128  # of a block
ROWS = 64  # queries of one group of warps
STAGES = 2


@functools.cache
def _kernel() -> Any:
    from ._gluon_code import forward

    return forward


@functools.cache
def _units(device: torch.device) -> int:
    """The multiprocessors of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def run(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, scaling: float, stages: int = STAGES
) -> Tensor | None:
    """See `base.Run`; None where the tensors do not lie in memory as copies need it."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    check(q, k, v, plan)
    flats = [flatten(x) for x in (q, k, v)]
    if None in flats:
        return None
    batch, heads, q_len, width = q.shape
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    sources = [
        descriptor(TensorDescriptor, x, flat, [side, width], layout)
        for x, flat, side in zip((q, k, v), flats, (ROWS, SIDE, SIDE), strict=True)
        if flat is not None
    ]
    out = q.new_empty(batch, q_len, heads, width).transpose(1, 2)
    num, idx = plan.num, plan.idx
    lists = [0 if num.shape[0] == 1 else num.stride(0), 0 if num.shape[1] == 1 else num.stride(1)]
    total = plan.rows * heads * batch
    _kernel()[(min(total, _units(q.device)),)](
        *sources, out, num, idx, scaling * LOG2E,
        *out.stride()[:3], *lists, *[step for flat in flats if flat is not None for step in flat.steps],
        q_len, plan.q_offset, idx.shape[-1], plan.rows, heads, total,
        GROUPS=heads // k.shape[1], STAGES=stages, D=width, num_warps=4,
    )  # fmt: skip
    return out
