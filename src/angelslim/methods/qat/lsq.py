"""LSQ (arXiv 1902.08153): the step between levels is a parameter, trained with the weights.

Ternary weights have the levels -a, 0, a and thresholds at half of a; b bits have ``-2^(b-1) .. 2^(b-1) - 1`` times a.
`init: mean` starts with ``2 mean|w| / sqrt(Q)``, Q the highest code, as the paper does. `init: max` starts with
``max|w| / Q``, as ParetoQ (arXiv 2502.02631) does for three and four bits; with ternary levels that leaves nearly all
weights at zero. Gradients: `_learned`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...numerics.lowbit.record import Levels, LowBit
from ...numerics.lowbit.tiles import by_row
from ._learned import GRIDS, LearnedScale, rounded
from ._options import choice, width
from ._quantizer import COMMON

WIDTHS = ("ternary", 2, 3, 4, 5, 6, 7, 8)


class LearnedStepSize(LearnedScale):
    """Options: `bits` (ternary, 2 to 8), `init` (mean or max), and those of every quantizer."""

    reads = COMMON | {"bits", "init"}

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        bits = width(options, "ternary", WIDTHS)
        self.grid = f"int{bits}" if isinstance(bits, int) else "ternary"
        self.init = choice(options, "init", "mean", ("mean", "max"))

    def first_scale(self, tiles: Tensor) -> Tensor:
        """Return the paper's, or ParetoQ's."""
        top, size = GRIDS[self.grid].high, tiles.abs()
        if self.init == "max":
            return size.amax(-1, keepdim=True) / top
        return 2 * size.mean(-1, keepdim=True) / math.sqrt(top)

    def merged(self, weight: Tensor) -> LowBit:
        """Return codes and scales."""
        grid = GRIDS[self.grid]
        with torch.no_grad():
            scale = self.step()
            codes = rounded(self.tiles(weight) / scale, grid).to(torch.int8).view(weight.shape)
            levels: Levels = "ternary" if self.grid == "ternary" else "int"
            return LowBit(codes, by_row(scale, len(codes)), levels, self.group(weight), bits=grid.bits)


QUANTIZER = LearnedStepSize
