"""FlexAttention, compiled: the portable kernel, for CPUs and for GPUs.

PyTorch's FlexAttention visits only the listed blocks and masks only the diagonal ones. It is always compiled: without
compilation it holds the whole score matrix and, worse, ignores the lists and applies the mask alone. PyTorch would fall
back to that without an error after eight compilations of one function, so a whole graph is demanded and the limit is
raised. The first call of a process compiles for several seconds, the second length once more, then any length runs; other
widths, blocks and numbers of heads are compiled when they come. On a CPU it needs a C++ compiler and AVX2, and computes no
gradients.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .base import Case, Kernel, check
from .blocks import BlockPlan

COMPILATIONS = 256


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True)


@functools.cache
def _missing_on_cpu() -> str:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "FlexAttention on a CPU needs AVX2"
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "FlexAttention on a CPU needs a C++ compiler"
    return ""


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
    """See `base.Run`."""
    check(q, k, v, plan)
    options: dict[str, int] = {}
    if q.device.type == "cuda" and min(plan.block_q, plan.block_k) < 128:  # tiles have to divide the blocks
        options = {"BLOCK_M": min(plan.block_q, 128), "BLOCK_N": min(plan.block_k, 64)}
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=COMPILATIONS):
        out: Tensor = _compiled()(
            q,
            k,
            v,
            block_mask=plan.to_block_mask(kv_start, kv_stop),
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
            kernel_options=options or None,
        )
    return out


def refuses(case: Case) -> str:
    """Why FlexAttention cannot compute the case."""
    if case.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"FlexAttention does not compute in {case.dtype}"
    if case.device.type == "cpu":
        return _missing_on_cpu()
    if case.device.type != "cuda":
        return f"FlexAttention is not used on {case.device.type}"
    if min(case.head_dim, case.value_dim) < 16:
        return "FlexAttention needs head dimensions of 16 and more on a GPU"
    if min(case.block_q, case.block_k) < 16 or (case.block_q | case.block_k) % 16:
        return "FlexAttention needs blocks that are multiples of 16"
    return ""


KERNEL = Kernel("flex", run, refuses)
