"""From which length on sparse prefill is faster than dense, measured here and now.

Choosing blocks costs time of its own, so short prompts are faster dense; where the curves cross depends on the device, the
kernel, the heads and the selector. `find` times both at doubling lengths, with random tensors shaped like the model's, and
returns the first length that sparse wins. Random tensors say nothing about how many blocks a threshold would keep on real
text: for selectors whose density depends on the data, give a number instead.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...kernels.attention.base import Kernel
from .plan import Context, Selector

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
REPEATS = 3


def find(
    selector: Selector,
    kernel: Kernel,
    like: tuple[Tensor, Tensor, Tensor],
    ctx: Context,
    lengths: tuple[int, ...] = LENGTHS,
) -> int | None:
    """The first of `lengths` at which selector and kernel beat causal SDPA, or None; `ctx` names layer and block.

    `like` are q [B, H, Lq, D], k [B, Hkv, Lk, D] and v [B, Hkv, Lk, Dv] of any length: heads, widths, dtype and device count.
    """
    for length in lengths:
        q, k, v = (
            torch.randn(1, length, x.shape[1], x.shape[3], dtype=x.dtype, device=x.device).transpose(1, 2)
            for x in like
        )
        here = Context(ctx.layer, ctx.layers, ctx.scaling, 0, length, ctx.block)
        groups = q.shape[1] // k.shape[1]
        wide = (k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))

        def sparse(q: Tensor = q, k: Tensor = k, v: Tensor = v, here: Context = here) -> Tensor:
            return kernel.run(q, k, v, selector(q, k, v, here), scaling=here.scaling)

        def dense(q: Tensor = q, wide: tuple[Tensor, Tensor] = wide) -> Tensor:
            return scaled_dot_product_attention(q, wide[0], wide[1], is_causal=True, scale=ctx.scaling)

        with torch.no_grad():
            spent = milliseconds(sparse, q.device, "sparse", length)
            if spent < milliseconds(dense, q.device, "dense", length):
                return length
    return None


def milliseconds(run: Callable[[], Any], device: torch.device, what: str, length: int) -> float:
    """The median of a few runs after one that warms up; `what` and `length` say which, for whoever listens."""
    run()
    samples = []
    for _ in range(REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append(1000 * (time.perf_counter() - begun))
    return statistics.median(samples)
