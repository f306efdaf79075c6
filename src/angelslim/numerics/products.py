"""Matrix products on processors with bfloat16 instructions: several times faster, and exact where factors are bfloat16.

Such a processor multiplies bfloat16 numbers and adds up in float32. That is *exact* up to the order of the sum when both
factors are bfloat16 numbers already, as the activations of most models are: the squares of inputs, ``X^T X``, lose
nothing (`add_squares`). Where factors have more digits the product's error is about ``2^-9`` of each term, at random:
too much for a Hessian that will be inverted, nothing for the sum of a hundred thousand squares that candidates are
compared by (`bfloat16_factors`).

CPU code is made and kept for each shape, so shapes that change from call to call would cost time and memory.

Other processors and accelerators compute as ever: the switch is that of PyTorch's CPU library alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

PANELS = 8  # strips in which the upper half of a symmetric sum is accumulated
NARROWEST = 64  # columns of a strip


@cache
def _fast() -> bool:
    """Say whether this processor multiplies bfloat16 numbers by itself."""
    known = (
        getattr(torch.cpu, "_is_avx512_bf16_supported", None),
        getattr(torch.cpu, "_is_amx_tile_supported", None),
    )
    return hasattr(torch.backends.mkldnn, "matmul") and any(each is not None and each() for each in known)


@contextmanager
def bfloat16_factors(allowed: bool = True) -> Iterator[None]:
    """Let float32 products on the processor round their factors to bfloat16 where that is faster; sums are float32."""
    if not (allowed and _fast()):
        yield
        return
    switch: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009  untyped
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


def add_squares(sums: Tensor, inputs: Tensor) -> None:
    """Add ``X^T X`` of ``[tokens, in]`` to the upper half of float32 sums ``[in, in]``; `mirrored` has both halves.

    The lower half is the upper one's mirror image: nearly half of the work is spared.
    """
    exact = inputs.dtype == torch.bfloat16
    values, width = inputs.float(), len(sums)
    panel = max(-(-width // PANELS), NARROWEST)
    with bfloat16_factors(exact):
        for start in range(0, width, panel):
            stop = start + panel
            sums[start:stop, start:].addmm_(values[:, start:stop].T, values[:, start:])


def mirrored(sums: Tensor) -> Tensor:
    """Return the symmetric matrix whose upper half `add_squares` has summed up."""
    whole = sums.triu()
    return whole.add_(whole.triu(1).T)
