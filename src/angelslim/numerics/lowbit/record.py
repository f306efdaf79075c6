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

import torch
from torch import Tensor

from ...base.errors import SchemeError
from ..quantize import SCALE_TYPES, Quantized
from ..scheme import PER_CHANNEL, Quant, ScaleKind, format_named, per_group
from .sparse34 import is_encodable

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

    def quantized(self) -> Quantized:
        """Return the same numbers as every format and report of the package takes them.

        A shift has no place there (`SchemeError`). Ternary codes with exactly one zero in each four become 3:4 sparse
        ones, which take 1.25 bits instead of 2.
        """
        if self.shift is not None:
            raise SchemeError(
                "A shift of every weight is not what quantized checkpoints hold.",
                fix="Save with save_format: fake, or train with another quantizer.",
            )
        columns = self.codes.shape[1]
        grain = PER_CHANNEL if self.group == columns else per_group(self.group)
        name = self.levels if self.levels != "int" else f"int{self.bits}"
        if name == "ternary" and is_encodable(self.codes):
            name = "ternary34"
        codes = self.codes - 2 if name == "seq2" else self.codes
        kind = self.scale_kind
        scale = self.scale.to(SCALE_TYPES.get(kind, torch.float32))
        return Quantized(codes, scale, None, Quant(format_named(name), grain, scale=kind))

    @property
    def scale_kind(self) -> ScaleKind:
        """The narrowest 16-bit type that holds all scales, or ``free``."""
        kinds: tuple[tuple[ScaleKind, torch.dtype], ...] = (
            ("float16", torch.float16),
            ("bfloat16", torch.bfloat16),
        )
        return next(
            (kind for kind, dtype in kinds if torch.equal(self.scale.to(dtype).float(), self.scale)), "free"
        )
