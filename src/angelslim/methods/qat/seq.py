"""SEQ (ParetoQ, arXiv 2502.02631): stretched levels with a learned range, for two bits and for ternary weights.

The levels divide the range ``[-a, a]`` of a tile evenly (`numerics.lowbit.stretched`), a starts as the largest magnitude
and is learned. With ``u = w / a``, q the level over a and the clip at 0.99:

* dL/dW is g where ``|u| <= 0.99`` and 0 elsewhere;
* dL/da is the sum over the tile of ``g (q - u)`` inside and ``g q`` outside, over the square root of the number of
  weights in the layer.

The published code takes 1 instead of q = 2/3 for clipped ternary weights, which is not the level that it emits;
`gradient: published` does the same, the default is the derivative of what is emitted. Two bits are not affected.

The largest magnitude is twice as far out as the range that loses least of a bell-shaped row, and a range moves about one
learning rate a step: over thousands of steps it arrives, over a few hundred it does not. `init: fit`, ours, begins with
the range of the least squared error instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ...numerics.lowbit.record import LowBit
from ...numerics.lowbit.stretched import (
    CLIP,
    SMALLEST,
    STRETCHES,
    first_span,
    fitted_span,
    step_of,
    stretched,
)
from ...numerics.lowbit.tiles import by_row, kept, tiled
from ...numerics.scheme import Granularity
from ._formula import Formula
from ._options import choice, width
from ._quantizer import COMMON, Quantizer, product_type

Levels = Literal["ternary", "seq2"]


def stretched_values(
    weight: Tensor,
    scale: Tensor,
    *,
    grain: Granularity,
    levels: Levels,
    storage: torch.dtype | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the levels of a weight ``[out, in]`` in `dtype`; ranges are ``[down, across]``, `storage` is their steps' type."""
    stretch, span = STRETCHES[levels], scale.float()[..., None]
    values = stretched(tiled(weight, grain).float(), span, stretch)[1]
    return values.mul_(kept(step_of(span, stretch), storage)).to(dtype).view(weight.shape)


def stretched_slopes(
    weight: Tensor,
    scale: Tensor,
    grad: Tensor,
    *,
    grain: Granularity,
    levels: Levels,
    edge: float | None,
    asked: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients to weight and ranges; `edge` replaces the slope of clipped weights."""
    stretch, tiles = STRETCHES[levels], tiled(weight, grain).float()
    grad = grad.to(tiles.dtype).reshape(tiles.shape)
    u, slope = stretched(tiles, scale.float()[..., None], stretch)
    outside = u.abs() > CLIP
    to_weight = grad.masked_fill(outside, 0.0).view(weight.shape) if asked[0] else None
    to_scale = None
    if asked[1]:
        slope.div_(stretch.steps)
        if edge is not None:
            slope = torch.where(outside, u.sign() * edge, slope)
        slope.sub_(u.masked_fill_(outside, 0.0))
        to_scale = slope.mul_(grad).sum(-1) / math.sqrt(tiles.numel())
    return to_weight, to_scale


class StretchedElastic(Quantizer):
    """Options: `bits` (2 or ternary), `init` (max or fit), `gradient` (corrected or published), and every quantizer's."""

    reads = COMMON | {"bits", "init", "gradient"}
    learned: tuple[str, ...] = ("scale",)
    scale: nn.Parameter  # the range a, [down, across]

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.levels: Levels = "seq2" if width(options, 2, (2, "ternary")) == 2 else "ternary"
        self.init = choice(options, "init", "max", ("max", "fit"))
        published = choice(options, "gradient", "corrected", ("corrected", "published")) == "published"
        self.edge = 1.0 if published and self.levels == "ternary" else None

    def start(self, weight: Tensor) -> None:
        """Set the ranges to the largest magnitudes, or to those that lose least."""
        super().start(weight)
        with torch.no_grad():
            tiles = self.tiles(weight)
            first = first_span(tiles) if self.init == "max" else fitted_span(tiles, STRETCHES[self.levels])
        self.scale = nn.Parameter(first[..., 0].clamp(min=SMALLEST).contiguous())

    def quantized(self, weight: Tensor) -> Tensor:
        """Return the levels."""
        shared: dict[str, Any] = {"grain": self.granularity, "levels": self.levels}
        settings = {**shared, "storage": self.scale_type, "dtype": product_type(weight)}
        back = {**shared, "edge": self.edge}
        formula = Formula(stretched_values, settings, stretched_slopes, back, keeps=(0, 1))
        return cast(Tensor, self.compute(formula, weight, self.scale))

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
