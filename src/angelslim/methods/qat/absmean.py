"""Absmean (BitNet b1.58, arXiv 2402.17764): ternary weights, scaled by their mean magnitude.

Weights of at least half the mean magnitude become their sign, the others zero. One scale for the whole tensor, as in
the paper; 8-bit activations, which the paper adds, are not part of the weight's quantizer. With groups this is exactly
Tequila without its bias, the baseline to compare that with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...numerics.lowbit.ternary import absmean
from ...numerics.scheme import PER_TENSOR
from ._fixed import TernaryByRule


class AbsMean(TernaryByRule):
    """Options: those of every quantizer; one scale for the tensor by default."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options, PER_TENSOR)

    def rule(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Half the mean magnitude, and the mean magnitude."""
        return absmean(tiles)


QUANTIZER = AbsMean
