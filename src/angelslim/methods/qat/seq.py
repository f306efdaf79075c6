"""SEQ (ParetoQ, arXiv 2502.02631): stretched levels with a learned range, for two bits and for ternary weights.

The levels divide the range ``[-a, a]`` of a tile evenly (`numerics.lowbit.stretched`), a starts as the largest magnitude
and is learned. With ``u = w / a``, q the level over a and the clip at 0.99:

* dL/dW is g where ``|u| <= 0.99`` and 0 elsewhere;
* dL/da is the sum over the tile of ``g (q - u)`` inside and ``g q`` outside, over the square root of the number of
  weights in the layer.

The published code takes 1 instead of q = 2/3 for clipped ternary weights, which is not the level that it emits;
`gradient: published` does the same, the default is the derivative of what is emitted. Two bits are not affected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ...numerics.lowbit.record import LowBit
from ...numerics.lowbit.stretched import CLIP, SMALLEST, STRETCHES, first_span, step_of, stretched
from ...numerics.lowbit.tiles import by_row, kept
from ._options import choice, width
from ._quantizer import COMMON, Quantizer, product_type

Levels = Literal["ternary", "seq2"]


def stretched_values(
    tiles: Tensor, span: Tensor, *, levels: Levels, storage: torch.dtype | None, dtype: torch.dtype
) -> Tensor:
    """Return the weights in `dtype`; `storage` is the type of the steps."""
    stretch = STRETCHES[levels]
    return stretched(tiles, span, stretch)[1].mul_(kept(step_of(span, stretch), storage)).to(dtype)


def stretched_slopes(
    tiles: Tensor, span: Tensor, grad: Tensor, *, levels: Levels, edge: float | None, asked: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients to tiles and ranges; `edge` replaces the slope of clipped weights."""
    grad, stretch = grad.to(tiles.dtype), STRETCHES[levels]
    u, slope = stretched(tiles, span, stretch)
    outside = u.abs() > CLIP
    to_tiles = grad.masked_fill(outside, 0.0) if asked[0] else None
    to_span = None
    if asked[1]:
        slope.div_(stretch.steps)
        if edge is not None:
            slope = torch.where(outside, u.sign() * edge, slope)
        slope.sub_(u.masked_fill_(outside, 0.0))
        to_span = slope.mul_(grad).sum(-1, keepdim=True) / math.sqrt(tiles.numel())
    return to_tiles, to_span


class Stretched(torch.autograd.Function):
    """Stretched levels of tiles ``[down, across, size]`` with ranges ``[down, across, 1]``."""

    @staticmethod
    def forward(
        ctx: Any,
        tiles: Tensor,
        span: Tensor,
        levels: Levels,
        edge: float | None,
        storage: torch.dtype | None,
        dtype: torch.dtype,
        run: Any,
    ) -> Tensor:
        """Return the weights; `run` computes pure functions."""
        ctx.save_for_backward(tiles, span)
        ctx.levels, ctx.edge, ctx.run = levels, edge, run
        return cast(Tensor, run(stretched_values, tiles, span, levels=levels, storage=storage, dtype=dtype))

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        """Return the gradients of weights and ranges; levels are computed again."""
        asked = tuple(ctx.needs_input_grad[:2])
        tiles, span = ctx.saved_tensors
        found = ctx.run(
            stretched_slopes, tiles, span, grads[0], levels=ctx.levels, edge=ctx.edge, asked=asked
        )
        return *found, None, None, None, None, None


class StretchedElastic(Quantizer):
    """Options: `bits` (2 or ternary), `gradient` (corrected or published), and those of every quantizer."""

    reads = COMMON | {"bits", "gradient"}
    learned: tuple[str, ...] = ("scale",)
    scale: nn.Parameter  # the range a, [down, across]

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.levels: Levels = "seq2" if width(options, 2, (2, "ternary")) == 2 else "ternary"
        published = choice(options, "gradient", "corrected", ("corrected", "published")) == "published"
        self.edge = 1.0 if published and self.levels == "ternary" else None

    def start(self, weight: Tensor) -> None:
        """Set the ranges to the largest magnitudes."""
        super().start(weight)
        with torch.no_grad():
            first = first_span(self.tiles(weight))[..., 0]
        self.scale = nn.Parameter(first.clamp(min=SMALLEST).contiguous())

    def quantized(self, weight: Tensor) -> Tensor:
        """Return the levels."""
        values = Stretched.apply(  # type: ignore[no-untyped-call]
            self.tiles(weight),
            self.scale.float()[..., None],
            self.levels,
            self.edge,
            self.scale_type,
            product_type(weight),
            self.run,
        )
        return cast(Tensor, values).view(weight.shape)

    def merged(self, weight: Tensor) -> LowBit:
        """Return codes and steps."""
        stretch = STRETCHES[self.levels]
        with torch.no_grad():
            span = self.scale.float()[..., None]
            levels = stretched(self.tiles(weight), span, stretch)[1].view(weight.shape)
            first = stretch.lowest if self.levels == "seq2" else 0
            codes = (levels - stretch.offset - first).to(torch.int8)
            step = by_row(kept(step_of(span, stretch), self.scale_type), len(codes))
            return LowBit(codes, step, self.levels, self.group(weight))


QUANTIZER = StretchedElastic
