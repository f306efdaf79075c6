"""Scales that are learned together with the weights (LSQ, arXiv 1902.08153).

With ``u = (W - y) / a`` and q the nearest code to u, clipped to [low, high], the layer computes with ``a q + y``; the
shift y is zero in all quantizers but one. Rounding counts as the identity, so that

* dL/dW is g where ``low <= u <= high`` and 0 elsewhere;
* dL/da is the sum over the tile of ``g (q - u)`` inside and ``g q`` outside, divided by ``sqrt(n * high)`` for the n
  weights of the layer, which brings the scale's steps to the size of the weights';
* dL/dy is the sum of g: the derivative at fixed codes.

Only the weight itself and the scale are kept for the backward pass, and both are parameters that are in memory anyway;
u and q are computed again.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from ...numerics.lowbit.stretched import SMALLEST
from ...numerics.lowbit.tiles import kept, tiled
from ...numerics.scheme import Format, Granularity
from ._formula import Formula
from ._quantizer import Quantizer, product_type

TERNARY = Format("ternary", "int", 2, -1, 1)


def rounded(u: Tensor, grid: Format) -> Tensor:
    """Return the nearest code of each u in its own type."""
    if grid.kind == "int":
        return u.round().clamp_(grid.low, grid.high)
    assert grid.bits == 8
    return u.clamp(grid.low, grid.high).to(torch.float8_e4m3fn).to(u.dtype)


def stepped(
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    *,
    grain: Granularity,
    name: str,
    storage: torch.dtype | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``a q + y`` in `dtype` of a weight ``[out, in]``; a and y are ``[down, across]``, `name` a key of `GRIDS`."""
    tiles, step, offset = _parts(weight, scale, shift, grain, storage)
    values = rounded(_position(tiles, step, offset), GRIDS[name]).mul_(step)
    if offset is not None:
        values.add_(offset)
    return values.to(dtype).view(weight.shape)


def stepped_slopes(
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    grad: Tensor,
    *,
    grain: Granularity,
    name: str,
    storage: torch.dtype | None,
    asked: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of `stepped` to weight, scale and shift, those of them that are `asked` for."""
    grid = GRIDS[name]
    tiles, step, offset = _parts(weight, scale, shift, grain, storage)
    grad = grad.to(tiles.dtype).reshape(tiles.shape)
    u = _position(tiles, step, offset)
    outside = (u < grid.low) | (u > grid.high)
    to_weight = to_scale = to_shift = None
    if asked[0]:
        to_weight = grad.masked_fill(outside, 0.0).view(weight.shape)
    if asked[1]:
        slope = rounded(u, grid).sub_(u.masked_fill_(outside, 0.0))
        to_scale = slope.mul_(grad).sum(-1) / math.sqrt(tiles.numel() * grid.high)
    if shift is not None and asked[2]:
        to_shift = grad.sum(-1)
    return to_weight, to_scale, to_shift


def stored_step(scale: Tensor, storage: torch.dtype | None) -> Tensor:
    """Return the scales as a file will hold them, in float32."""
    return kept(scale.float().clamp(min=SMALLEST), storage)


def _parts(
    weight: Tensor, scale: Tensor, shift: Tensor | None, grain: Granularity, storage: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return tiles ``[down, across, size]``, and steps and shifts ``[down, across, 1]`` as they will be stored."""
    offset = None if shift is None else kept(shift.float(), storage)[..., None]
    return tiled(weight, grain).float(), stored_step(scale, storage)[..., None], offset


def _position(tiles: Tensor, step: Tensor, shift: Tensor | None) -> Tensor:
    """Return u, in a tensor of its own."""
    return tiles / step if shift is None else (tiles - shift).div_(step)


GRIDS: dict[str, Format] = {
    "ternary": TERNARY,
    "fp8_e4m3": Format("fp8_e4m3", "float", 8, -448.0, 448.0),
    **{f"int{b}": Format(f"int{b}", "int", b, -(2 ** (b - 1)), 2 ** (b - 1) - 1) for b in range(2, 9)},
}


class LearnedScale(Quantizer):
    """A scale ``[down, across]`` in float32 for every tile, a parameter; `grid` is a key of `GRIDS`."""

    learned: tuple[str, ...] = ("scale",)
    grid: str
    scale: nn.Parameter

    def first_scale(self, tiles: Tensor) -> Tensor:
        """Return the scales that training begins with, ``[down, across, 1]``."""
        raise NotImplementedError

    def start(self, weight: Tensor) -> None:
        """Set the first scales."""
        super().start(weight)
        with torch.no_grad():
            first = self.first_scale(self.tiles(weight))[..., 0]
        self.scale = nn.Parameter(first.float().clamp(min=SMALLEST).contiguous())

    def step(self) -> Tensor:
        """Return the scales as they will be stored, ``[down, across, 1]``."""
        return stored_step(self.scale.detach(), self.scale_type)[..., None]

    def moved(self) -> nn.Parameter | None:
        """Return the shifts ``[down, across]``, where there are any."""
        return None

    def quantized(self, weight: Tensor) -> Tensor:
        """Return ``a q + y``."""
        back = {"grain": self.granularity, "name": self.grid, "storage": self.scale_type}
        settings = {**back, "dtype": product_type(weight)}
        formula = Formula(stepped, settings, stepped_slopes, back, keeps=(0, 1, 2))
        return cast(Tensor, self.compute(formula, weight, self.scale, self.moved()))
