"""Clipping: a smaller range than the largest weight's, where finer steps gain more than the clipped weights lose.

A tile's scale usually covers its largest magnitude. At four bits one outlier then makes the steps of a whole group
coarse. `clip_range` tries ranges that are shrunk by up to half (Lin et al. 2023, AWQ, arXiv 2306.00978, section 4),
coarsely first and then finely around the best, and keeps, for each tile alone, the one that loses least of the layer's output on the calibration inputs: with the
error ``E = W - Q`` of a tile ``[rows, columns]`` and the matching block of ``H = X^T X [in, in]``, the loss is
``Tr(E H E^T)``. The full range is among the candidates, so by this measure clipping never costs anything.

Asymmetric quantisers shrink both ends alike, and their zero point follows. What neighbouring tiles of a row lose
together (the blocks of H beside the diagonal) is left out: tiles are chosen independently of each other. H may also
be its diagonal ``[in]``, or None, which counts every weight's error alike.

All arithmetic is float32; the loss is taken with scales in the type in which they will be stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .products import for_comparing
from .quantize import BAND, outer_of, quantize, quantize_with, scales_from_range, tile_of, tile_range
from .scheme import PLAIN_SCALES, Quant

MAX_SHRINK = 0.5  # the smallest range that is tried, as a share taken off the full one
STEPS = 20
COARSE, FINER = 4, (2, 1)  # steps between the ranges that every tile tries, and around the best of them

Loss = Callable[[Tensor, Tensor | None], Tensor]  # of each tile, for scales and zero points


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
    than that of the full range, up to the digits of a loss. Scales that are tied along a row (``fp8_channel``) have a search of their own, which
    is used instead.
    """
    if quant.scale == "fp8_channel":
        plain = quantize(weight, quant, scale_dtype)
        return plain.scale, plain.zero
    low, high = tile_range(weight, quant.granularity)
    outer = outer_of(low, high, quant) if outer is None else outer
    if not in_rows(weight, quant) or quant.format.kind != "int":
        exact = weight.float()

        def lost(scale: Tensor, zero: Tensor | None) -> Tensor:
            return tile_loss(exact, scale, zero, quant, hessian)

        return _searched(low, high, quant, scale_dtype, outer, lost)
    columns = tile_of(quant.granularity, (weight.shape[0], weight.shape[1]))[1]
    blocks = None if hessian is None else for_comparing(_blocks(hessian, low.shape[1], columns))
    found = []
    for rows in bands(weight):
        strips = weight[rows].float().view(-1, low.shape[1], columns).transpose(0, 1).contiguous()
        found.append(
            _searched(
                low[rows], high[rows], quant, scale_dtype, outer, partial(_row_loss, strips, blocks, quant)
            )
        )
    zeros = [zero for _, zero in found if zero is not None]
    return torch.cat([scale for scale, _ in found]), torch.cat(zeros) if zeros else None


def _searched(
    low: Tensor, high: Tensor, quant: Quant, scale_dtype: torch.dtype, outer: Tensor | None, lost: Loss
) -> tuple[Tensor, Tensor | None]:
    """Try the full range, then coarse steps for all tiles, then finer ones around what each tile has found."""
    scale, zero = scales_from_range(low, high, quant, scale_dtype, outer)
    loss = lost(scale, zero)
    best = torch.zeros_like(loss)  # how much is taken off, in steps
    for distance in (COARSE, *FINER):
        around = best
        if distance == COARSE:
            tries = [torch.full_like(best, step) for step in range(COARSE, STEPS + 1, COARSE)]
        else:
            tries = [(around + side).clamp(0, STEPS) for side in (-distance, distance)]
        for steps in tries:
            left = 1 - MAX_SHRINK * steps / STEPS
            tried, offset = scales_from_range(low * left, high * left, quant, scale_dtype, outer)
            now = lost(tried, offset)
            better = now < loss
            loss, scale = torch.where(better, now, loss), torch.where(better, tried, scale)
            best = torch.where(better, steps, best)
            if zero is not None and offset is not None:
                zero = torch.where(better, offset, zero)
    return scale, zero


def _row_loss(
    strips: Tensor, blocks: Tensor | None, quant: Quant, scale: Tensor, zero: Tensor | None
) -> Tensor:
    """Return `tile_loss` of integers in runs of a row: strips ``[across, rows, columns]``, scales ``[rows, across]``.

    Errors are counted in steps, so that codes need not be multiplied out. Losses are compared, and a digit or two more
    than bfloat16's three make no difference there.
    """
    steps = scale.float().T[..., None]
    wanted = strips / steps
    if zero is not None:
        wanted += zero.float().T[..., None]
    if quant.format.centre:
        wanted -= quant.format.centre
    error = wanted.round().clamp_(quant.format.low, quant.format.high).sub_(wanted)
    if blocks is None:
        weighed = error
    elif blocks.shape[1] == 1:
        weighed = error * blocks
    else:
        weighed = (error.to(blocks.dtype) @ blocks).float()
    loss: Tensor = torch.linalg.vecdot(weighed, error) * steps[..., 0].square()
    return loss.T


def in_rows(weight: Tensor, quant: Quant) -> bool:
    """Whether every tile is a run of one row with a scale of its own choice."""
    shape = (weight.shape[0], weight.shape[1])
    return quant.scale in PLAIN_SCALES and quant.granularity.kind in ("group", "channel") and min(shape) > 0


def bands(weight: Tensor) -> Iterator[slice]:
    """Yield rows that fit a processor's cache together; accelerators get all rows."""
    step = max(BAND // weight.shape[1], 1) if weight.device.type == "cpu" else weight.shape[0]
    for start in range(0, weight.shape[0], step):
        yield slice(start, min(start + step, weight.shape[0]))


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
    blocks = _blocks(hessian, across, columns)
    return strips * blocks if blocks.shape[1] == 1 else strips @ blocks


def _blocks(hessian: Tensor, across: int, columns: int) -> Tensor:
    """Return the blocks of H on its diagonal ``[across, columns, columns]``, or their diagonals ``[across, 1, columns]``."""
    missing = across * columns - hessian.shape[-1]
    if hessian.dim() == 1:
        return F.pad(hessian.float(), (0, missing)).view(across, 1, columns)
    whole = hessian.float() if not missing else F.pad(hessian.float(), (0, missing, 0, missing))
    padded = whole.view(across, columns, across, columns)
    return padded.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
