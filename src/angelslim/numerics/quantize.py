"""Scales, codes and back: the arithmetic that every quantization method shares.

Every granularity is a *tile*: per-tensor is one tile, per-channel a tile of ``1 x in``, per-group ``1 x g``,
per-block ``r x c``. One reduction over tiles gives the scales and one repeat brings them back, so there is a
single code path to trust. All arithmetic is float32; codes are int8 (integer formats, also 4 bit) or
``float8_e4m3fn``; scales keep one element per tile: ``[ceil(out / r), ceil(in / c)]``.

Integer scales divide the range by ``2^b - 1`` steps (symmetric: ``amax / ((2^b - 1) / 2)``), which is the
convention of compressed-tensors; float scales divide by the largest code, 448 for E4M3 and 6 for E2M1. Scales that
are small numbers themselves (MXFP4, NVFP4, ...) are rounded by `scales`; what codes are multiplied with is a float
all the same. FP4 codes are kept as E4M3 numbers, which hold all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.errors import SchemeError
from . import channel_scales
from .scales import SCALE_BITS, half_range, outer_scale, stored_scales
from .scheme import PLAIN_SCALES, Format, Granularity, Quant

BAND = 1 << 17  # values that are rounded at a time
TINY = torch.finfo(torch.float32).tiny
STORAGE = {"int": torch.int8, "float": torch.float8_e4m3fn}
SCALE_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}  # scales of no other type


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix: codes ``[out, in]``, scale and zero ``[tiles down, tiles across]``.

    NVFP4's scales are float32 factors here too; `global_scale` ``[1, 1]`` is what the stored ones are divided by.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    quant: Quant
    global_scale: Tensor | None = None

    def dequantize(self) -> Tensor:
        """Return the float32 matrix that the codes stand for."""
        return dequantize(self.codes, self.scale, self.zero, self.quant)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight, scales and zero points included."""
        bits = self.codes.numel() * self.quant.format.stored_bits
        bits += self.scale.numel() * SCALE_BITS.get(self.quant.scale, self.scale.itemsize * 8)
        bits += self.zero.numel() * self.quant.format.bits if self.zero is not None else 0
        bits += 32 if self.global_scale is not None else 0
        return bits / self.codes.numel()


def tile_of(granularity: Granularity, shape: tuple[int, int]) -> tuple[int, int]:
    """Return the tile (rows, columns) whose elements share a scale, for a matrix of `shape`.

    >>> from .scheme import PER_CHANNEL, per_group
    >>> tile_of(PER_CHANNEL, (8, 64)), tile_of(per_group(32), (8, 64))
    ((1, 64), (1, 32))
    """
    rows, columns = shape
    if granularity.kind == "tensor":
        return rows, columns
    if granularity.kind in ("channel", "token"):
        return 1, columns
    if granularity.kind == "group":
        if columns % granularity.columns:
            raise SchemeError(
                f"Input size {columns} is not a multiple of the group size {granularity.columns}.",
                fix="Choose a group size that divides it, use -1 (per channel), or add the layer to ignore_layers.",
            )
        return 1, granularity.columns
    return granularity.rows, granularity.columns


def _tiled(matrix: Tensor, tile: tuple[int, int]) -> Tensor:
    """View as ``[tiles down, rows, tiles across, columns]``, zero-padded at the ragged edges."""
    rows, columns = tile
    down, across = -(-matrix.shape[0] // rows), -(-matrix.shape[1] // columns)
    pad = (0, across * columns - matrix.shape[1], 0, down * rows - matrix.shape[0])
    padded = F.pad(matrix, pad) if any(pad) else matrix
    return padded.reshape(down, rows, across, columns)


def spread(per_tile: Tensor, tile: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Repeat one value per tile over the tile's elements: ``[down, across] -> shape``."""
    rows, columns = tile
    if per_tile.numel() == 1:
        return per_tile.expand(shape)
    if rows > 1:
        per_tile = per_tile.repeat_interleave(rows, 0)[: shape[0]]
    if columns >= shape[1]:
        return per_tile.expand(shape)
    return per_tile.repeat_interleave(columns, 1)[:, : shape[1]]


def tile_range(matrix: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest value of each tile, zero always included, in float32."""
    tiles = _tiled(matrix, tile_of(granularity, (matrix.shape[0], matrix.shape[1])))
    low, high = tiles.amin(dim=(1, 3)), tiles.amax(dim=(1, 3))
    return low.float().clamp(max=0), high.float().clamp(min=0)


def outer_of(low: Tensor, high: Tensor, quant: Quant) -> Tensor | None:
    """Return what the scales of these ranges have in common, to pass on as `outer`; None for one-level scales."""
    return outer_scale(torch.maximum(-low, high), quant)


def scales_from_range(
    low: Tensor,
    high: Tensor,
    quant: Quant,
    scale_dtype: torch.dtype = torch.float32,
    outer: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return (scale in `scale_dtype`, zero) that cover [low, high]; a range of zero width gets the scale 1.

    The zero point is the integer code of the real number 0, chosen for the scale as it will be stored;
    symmetric schemes have none. Scales are divided in float64: GPUs multiply by a rounded reciprocal
    otherwise, and every device shall find the same scales.

    Where `quant.scale` is not free it decides the scales' type, and `outer` is that of `outer_of`: given by who
    compares several ranges of one tensor, or shares it between tensors.
    """
    grid = quant.format
    if quant.scale not in PLAIN_SCALES:
        return stored_scales(torch.maximum(-low, high), quant, outer), None
    kept = SCALE_TYPES.get(quant.scale, scale_dtype)
    if quant.symmetric:
        return _safe(torch.maximum(-low, high).double() / half_range(grid), scale_dtype, kept), None
    scale = _safe((high - low).double() / (grid.high - grid.low), scale_dtype, kept)
    zero = (grid.low - low / scale.float()).round().clamp(grid.low, grid.high)
    return scale, zero.to(torch.int8)


def scale_type(quant: Quant, dtype: torch.dtype) -> torch.dtype:
    """Return the type that scales of a weight of type `dtype` are rounded to: its own where engines keep them so."""
    return dtype if quant.format.bits < 8 or quant.scale in SCALE_TYPES else torch.float32


def _safe(scale: Tensor, dtype: torch.dtype, kept: torch.dtype) -> Tensor:
    """Round scales to numbers that both types hold, so that an engine may load the one as the other."""
    rounded = scale.to(dtype).to(kept)
    return torch.where(rounded > TINY, rounded, torch.ones_like(rounded))


def round_to(values: Tensor, grid: Format) -> Tensor:
    """Round to the nearest code (ties to even) and clamp to the format's limits."""
    if grid.kind == "int":
        return values.round().clamp(grid.low, grid.high).to(STORAGE["int"])
    values = values.clamp(grid.low, grid.high)
    return (_nearest_fp4(values) if grid.bits == 4 else values).to(STORAGE["float"])


def _nearest_fp4(values: Tensor) -> Tensor:
    """Round to 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives: one mantissa bit, ties to the even one."""
    size = values.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (values / step).round() * step


def quantize_with(
    matrix: Tensor, scale: Tensor, zero: Tensor | None, quant: Quant, global_scale: Tensor | None = None
) -> Quantized:
    """Quantize a ``[rows, columns]`` matrix with scales that are already known."""
    shape = (matrix.shape[0], matrix.shape[1])
    tile = tile_of(quant.granularity, shape)
    codes = torch.empty(shape, dtype=STORAGE[quant.format.kind], device=matrix.device)
    for rows, tiles in _bands(matrix, tile):
        part = (rows.stop - rows.start, shape[1])
        scaled = matrix[rows].float() / spread(scale[tiles].float(), tile, part)
        if zero is not None:
            scaled += spread(zero[tiles].float(), tile, part)
        if quant.format.centre:
            scaled -= quant.format.centre
        codes[rows] = round_to(scaled, quant.format)
    return Quantized(codes, scale, zero, quant, global_scale)


def _bands(matrix: Tensor, tile: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Yield bands of whole tiles as (rows, rows of tiles), small enough for a processor's cache.

    What is computed in between is then never written to memory, and never asked of the system. Accelerators get
    one band: each costs them a launch.
    """
    count, columns = matrix.shape
    step = max(BAND // max(columns, 1) // tile[0], 1) * tile[0] if matrix.device.type == "cpu" else count
    for start in range(0, count, max(step, 1)):
        stop = min(start + step, count)
        yield slice(start, stop), slice(start // tile[0], -(-stop // tile[0]))


def quantize(
    matrix: Tensor,
    quant: Quant,
    scale_dtype: torch.dtype = torch.float32,
    global_scale: Tensor | None = None,
) -> Quantized:
    """Round a ``[rows, columns]`` matrix to nearest under `quant`.

    Scales are rounded to `scale_dtype`, or to what `quant.scale` says, *before* the codes are chosen, so that an
    engine which keeps its scales in that type computes with exactly the numbers that were optimised here.
    `global_scale` ``[1, 1]`` is NVFP4's, where it is shared or was calibrated.
    """
    low, high = tile_range(matrix, quant.granularity)
    if quant.scale == "fp8_channel":
        scale = channel_scales.search(
            torch.maximum(-low, high).double() / half_range(quant.format),
            lambda tried: _tile_error(matrix, tried, quant),
        )
        return quantize_with(matrix, scale, None, quant)
    outer = outer_of(low, high, quant) if global_scale is None else global_scale
    scale, zero = scales_from_range(low, high, quant, scale_dtype, outer)
    return quantize_with(matrix, scale, zero, quant, outer)


def _tile_error(matrix: Tensor, scale: Tensor, quant: Quant) -> Tensor:
    """Return the sum of squared rounding errors of each tile, ``[tiles down, tiles across]``."""
    error = matrix.float() - quantize_with(matrix, scale, None, quant).dequantize()
    tile = tile_of(quant.granularity, (matrix.shape[0], matrix.shape[1]))
    return _tiled(error.square_(), tile).sum(dim=(1, 3))


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, quant: Quant) -> Tensor:
    """Return ``(codes - zero + centre) * scale`` in float32."""
    shape = (codes.shape[0], codes.shape[1])
    tile = tile_of(quant.granularity, shape)
    values = torch.empty(shape, dtype=torch.float32, device=codes.device)
    for rows, tiles in _bands(codes, tile):
        part = (rows.stop - rows.start, shape[1])
        band = codes[rows].float()
        if zero is not None:
            band -= spread(zero[tiles].float(), tile, part)
        if quant.format.centre:
            band += quant.format.centre
        torch.mul(band, spread(scale[tiles].float(), tile, part), out=values[rows])
    return values


def fake_quantize(values: Tensor, quant: Quant, scale: Tensor | None = None) -> Tensor:
    """Quantize and return to the dtype of `values` ``[..., in]``: what a quantized engine multiplies with.

    Dynamic schemes take their scales from `values` itself; static ones need `scale`. NVFP4 does both: `scale` is
    its global one, the groups' are computed.
    """
    if not values.numel():
        return values  # an expert that no token was sent to
    matrix = values.reshape(-1, values.shape[-1])
    if scale is None or quant.scale == "e4m3":
        quantized = quantize(matrix, quant, global_scale=scale)
    else:
        quantized = quantize_with(matrix, scale, None, quant)
    return quantized.dequantize().to(values.dtype).reshape(values.shape)
