"""Clipping: a smaller range than the largest weight's, where finer steps gain more than the clipped weights lose.

A tile's scale usually covers its largest magnitude. At four bits one outlier then makes the steps of a whole group
coarse. `clip_range` tries ranges that are shrunk by up to half (Lin et al. 2023, AWQ, arXiv 2306.00978, section 4)
and keeps, for each tile alone, the one that loses least of the layer's output on the calibration inputs: with the
error ``E = W - Q`` of a tile ``[rows, columns]`` and the matching block of ``H = X^T X [in, in]``, the loss is
``Tr(E H E^T)``. The full range is among the candidates, so by this measure clipping never costs anything.

Asymmetric quantisers shrink both ends alike, and their zero point follows. What neighbouring tiles of a row lose
together (the blocks of H beside the diagonal) is left out: tiles are chosen independently of each other. H may also
be its diagonal ``[in]``, or None, which counts every weight's error alike.

All arithmetic is float32; the loss is taken with scales in the type in which they will be stored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantize import outer_of, quantize, quantize_with, scales_from_range, tile_of, tile_range
from .scheme import Quant

MAX_SHRINK = 0.5  # the smallest range that is tried, as a share taken off the full one
STEPS = 20


def clip_range(
    weight: Tensor,
    quant: Quant,
    hessian: Tensor | None,
    scale_dtype: torch.dtype = torch.float32,
    outer: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return (scale, zero) ``[tiles down, tiles across]`` of the best range of each tile of ``[out, in]``.

    `hessian` is H ``[in, in]``, its diagonal ``[in]``, or None; `outer` that of `quantize.outer_of`, if it is shared
    between tensors. The result is that of `quantize.scales_from_range` for the ranges found, and never loses more
    than that of the full range. Scales that are tied along a row (``fp8_channel``) have a search of their own, which
    is used instead.
    """
    if quant.scale == "fp8_channel":
        plain = quantize(weight, quant, scale_dtype)
        return plain.scale, plain.zero
    low, high = tile_range(weight, quant.granularity)
    outer = outer_of(low, high, quant) if outer is None else outer
    scale, zero = scales_from_range(low, high, quant, scale_dtype, outer)
    exact = weight.float()
    loss = tile_loss(exact, scale, zero, quant, hessian)
    for step in range(1, STEPS + 1):
        left = 1 - MAX_SHRINK * step / STEPS
        tried, offset = scales_from_range(low * left, high * left, quant, scale_dtype, outer)
        lost = tile_loss(exact, tried, offset, quant, hessian)
        better = lost < loss
        loss, scale = torch.where(better, lost, loss), torch.where(better, tried, scale)
        if zero is not None and offset is not None:
            zero = torch.where(better, offset, zero)
    return scale, zero


def tile_loss(
    weight: Tensor, scale: Tensor, zero: Tensor | None, quant: Quant, hessian: Tensor | None
) -> Tensor:
    """Return what each tile loses of the output when it is rounded to nearest: ``[tiles down, tiles across]``."""
    rows, columns = tile_of(quant.granularity, (weight.shape[0], weight.shape[1]))
    down, across = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    error = weight - quantize_with(weight, scale, zero, quant).dequantize()
    error = F.pad(error, (0, across * columns - weight.shape[1], 0, down * rows - weight.shape[0]))
    strips = error.view(down * rows, across, columns).transpose(0, 1)  # [across, rows of all tiles, columns]
    squares = (strips * _weighed(strips, hessian)).sum(-1)  # [across, rows of all tiles]
    return squares.view(across, down, rows).sum(-1).T


def _weighed(strips: Tensor, hessian: Tensor | None) -> Tensor:
    """Multiply strips of columns ``[across, rows, columns]`` with their blocks of H on the diagonal."""
    if hessian is None:
        return strips
    across, _, columns = strips.shape
    missing = across * columns - hessian.shape[-1]
    if hessian.dim() == 1:
        return strips * F.pad(hessian.float(), (0, missing)).view(across, 1, columns)
    padded = F.pad(hessian.float(), (0, missing, 0, missing)).view(across, columns, across, columns)
    return strips @ padded.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
