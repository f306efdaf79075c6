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
    """Round float32 scales to the type in which they will be stored, and return them in float32.

    Files hold scales in 16 bits. Rounding them while the model trains is what makes the exported weights the trained
    ones. None leaves them as they are.
    """
    return scale if dtype is None else scale.to(dtype).to(scale.dtype)
