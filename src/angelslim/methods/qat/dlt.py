"""DLT (TernaryLLM, arXiv 2406.07177): ternary weights with a learned scale and a learned shift.

A tile becomes ``a t + y``, with t the nearest of -1, 0, 1 to ``(w - y) / a``: weights whose mean is not zero are not
forced onto a grid around zero. y starts at zero and a with the scale of ternary weight networks, whose threshold is
half of it within two percent for bell-shaped tiles, so that the first codes are the best ones; the paper's own initial
values are not known to us. Gradients: `_learned`; that of y is the sum of the gradients of its tile.

The shift multiplies the sum of a tile's inputs, which no file of a stock engine can express; the weights can be written
as ordinary numbers, or in this package's own format.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...numerics.lowbit.record import LowBit
from ...numerics.lowbit.ternary import twn
from ...numerics.lowbit.tiles import by_row, kept
from ._learned import TERNARY, LearnedScale, rounded


class DualLearnable(LearnedScale):
    """Options: those of every quantizer."""

    learned = ("scale", "shift")
    grid = "ternary"
    shift: nn.Parameter

    def first_scale(self, tiles: Tensor) -> Tensor:
        """Return the scale of ternary weight networks."""
        return twn(tiles)[1]

    def start(self, weight: Tensor) -> None:
        """Set the first scales, and shifts of zero."""
        super().start(weight)
        self.shift = nn.Parameter(torch.zeros_like(self.scale))

    def moved(self) -> nn.Parameter:
        """Return the shifts."""
        return self.shift

    def merged(self, weight: Tensor) -> LowBit:
        """Return codes, scales and shifts."""
        with torch.no_grad():
            scale, shift = self.step(), kept(self.shift.float(), self.scale_type)[..., None]
            codes = rounded((self.tiles(weight) - shift).div_(scale), TERNARY)
            codes = codes.to(torch.int8).view(weight.shape)
            rows = len(codes)
            return LowBit(codes, by_row(scale, rows), "ternary", self.group(weight), by_row(shift, rows))


QUANTIZER = DualLearnable
