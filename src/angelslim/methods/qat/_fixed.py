"""Quantizers whose scales follow from the weights: nothing but the weights is learned.

The gradient of Q(W) is that of W as it stands (the straight-through estimator, arXiv 1308.3432), for weights on both
sides of every threshold, and the scale counts as a constant. The backward pass then keeps nothing at all.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ...numerics.lowbit.record import LowBit
from ...numerics.lowbit.ternary import RULES, ternary_codes
from ...numerics.lowbit.tiles import by_row, kept, tiled
from ...numerics.scheme import Granularity
from ._formula import Formula
from ._quantizer import Quantizer, product_type


def ternary_values(
    weight: Tensor, *, rule: str, granularity: Granularity, storage: torch.dtype | None, dtype: torch.dtype
) -> Tensor:
    """Return ``scale * t`` of a weight ``[out, in]`` in `dtype`; scales are rounded to `storage`."""
    tiles = tiled(weight, granularity).float()
    threshold, scale = RULES[rule](tiles)
    return ternary_codes(tiles, threshold).mul_(kept(scale, storage)).to(dtype).view(weight.shape)


class TernaryByRule(Quantizer):
    """Ternary weights with a threshold and a scale that are statistics of each tile; `rule` is a key of `RULES`."""

    rule: ClassVar[str]

    def quantized(self, weight: Tensor) -> Tensor:
        """Return ``scale * t``."""
        settings: dict[str, Any] = {"rule": self.rule, "granularity": self.granularity}
        settings |= {"storage": self.scale_type, "dtype": product_type(weight)}
        return cast(Tensor, self.compute(Formula(ternary_values, settings), weight))

    def merged(self, weight: Tensor) -> LowBit:
        """Return codes and scales."""
        with torch.no_grad():
            tiles = self.tiles(weight)
            threshold, scale = RULES[self.rule](tiles)
            codes = ternary_codes(tiles, threshold).to(torch.int8).view(weight.shape)
            return LowBit(
                codes, by_row(kept(scale, self.scale_type), len(codes)), "ternary", self.group(weight)
            )
