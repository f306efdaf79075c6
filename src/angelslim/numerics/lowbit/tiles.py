"""Weights as tiles, so that one reduction and one product serve every granularity.

A weight ``[out, in]`` is viewed as ``[down, across, size]``, and what the elements of a tile share as
``[down, across, 1]``:

===========  ======================
per tensor   ``[1, 1, out * in]``
per channel  ``[out, 1, in]``
per group g  ``[out, in / g, g]``
===========  ======================

It is a view: nothing is copied, and both directions are free. A group size that does not divide the input size is a
`SchemeError`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantize import tile_of
from ..scheme import Granularity

GRANULARITIES = ("tensor", "channel", "group")
_SPARE_BITS = {torch.float16: 13, torch.bfloat16: 16}  # of a float32 mantissa


def shape_of(shape: tuple[int, int], granularity: Granularity) -> tuple[int, int, int]:
    """Return (down, across, size) of a weight of `shape`.

    >>> from ..scheme import PER_TENSOR, per_group
    >>> shape_of((8, 64), PER_TENSOR), shape_of((8, 64), per_group(32))
    ((1, 1, 512), (8, 2, 32))
    """
    assert granularity.kind in GRANULARITIES, granularity
    rows, columns = tile_of(granularity, shape)
    return shape[0] // rows, shape[1] // columns, rows * columns


def tiled(weight: Tensor, granularity: Granularity) -> Tensor:
    """View a weight ``[out, in]`` as ``[down, across, size]``."""
    return weight.reshape(shape_of((weight.shape[0], weight.shape[1]), granularity))


def by_row(per_tile: Tensor, rows: int) -> Tensor:
    """Return one value per tile as ``[rows, tiles of a row]``: a tensor's one value is repeated for each row."""
    flat = per_tile.reshape(per_tile.shape[0], -1)
    return flat.expand(rows, -1).contiguous()


def kept(scale: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Round float32 numbers to float16 or bfloat16, in which they will be stored, and return them in float32.

    Files hold scales in 16 bits. Rounding them while the model trains is what makes the exported weights the trained
    ones. None leaves them as they are. Numbers beyond the largest half (65504) are not meant.

    It is written with the bits of the numbers, ties to even, since ``scale.to(dtype).float()`` does not survive a
    compiler: torch.compile takes such a pair of casts for one that changes nothing, and trains other weights.
    """
    if dtype is None:
        return scale
    assert scale.dtype == torch.float32
    spare = _SPARE_BITS[dtype]
    bits = scale.view(torch.int32)
    odd = (bits >> spare) & 1
    rounded = ((bits + (1 << spare - 1) - 1 + odd) & -(1 << spare)).view(torch.float32)
    if dtype == torch.float16:
        # Below its smallest normal number half has equal steps.
        return torch.where(scale.abs() < 2.0**-14, (scale * 2.0**24).round() * 2.0**-24, rounded)
    return rounded
