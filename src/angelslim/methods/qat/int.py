"""INT4 and INT8 weights with learned scales: LSQ's gradients on the grids that engines run.

Scales start where rounding to nearest puts them, at ``max|w| / ((2^b - 1) / 2)``, and are learned (`_learned`). What
remains is a symmetric `Quantized` like that of post-training methods, so every exporter that can hold the scheme takes
it. INT4 has groups of 128 and bfloat16 scales by default, INT8 one float32 scale a channel; `scale_dtype: float16` is
for files that keep no others (GGUF, GPTQ, AWQ).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...numerics.quantize import Quantized, quantize_with
from ...numerics.scales import half_range
from ...numerics.scheme import FORMATS, PER_CHANNEL, Quant, ScaleKind, per_group
from ._learned import LearnedScale
from ._options import storage, width
from ._quantizer import COMMON


class Integers(LearnedScale):
    """Options: `bits` (4 or 8), and those of every quantizer."""

    reads = COMMON | {"bits"}

    def __init__(self, options: Mapping[str, Any]) -> None:
        four = width(options, 4, (4, 8)) == 4
        super().__init__(options, per_group(128) if four else PER_CHANNEL)
        self.scale_type = storage(options, "bfloat16" if four else "float32")
        self.grid = "int4" if four else "int8"
        kind: ScaleKind = "float16" if self.scale_type == torch.float16 else "free"
        self.quant = Quant(FORMATS[self.grid], self.granularity, scale=kind)

    def first_scale(self, tiles: Tensor) -> Tensor:
        """Return the scales of rounding to nearest."""
        return tiles.abs().amax(-1, keepdim=True) / half_range(self.quant.format)

    def merged(self, weight: Tensor) -> Quantized:
        """Return codes and scales; these have the type in which they are stored."""
        with torch.no_grad():
            scale = self.step()[..., 0]
            return quantize_with(weight, scale.to(self.scale_type or torch.float32), None, self.quant)


QUANTIZER = Integers
