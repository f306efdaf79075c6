"""Group scales that are small numbers themselves: rounded to what is stored before any code is chosen.

A scale for every 16 or 32 values is too many to keep in 16 bits, so it becomes a byte:

* **E8M0** (OCP Microscaling 1.0, arXiv 2310.10537): a power of two, stored as its exponent plus 127. The group's
  largest magnitude a gives ``2^(floor(log2 a) - e)`` with e the exponent of the format's largest code (2 for FP4,
  8 for FP8), one more where a is at least 1.75 times a power of two, since it would round past the top otherwise.
* **E4M3** (NVFP4): an FP8 number over one float32 number G for the whole tensor, ``G = 448 * 6 / max |W|``, so that
  the largest group scale is 448. The factor of a group is ``fp8(G a / 6) / G``. G is stored as it is here, to be
  divided by. It serves several tensors where engines fuse them.
* **FP8 times a channel factor** (INT4 weights with FP8 inputs): see `channel_scales`.

These are the conventions of compressed-tensors, zero groups included (the smallest power of two; 1/8 over G).
Whatever is stored, a *scale* in this package is the float32 factor ``[out, groups]`` that codes are multiplied
with; `e8m0_bytes`, `e4m3_numbers` and their inverses are exact for such factors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import channel_scales
from .scheme import Format, Quant

FP8_MAX = 448.0
EMPTY_GROUP = 0.125  # the E4M3 number of a group whose scale would round to zero
SCALE_BITS = {"e8m0": 8, "e4m3": 8}  # where a scale is stored in less than its own type


def half_range(grid: Format) -> float:
    """Return the magnitude, in steps, that a symmetric scale maps the largest value to."""
    return grid.high if grid.kind == "float" else (grid.high - grid.low) / 2


def outer_scale(amax: Tensor, quant: Quant) -> Tensor | None:
    """Return what the group scales of a tensor have in common, from the groups' largest magnitudes.

    That is G ``[1, 1]`` for ``e4m3`` and the channels' factors ``[out, 1]`` for ``fp8_channel``; nothing otherwise.
    """
    if quant.scale == "e4m3":
        return global_scale(amax, quant)
    if quant.scale == "fp8_channel":
        return channel_scales.factors(amax.double() / half_range(quant.format))
    return None


def global_scale(amax: Tensor, quant: Quant) -> Tensor:
    """Return NVFP4's G ``[1, 1]`` in float32 for tensors whose largest magnitudes are `amax`; 1 for zeros."""
    found = (FP8_MAX * quant.format.high / amax.max().double()).float().reshape(1, 1)
    return torch.where(found.isfinite(), found, torch.ones_like(found))


def stored_scales(amax: Tensor, quant: Quant, outer: Tensor | None = None) -> Tensor:
    """Return the factors ``[out, groups]`` of groups with these largest magnitudes, as they will be stored.

    `outer` is that of `outer_scale`, where it is known from other tensors or from the unclipped one.
    """
    if quant.scale == "e8m0":
        return from_e8m0(_exponents(amax, quant.format))
    outer = outer_scale(amax, quant) if outer is None else outer
    assert outer is not None
    exact = amax.double() / half_range(quant.format)
    if quant.scale == "fp8_channel":
        return channel_scales.nearest(exact, outer)
    numbers = (exact * outer.double()).clamp(max=FP8_MAX).to(torch.float8_e4m3fn).float()
    return torch.where(numbers == 0, EMPTY_GROUP, numbers) / outer


def _exponents(amax: Tensor, grid: Format) -> Tensor:
    """Return the biased exponents, int32 in 0..254, from the bits of the magnitudes."""
    quarter = 1 << 21  # of a mantissa: from 1.75 on the sum reaches the next power of two
    exponent = (amax.float().view(torch.int32) + quarter) >> 23
    return (exponent - (2 if grid.bits == 4 else 8)).clamp(0, 254)


def from_e8m0(exponents: Tensor) -> Tensor:
    """Return ``2^(exponent - 127)`` in float32; 0 stands for 2^-127, which is a subnormal number."""
    bits = exponents.to(torch.int32)
    return torch.where(bits > 0, bits << 23, 1 << 22).to(torch.int32).view(torch.float32)


def e8m0_bytes(scale: Tensor) -> Tensor:
    """Undo `from_e8m0`: powers of two in float32 -> uint8."""
    return (scale.float().contiguous().view(torch.int32) >> 23).to(torch.uint8)


def from_e4m3(numbers: Tensor, outer: Tensor) -> Tensor:
    """Return the factors of stored E4M3 numbers over G."""
    return numbers.float() / outer.float().reshape(1, 1)


def e4m3_numbers(scale: Tensor, outer: Tensor) -> Tensor:
    """Undo `from_e4m3`: the quotient is off by half a last place at most, the numbers are 2^20 times coarser."""
    return (scale.float() * outer).to(torch.float8_e4m3fn)
