"""What a low-bit weight is once it is trained: small whole numbers, and what they are multiplied with.

============  ===========================  ==========================================================
levels        codes                        weight
============  ===========================  ==========================================================
``ternary``   -1, 0, 1                     ``scale * code``
``seq2``      0, 1, 2, 3                   ``scale * (code - 1.5)``, with no level at zero
``int``       ``-2^(b-1) .. 2^(b-1) - 1``  ``scale * code``
============  ===========================  ==========================================================

A shift, where there is one, is added to every weight of its tile. Scales are float32 numbers; where training rounded
them to 16 bits these are the rounded ones, so that a file can hold them exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Levels = Literal["ternary", "seq2", "int"]
CENTRE = {"ternary": 0.0, "seq2": 1.5, "int": 0.0}  # the code, or the place between two, that stands for zero


@dataclass(frozen=True, eq=False)
class LowBit:
    """A weight ``[out, in]`` of few levels. `scale` and `shift` are float32 ``[out, tiles]``, `group` inputs a tile.

    A tensor with one scale has it once for each row. `bias` ``[out]`` is what the quantizer adds to the layer's own
    bias. `bits` is the width of a code: what a plain field needs, not the entropy.
    """

    codes: Tensor  # int8 [out, in]
    scale: Tensor
    levels: Levels
    group: int
    shift: Tensor | None = None
    bias: Tensor | None = None
    bits: int = 2

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        assert self.scale.shape == (rows, columns // self.group), (self.scale.shape, self.group)
        assert self.shift is None or self.shift.shape == self.scale.shape

    def dequantize(self) -> Tensor:
        """Return the float32 weight ``[out, in]`` that the codes stand for."""
        rows, columns = self.codes.shape
        values = self.codes.float().view(rows, -1, self.group)
        if CENTRE[self.levels]:
            values -= CENTRE[self.levels]
        values *= self.scale.float()[..., None]
        if self.shift is not None:
            values += self.shift.float()[..., None]
        return values.view(rows, columns)
