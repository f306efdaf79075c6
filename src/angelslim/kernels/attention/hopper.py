"""The block-sparse kernel for Hopper GPUs, in Gluon: one warp copies, two groups of warps compute (`_gluon_code`).

It computes the common case of prompts: blocks of 128, 16-bit queries, keys and values of head size 128, no padding. A call
with padding, with an offset that is no whole block, or with tensors that do not lie in memory as the copy engine reads
them goes to `triton_flash`. Gluon is an experimental part of Triton, so only versions it was tried with are used, and the
first call of a process compares a small case with the reference: what does not compile or agree is not used.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from typing import Any

import torch
from torch import Tensor

from . import dense, triton_flash
from ._flat import Flat, descriptor, flatten
from .base import Case, Kernel, check
from .blocks import BlockPlan

LOG2E = 1.4426950408889634
SIDE, WIDTH = 128, 128  # of a block, of a head
ROWS = 64  # queries of one group of warps
STAGES = 3
VERSIONS = ("3.6.", "3.7.")  # of Triton


@functools.cache
def _kernel() -> Any:
    from ._gluon_code import forward

    return forward


@functools.cache
def _units(device: torch.device) -> int:
    """The multiprocessors of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def copies(q: Tensor, k: Tensor, v: Tensor) -> list[Flat] | None:
    """How the copy engine reads the three, or None.

    Where the last block is short, what is read after the last key must be numbers, because weights of zero multiply it:
    zeros after the end of the memory, or another head's tokens.
    """
    flats = [flatten(x) for x in (q, k, v)]
    for x, flat in zip((q, k, v), flats, strict=True):
        tokens, heads = x.shape[2], x.shape[1]
        if flat is None:
            return None
        close = flat.row_h in (0, tokens) and flat.row_b in (0, tokens, heads * tokens)
        if tokens % SIDE and not close:
            return None
    return [flat for flat in flats if flat is not None]


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scaling: float,
    kv_start: Tensor | None = None,
    kv_stop: Tensor | None = None,
    stages: int = STAGES,
) -> Tensor:
    """See `base.Run`; `stages` blocks of keys and values are under way at once."""
    flats = copies(q, k, v) if kv_start is None and kv_stop is None and plan.q_offset % SIDE == 0 else None
    if flats is None:
        return triton_flash.run(q, k, v, plan, scaling=scaling, kv_start=kv_start, kv_stop=kv_stop)
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    check(q, k, v, plan)
    batch, heads, q_len, width = q.shape
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    sources = [
        descriptor(TensorDescriptor, x, flat, [side, width], layout)
        for x, flat, side in zip((q, k, v), flats, (ROWS, SIDE, SIDE), strict=True)
    ]
    out = q.new_empty(batch, q_len, heads, width).transpose(1, 2)
    num, idx = plan.num, plan.idx
    lists = [0 if num.shape[0] == 1 else num.stride(0), 0 if num.shape[1] == 1 else num.stride(1)]
    total = plan.rows * heads * batch
    _kernel()[(min(total, _units(q.device)),)](
        *sources, out, num, idx, q.new_zeros(1, dtype=torch.int32), scaling * LOG2E,
        *out.stride()[:3], *lists, *[step for flat in flats for step in flat.steps],
        q_len, plan.q_offset, idx.shape[-1], plan.rows, heads, total,
        GROUPS=heads // k.shape[1], STAGES=stages, D=width, num_warps=4,
    )  # fmt: skip
    return out


def refuses(case: Case) -> str:
    """Why the Hopper kernel cannot compute the case."""
    if case.device.type != "cuda" or torch.cuda.get_device_capability(case.device)[0] != 9:
        return "the Hopper kernel needs compute capability 9"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    version = importlib.metadata.version("triton")
    if not version.startswith(VERSIONS):
        return f"the Hopper kernel was not tried with Triton {version}"
    if case.dtype not in (torch.bfloat16, torch.float16):
        return f"the Hopper kernel does not compute in {case.dtype}"
    if (case.head_dim, case.value_dim) != (WIDTH, WIDTH):
        return f"the Hopper kernel's head dimension is {WIDTH}"
    if (case.block_q, case.block_k) != (SIDE, SIDE):
        return f"the Hopper kernel's block is {SIDE}"
    return _doubt(case.device)


@functools.cache
def _doubt(device: torch.device) -> str:
    """Why a GPU's own build of the kernel is not used: it is compiled and tried once."""
    drawn = torch.Generator(device).manual_seed(0)
    q, k, v = (  # with more tiles than there are programs
        torch.randn(1, heads, 4 * SIDE, WIDTH, device=device, generator=drawn).bfloat16()
        for heads in (64, 2, 2)
    )
    mask = torch.eye(4, dtype=torch.bool, device=device)
    mask[2:, 0] = mask[3, 1] = True
    plan = BlockPlan.from_mask(mask[None, None], block_q=SIDE, block_k=SIDE, q_offset=0, kv_len=4 * SIDE)
    expected = dense.run(q.float(), k.float(), v.float(), plan, scaling=0.1)
    try:
        out = run(q, k, v, plan, scaling=0.1)
    except Exception as error:  # noqa: BLE001  an experimental compiler may raise anything
        return f"the Hopper kernel does not compile here: {type(error).__name__}"
    if not torch.allclose(out.float(), expected, rtol=1.6e-2, atol=1.6e-2):
        return "the Hopper kernel's numbers are wrong here"
    return ""


KERNEL = Kernel("hopper", run, refuses)
