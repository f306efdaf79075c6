"""FP8, MXFP4 and NVFP4 weights: floating-point grids, with learned scales where the format leaves them free.

* ``fp8``: E4M3 codes and a learned float32 scale for each channel (or tensor, or group), with LSQ's gradients (`_learned`)
  on a grid that is finer near zero. It starts at ``max|w| / 448``, or a millionth above.
* ``mxfp4``: FP4 codes in groups of 32 under powers of two. ``nvfp4``: FP4 codes in groups of 16 under E4M3 numbers over one
  factor for the tensor. Such scales are small numbers that follow from each group's largest magnitude
  (`numerics.scales`); they are computed anew at every step, and the gradient goes straight through.

What remains is a `Quantized` like that of post-training methods. Engines that fuse several layers want one scale per
tensor, or one NVFP4 factor, for all of them; here every layer has its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...numerics.quantize import Quantized, fake_quantize, quantize, quantize_with
from ...numerics.scales import half_range
from ...numerics.scheme import FORMATS, PRESETS, Quant
from ._learned import LearnedScale
from ._options import choice
from ._quantizer import COMMON, product_type
from ._straight import straight_through

# Else a tile's largest weight would lie on the end of the grid to the last bit of a division: beyond it the weight gets no
# gradient, and the scale ten times the usual one.
ROOM = 1 + 2.0**-20


class Floats(LearnedScale):
    """Options: `format` (fp8, mxfp4, nvfp4); `granularity` and `group_size` of FP8, per channel by default."""

    reads = (COMMON | {"format"}) - {"scale_dtype"}
    grid = "fp8_e4m3"

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__({**options, "scale_dtype": "float32"})
        name = choice(options, "format", "fp8", ("fp8", "mxfp4", "nvfp4"))
        if name == "fp8":
            self.quant = Quant(FORMATS["fp8_e4m3"], self.granularity)
            return
        self.learned = ()
        self.quant = PRESETS[f"{name}_weight_only"].weight
        self.granularity = self.quant.granularity

    def first_scale(self, tiles: Tensor) -> Tensor:
        """Return the scales of rounding to nearest, by a millionth larger."""
        return tiles.abs().amax(-1, keepdim=True) * (ROOM / half_range(self.quant.format))

    def start(self, weight: Tensor) -> None:
        """Set the first scales, where they are learned."""
        super().start(weight)
        if not self.learned:
            del self.scale

    def quantized(self, weight: Tensor) -> Tensor:
        """Return the rounded weight."""
        if self.learned:
            return super().quantized(weight)
        with torch.no_grad():
            values = fake_quantize(weight.float(), self.quant).to(product_type(weight))
        return straight_through(weight, values)

    def merged(self, weight: Tensor) -> Quantized:
        """Return codes and scales."""
        with torch.no_grad():
            if self.learned:
                return quantize_with(weight, self.step()[..., 0], None, self.quant)
            return quantize(weight, self.quant)


QUANTIZER = Floats
