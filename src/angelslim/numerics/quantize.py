"""Scales, codes and back: the arithmetic that every quantization method shares.

Every granularity is a *tile*: per-tensor is one tile, per-channel a tile of ``1 x in``, per-group ``1 x g``,
per-block ``r x c``. One reduction over tiles gives the scales and one repeat brings them back, so there is a
single code path to trust. All arithmetic is float32; codes are int8 (integer formats, also 4 bit) or
``float8_e4m3fn``; scales keep one element per tile: ``[ceil(out / r), ceil(in / c)]``.

Integer scales divide the range by ``2^b - 1`` steps (symmetric: ``amax / ((2^b - 1) / 2)``), which is the
convention of compressed-tensors; float scales divide by the largest code, 448 for E4M3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.errors import SchemeError
from .scheme import Format, Granularity, Quant

TINY = torch.finfo(torch.float32).tiny
STORAGE = {"int": torch.int8, "float": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix: codes ``[out, in]``, scale and zero ``[tiles down, tiles across]``."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    quant: Quant

    def dequantize(self) -> Tensor:
        """Return the float32 matrix that the codes stand for."""
        return dequantize(self.codes, self.scale, self.zero, self.quant)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight, scales and zero points included."""
        bits = self.codes.numel() * self.quant.format.bits + self.scale.numel() * self.scale.itemsize * 8
        bits += self.zero.numel() * self.quant.format.bits if self.zero is not None else 0
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


def scales_from_range(
    low: Tensor, high: Tensor, quant: Quant, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None]:
    """Return (scale in `scale_dtype`, zero) that cover [low, high]; a range of zero width gets the scale 1.

    The zero point is the integer code of the real number 0, chosen for the scale as it will be stored;
    symmetric schemes have none. Scales are divided in float64: GPUs multiply by a rounded reciprocal
    otherwise, and every device shall find the same scales.
    """
    grid = quant.format
    if quant.symmetric:
        half_range = grid.high if grid.kind == "float" else (grid.high - grid.low) / 2
        return _safe(torch.maximum(-low, high).double() / half_range, scale_dtype), None
    scale = _safe((high - low).double() / (grid.high - grid.low), scale_dtype)
    zero = (grid.low - low / scale.float()).round().clamp(grid.low, grid.high)
    return scale, zero.to(torch.int8)


def _safe(scale: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = scale.to(dtype)
    return torch.where(rounded > TINY, rounded, torch.ones_like(rounded))


def round_to(values: Tensor, grid: Format) -> Tensor:
    """Round to the nearest code (ties to even) and clamp to the format's limits."""
    if grid.kind == "float":
        return values.clamp(grid.low, grid.high).to(STORAGE["float"])
    return values.round().clamp(grid.low, grid.high).to(STORAGE["int"])


def quantize_with(matrix: Tensor, scale: Tensor, zero: Tensor | None, quant: Quant) -> Quantized:
    """Quantize a ``[rows, columns]`` matrix with scales that are already known."""
    shape = (matrix.shape[0], matrix.shape[1])
    tile = tile_of(quant.granularity, shape)
    scaled = matrix.float() / spread(scale.float(), tile, shape)
    if zero is not None:
        scaled += spread(zero.float(), tile, shape)
    return Quantized(round_to(scaled, quant.format), scale, zero, quant)


def quantize(matrix: Tensor, quant: Quant, scale_dtype: torch.dtype = torch.float32) -> Quantized:
    """Round a ``[rows, columns]`` matrix to nearest under `quant`.

    Scales are rounded to `scale_dtype` *before* the codes are chosen, so that an engine which keeps its scales
    in that type computes with exactly the numbers that were optimised here.
    """
    low, high = tile_range(matrix, quant.granularity)
    scale, zero = scales_from_range(low, high, quant, scale_dtype)
    return quantize_with(matrix, scale, zero, quant)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, quant: Quant) -> Tensor:
    """Return ``(codes - zero) * scale`` in float32."""
    shape = (codes.shape[0], codes.shape[1])
    tile = tile_of(quant.granularity, shape)
    values = codes.float()
    if zero is not None:
        values = values - spread(zero.float(), tile, shape)
    return values * spread(scale.float(), tile, shape)


def fake_quantize(values: Tensor, quant: Quant, scale: Tensor | None = None) -> Tensor:
    """Quantize and return to the dtype of `values` ``[..., in]``: what a quantized engine multiplies with.

    Dynamic schemes take their scales from `values` itself; static ones need `scale`.
    """
    matrix = values.reshape(-1, values.shape[-1])
    quantized = quantize(matrix, quant) if scale is None else quantize_with(matrix, scale, None, quant)
    return quantized.dequantize().to(values.dtype).reshape(values.shape)
