"""A block-sparse flash attention kernel in Triton, forward only: the fast path on GPUs.

One program computes `BLOCK_M` queries of one head. It walks the row's list of key blocks with the online softmax of
FlashAttention (arXiv 2205.14135), first the blocks before the diagonal without any mask, then the diagonal ones. Sums,
maxima and the output are kept in float32. Keys and values are read from their own heads, so grouped queries need no
repeated copies, and the heads of a group run one after another and find their keys in the cache.

Rows are taken from the last to the first: the lists of causal plans grow with the position, and work that starts long
ends balanced. Scores are multiplied by ``scaling * log2(e)`` once, because GPUs have an exponential of base 2.

Only this module imports Triton, when it is first run; with the environment's TRITON_INTERPRET=1 it runs on a CPU,
slowly, for tests.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Case, Kernel, check
from .blocks import BlockPlan

LOG2E = 1.4426950408889634
HOPPER_MEMORY = 227 * 1024


@dataclass(frozen=True)
class Tiles:
    """How a program is cut: queries and keys at once, warps, and how many loads are under way."""

    queries: int
    keys: int
    warps: int
    stages: int

    @classmethod
    def usual(cls, case: Case) -> Tiles:
        """What suits Hopper and Ampere; a benchmark may try others."""
        if case.dtype == torch.float32:  # products without tensor cores: registers are what is short
            return cls(min(case.block_q, 32), min(case.block_k, 32), warps=4, stages=2)
        if max(case.head_dim, case.value_dim) > 128:
            return cls(min(case.block_q, 64), min(case.block_k, 32), warps=4, stages=2)
        warps = 8 if max(case.head_dim, case.value_dim) > 64 else 4
        if warps == 8 and _shared_memory(case.device) >= HOPPER_MEMORY:
            return cls(min(case.block_q, 128), min(case.block_k, 128), warps, stages=3)
        return cls(min(case.block_q, 128), min(case.block_k, 64), warps=warps, stages=3)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """The bytes of fast memory that one program may take on a GPU."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0))


@functools.cache
def _kernel() -> Any:
    from ._triton_code import forward

    return forward


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scaling: float,
    kv_start: Tensor | None = None,
    kv_stop: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """See `base.Run`; `tiles` overrides the usual cut."""
    check(q, k, v, plan)
    tiles = tiles or Tiles.usual(
        Case(q.device, q.dtype, q.shape[-1], v.shape[-1], plan.block_q, plan.block_k)
    )
    assert plan.block_q % tiles.queries == 0 and plan.block_k % tiles.keys == 0, (plan.block_q, tiles)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, q_len, head_dim = q.shape
    out = q.new_empty(batch, q_len, heads, v.shape[-1]).transpose(1, 2)
    num, idx = plan.num, plan.idx
    lists = [0 if num.shape[0] == 1 else num.stride(0), 0 if num.shape[1] == 1 else num.stride(1)]
    padded = kv_start is not None or kv_stop is not None
    bounds = torch.tensor([0, plan.kv_len], device=q.device).repeat(batch, 1) if padded else num
    if kv_start is not None:
        bounds[:, 0] = kv_start
    if kv_stop is not None:
        bounds[:, 1] = kv_stop
    parts = plan.block_q // tiles.queries
    _kernel()[(plan.rows * parts, batch * heads)](
        q, k, v, out, num, idx, bounds,
        scaling * LOG2E,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *lists,
        q_len, plan.q_offset, plan.idx.shape[-1], heads, heads // k.shape[1],
        BLOCK_Q=plan.block_q, BLOCK_K=plan.block_k, BLOCK_M=tiles.queries, BLOCK_N=tiles.keys,
        D=head_dim, DV=v.shape[-1], DIAGONAL=plan.block_q // plan.block_k + 1, PADDED=padded,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


def refuses(case: Case) -> str:
    """Why the Triton kernel cannot compute the case."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if case.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the Triton kernel runs on CUDA GPUs"
    if case.device.type == "cuda" and torch.cuda.get_device_capability(case.device) < (8, 0):
        return "the Triton kernel needs compute capability 8.0"
    if case.device.type != "cuda" and case.dtype == torch.bfloat16:
        return "Triton's interpreter does not compute in bfloat16"
    if case.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernel does not compute in {case.dtype}"
    for size in (case.head_dim, case.value_dim, case.block_q, case.block_k):
        if size & (size - 1) or size < 16:
            return f"the Triton kernel needs head dimensions and blocks that are powers of two from 16, not {size}"
    if max(case.head_dim, case.value_dim) > 256:
        return "the Triton kernel's head dimension is at most 256"
    return ""


KERNEL = Kernel("triton", run, refuses)
