"""Min-max grids, as LLM-QAT (arXiv 2305.17888) trains with: the largest weight of a row decides the step.

``scale = max|w| / Q`` with Q = 1 for ternary weights and ``2^(b-1) - 1`` for b bits, codes from -Q to Q, and the gradient
straight through. Nothing is clipped. With few levels the largest weight leaves all others at zero; this is the baseline
for which the other quantizers were made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from ...numerics.lowbit.record import LowBit
from ...numerics.lowbit.tiles import by_row, kept, tiled
from ...numerics.scheme import Granularity
from ._fixed import TernaryByRule
from ._formula import Formula
from ._options import width
from ._quantizer import COMMON, product_type

WIDTHS = ("ternary", 3, 4, 5, 6, 7, 8)  # two symmetric bits are ternary


def minmax_codes(tiles: Tensor, top: int, storage: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Return (codes, scale ``[down, across, 1]``) of tiles in float32."""
    scale = kept(tiles.abs().amax(-1, keepdim=True) / top, storage)
    safe = torch.where(scale > 0, scale, 1.0)
    return (tiles / safe).round_().clamp_(-top, top), scale


def minmax_values(
    weight: Tensor, *, granularity: Granularity, top: int, storage: torch.dtype | None, dtype: torch.dtype
) -> Tensor:
    """Return ``scale * code`` of a weight ``[out, in]`` in `dtype`."""
    codes, scale = minmax_codes(tiled(weight, granularity).float(), top, storage)
    return codes.mul_(scale).to(dtype).view(weight.shape)


class MinMax(TernaryByRule):
    """Options: `bits` (ternary, 3 to 8), and those of every quantizer."""

    reads = COMMON | {"bits"}
    rule = "minmax"

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        bits = width(options, "ternary", WIDTHS)
        self.bits = bits if isinstance(bits, int) else 2
        self.top = 2 ** (self.bits - 1) - 1

    def quantized(self, weight: Tensor) -> Tensor:
        """Return ``scale * code``."""
        if self.bits == 2:
            return super().quantized(weight)
        settings: dict[str, Any] = {"granularity": self.granularity, "top": self.top}
        settings |= {"storage": self.scale_type, "dtype": product_type(weight)}
        return cast(Tensor, self.compute(Formula(minmax_values, settings), weight))

    def merged(self, weight: Tensor) -> LowBit:
        """Return codes and scales."""
        if self.bits == 2:
            return super().merged(weight)
        with torch.no_grad():
            codes, scale = minmax_codes(self.tiles(weight), self.top, self.scale_type)
            rows = by_row(scale, weight.shape[0])
            return LowBit(
                codes.to(torch.int8).view(weight.shape), rows, "int", self.group(weight), bits=self.bits
            )


QUANTIZER = MinMax
