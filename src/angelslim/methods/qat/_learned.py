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
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...numerics.lowbit.stretched import SMALLEST
from ...numerics.lowbit.tiles import kept
from ...numerics.scheme import Format
from ._quantizer import Quantizer, product_type
from ._straight import straight_through

TERNARY = Format("ternary", "int", 2, -1, 1)


def rounded(u: Tensor, grid: Format) -> Tensor:
    """Return the nearest code of each u in its own type."""
    if grid.kind == "int":
        return u.round().clamp_(grid.low, grid.high)
    assert grid.bits == 8
    return u.clamp(grid.low, grid.high).to(torch.float8_e4m3fn).to(u.dtype)


def stepped(tiles: Tensor, scale: Tensor, shift: Tensor | None, *, name: str, dtype: torch.dtype) -> Tensor:
    """Return ``a q + y`` in `dtype`; `name` is a key of `GRIDS`."""
    values = rounded(_position(tiles, scale, shift), GRIDS[name]).mul_(scale)
    if shift is not None:
        values.add_(shift)
    return values.to(dtype)


def stepped_slopes(
    tiles: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    grad: Tensor,
    *,
    name: str,
    asked: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of `stepped` to tiles, scale and shift, those of them that are `asked` for."""
    grid, grad = GRIDS[name], grad.to(tiles.dtype)
    u = _position(tiles, scale, shift)
    outside = (u < grid.low) | (u > grid.high)
    to_tiles = to_scale = to_shift = None
    if asked[0]:
        to_tiles = grad.masked_fill(outside, 0.0)
    if asked[1]:
        slope = rounded(u, grid).sub_(u.masked_fill_(outside, 0.0))
        to_scale = slope.mul_(grad).sum(-1, keepdim=True) / math.sqrt(tiles.numel() * grid.high)
    if shift is not None and asked[2]:
        to_shift = grad.sum(-1, keepdim=True)
    return to_tiles, to_scale, to_shift


class LearnedStep(torch.autograd.Function):
    """``a q + y`` for tiles ``[down, across, size]``, a and y ``[down, across, 1]`` in float32."""

    @staticmethod
    def forward(
        ctx: Any, tiles: Tensor, scale: Tensor, shift: Tensor | None, name: str, dtype: torch.dtype, run: Any
    ) -> Tensor:
        """Return the values in `dtype`; `name` is a key of `GRIDS`, `run` computes pure functions."""
        ctx.save_for_backward(tiles, scale, shift)
        ctx.name, ctx.run = name, run
        return cast(Tensor, run(stepped, tiles, scale, shift, name=name, dtype=dtype))

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        """Return the three gradients that are asked for."""
        tiles, scale, shift = ctx.saved_tensors
        asked = tuple(ctx.needs_input_grad[:3])
        found = ctx.run(stepped_slopes, tiles, scale, shift, grads[0], name=ctx.name, asked=asked)
        return *found, None, None, None


def _position(tiles: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """Return u, in a tensor of its own."""
    return tiles / scale if shift is None else (tiles - shift).div_(scale)


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
        """Return the scales as they will be stored, ``[down, across, 1]``; rounding them is the identity backward."""
        with torch.no_grad():
            stored = kept(self.scale.float().clamp(min=SMALLEST), self.scale_type)
        return straight_through(self.scale, stored)[..., None]

    def shifted(self) -> Tensor | None:
        """Return the shift of each tile ``[down, across, 1]``, where there is one."""
        return None

    def quantized(self, weight: Tensor) -> Tensor:
        """Return ``a q + y``."""
        values = LearnedStep.apply(  # type: ignore[no-untyped-call]
            self.tiles(weight), self.step(), self.shifted(), self.grid, product_type(weight), self.run
        )
        return cast(Tensor, values).view(weight.shape)
