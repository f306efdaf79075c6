"""Quantizers whose scales follow from the weights: nothing but the weights is learned.

The gradient of Q(W) is that of W as it stands (the straight-through estimator, arXiv 1308.3432), for weights on both
sides of every threshold, and the scale counts as a constant. The backward pass then keeps nothing at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...numerics.lowbit.record import LowBit
from ...numerics.lowbit.ternary import ternary_codes
from ...numerics.lowbit.tiles import by_row, kept
from ._quantizer import Quantizer, product_type
from ._straight import straight_through


class TernaryByRule(Quantizer):
    """Ternary weights with a threshold and a scale that are statistics of each tile."""

    def rule(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Return (threshold, scale), both ``[down, across, 1]``."""
        raise NotImplementedError

    def quantized(self, weight: Tensor) -> Tensor:
        """Return ``scale * t``."""
        with torch.no_grad():
            tiles = self.tiles(weight)
            threshold, scale = self.rule(tiles)
            values = ternary_codes(tiles, threshold).mul_(kept(scale, self.scale_type))
            values = values.to(product_type(weight)).view(weight.shape)
        return straight_through(weight, values)

    def merged(self, weight: Tensor) -> LowBit:
        """Return codes and scales."""
        with torch.no_grad():
            tiles = self.tiles(weight)
            threshold, scale = self.rule(tiles)
            codes = ternary_codes(tiles, threshold).to(torch.int8).view(weight.shape)
            return LowBit(
                codes, by_row(kept(scale, self.scale_type), len(codes)), "ternary", self.group(weight)
            )
