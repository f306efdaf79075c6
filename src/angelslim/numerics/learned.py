"""Learned rounding: each weight goes up or down as the block's output likes it best.

AutoRound (Cheng et al. 2023, arXiv 2309.05516) rounds ``W / s + V`` instead of ``W / s``. V starts at 0 and stays in
[-0.5, 0.5], so a weight moves to one of its two neighbours at most; ``s`` is the tile's scale times a factor in [0.5, 1].
Both are trained by *sign* descent: every element moves by the same step against the sign of its gradient, and the step
falls linearly to zero. Where there is a zero point the paper has a factor for each end of the range; here one factor
scales both, and the zero point stays.

The gradient of the block's loss with respect to the quantized weight ``Q = (c - z) s``, ``c = round(W / s + z + V)``,
is ``G``; autograd has to give no more than that. Rounding passes gradients on unchanged (straight through), so V's is
``G s`` where the code was not clamped, else 0, and the scale's is the sum of ``G (c - z - W / s)`` over the tile
(``G (c - z)`` where clamped). The sign of the first is that of G: nothing of the size of a weight is kept for autograd.

V may also start at given codes (`Rounding.start`), such as GPTQ's: then weights lie in the cells of those codes, each
as near to its true place as the cell allows, and descent moves on from there.

Shapes: weights ``[out, in]``, tiles are runs of `columns` neighbours of a row. Everything is float32; scales are rounded
to the type in which they are stored whenever they are used.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .quantize import STORAGE, Quantized, tile_of

EDGE = 0.49  # how far from its code a weight that starts in its cell may lie, in steps
LEAST = 0.5  # the smallest range, as a share of the full one


class Rounding:
    """One weight that is learning; `rounded` has its scales, and its codes where they are the `start`."""

    def __init__(self, weight: Tensor, rounded: Quantized, *, start: bool = False) -> None:
        assert rounded.quant.format.kind == "int" and rounded.global_scale is None
        self.first, shape = rounded, (weight.shape[0], weight.shape[1])
        columns = tile_of(rounded.quant.granularity, shape)[1]
        self.weight = weight.float().view(shape[0], -1, columns)
        self.scale = rounded.scale.float()
        self.zero = None if rounded.zero is None else rounded.zero.float()
        self.shift = torch.zeros_like(self.weight)  # V
        self.factor = torch.ones_like(self.scale)
        self.most = 1.5 if start else 1.0  # scales that were searched may grow again
        self.offset: Tensor | None = None  # what brings each weight into the cell of its code
        if start:
            place = self._place(self.scale)
            code = rounded.codes.float().view_as(place)
            self.offset = torch.minimum(torch.maximum(place, code - EDGE), code + EDGE) - place

    def _steps(self) -> Tensor:
        return (self.scale * self.factor).to(self.first.scale.dtype).float()

    def _place(self, steps: Tensor) -> Tensor:
        place = self.weight / steps[..., None]
        return place if self.zero is None else place.add_(self.zero[..., None])

    def _codes(self, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes, where each weight lies without V, and whether its code is inside the range."""
        place = self._place(steps)
        if self.offset is not None:
            place += self.offset
        grid = self.first.quant.format
        wanted = (place + self.shift).round_()
        codes = wanted.clamp(grid.low, grid.high)
        return codes, place, codes == wanted

    def value(self) -> Tensor:
        """Return the float32 weight ``[out, in]`` as it is now."""
        steps = self._steps()
        codes = self._codes(steps)[0]
        if self.zero is not None:
            codes -= self.zero[..., None]
        return (codes * steps[..., None]).view(self.first.codes.shape)

    def step(self, gradient: Tensor, size: float, scale_size: float) -> None:
        """Move V by `size` and the scale factors by `scale_size` against the gradient ``[out, in]`` of the loss."""
        steps = self._steps()
        codes, place, inside = self._codes(steps)
        gradient = gradient.float().view_as(place)
        # With a zero point the true place counts from it on both sides, and it cancels.
        centre = torch.zeros_like(steps) if self.zero is None else self.zero
        true = place if self.offset is None else place - self.offset
        lever = codes - centre[..., None] - torch.where(inside, true - centre[..., None], 0.0)
        slope = (gradient * lever).sum(-1) * self.scale
        self.factor.sub_(slope.sign(), alpha=scale_size).clamp_(LEAST, self.most)
        sign = (gradient * inside * steps[..., None]).sign_()
        self.shift.sub_(sign, alpha=size).clamp_(-0.5, 0.5)

    def state(self) -> tuple[Tensor, Tensor]:
        """Return copies of what was learned, for `restore`."""
        return self.shift.clone(), self.factor.clone()

    def restore(self, state: tuple[Tensor, Tensor]) -> None:
        """Go back to a state."""
        self.shift, self.factor = state[0].clone(), state[1].clone()

    def result(self) -> Quantized:
        """Return the quantized weight as it is now; `value` is its dequantization."""
        steps = self._steps()
        codes = self._codes(steps)[0].view(self.first.codes.shape)
        return replace(
            self.first,
            codes=codes.to(STORAGE[self.first.quant.format.kind]),
            scale=steps.to(self.first.scale.dtype).view_as(self.first.scale),
        )


def step_size(iteration: int, iterations: int, first: float) -> float:
    """Return the step of one iteration, counted from 0: `first`, falling linearly towards zero."""
    return first * (1 - iteration / iterations)
