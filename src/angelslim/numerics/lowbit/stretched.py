"""Stretched levels (SEQ of ParetoQ, arXiv 2502.02631): few levels that use the whole range evenly.

With a range a for each tile, ``u = w / a`` is clipped to +-0.99 and cut into equal intervals; each is represented by its
middle:

=========  =======================  ================  ===================  ==============
width      levels / a               thresholds / a    k                    step
=========  =======================  ================  ===================  ==============
2 bits     -3/4, -1/4, 1/4, 3/4     -1/2, 0, 1/2      -2, -1, 0, 1         a / 2
ternary    -2/3, 0, 2/3             -1/3, 1/3         -1, 0, 1             a / 1.5
=========  =======================  ================  ===================  ==============

so that a weight is ``(k + s) * step`` with s = 1/2 or 0. Two bits have no level at zero: all four levels carry a sign,
where a grid around zero would waste one of four on the asymmetry. a starts as the largest magnitude of its tile, so
that nothing is clipped, and is learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

CLIP = 0.99  # keeps the outermost interval closed: 1 would round to a level that does not exist
SMALLEST = 1e-5  # of a range: a row of zeros, or one that training pushed below zero


@dataclass(frozen=True)
class Stretch:
    """`steps` intervals on each side of zero, `offset` s of the levels."""

    steps: float
    offset: float
    lowest: int  # the smallest k


STRETCHES: dict[Literal["ternary", "seq2"], Stretch] = {
    "ternary": Stretch(1.5, 0.0, -1),
    "seq2": Stretch(2.0, 0.5, -2),
}


def stretched(tiles: Tensor, span: Tensor, stretch: Stretch) -> tuple[Tensor, Tensor]:
    """Return (u, k + s) for tiles ``[down, across, size]`` and ranges a ``[down, across, 1]``, in their type."""
    u = tiles / span.clamp(min=SMALLEST)
    levels = u.clamp(-CLIP, CLIP).mul_(stretch.steps)
    if stretch.offset:
        return u, levels.sub_(stretch.offset).round_().add_(stretch.offset)
    return u, levels.round_()


def step_of(span: Tensor, stretch: Stretch) -> Tensor:
    """Return what the levels are multiplied with."""
    return span.clamp(min=SMALLEST) / stretch.steps


def first_span(tiles: Tensor) -> Tensor:
    """Return the ranges that training begins with, ``[down, across, 1]``."""
    return tiles.abs().amax(-1, keepdim=True)


def fitted_span(tiles: Tensor, stretch: Stretch, candidates: int = 32) -> Tensor:
    """Return the ranges ``[down, across, 1]`` with the smallest squared error, of equally spaced parts of the largest.

    The largest of a few thousand bell-shaped weights lies at four times their spread; with two bits the best range is half
    of that.
    """
    top = first_span(tiles)
    best, least = top, top.new_full(top.shape, float("inf"))
    for number in range(candidates, 0, -1):
        span = top * (number / candidates)
        levels = stretched(tiles, span, stretch)[1]
        error = levels.mul_(step_of(span, stretch)).sub_(tiles).square_().sum(-1, keepdim=True)
        better = error < least
        best, least = best.where(~better, span), least.where(~better, error)
    return best
