"""Tokens of all heads as rows of one matrix, which is how a GPU's copy engine (TMA) reads blocks of them.

Such a copy is asked for by the row and the column where it begins, and what lies outside the matrix is read as zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

ALIGNED = 16  # bytes: of the address and of each row


class Flat(NamedTuple):
    """x[b, h, t] begins in row ``b * row_b + h * row_h + t`` and in column ``h * column_h`` of a matrix over the storage of x.

    The matrix ends with the last token of the last head, so that rows behind it are read as zero; behind another head's or
    batch row's last token lies whatever follows in memory.
    """

    shape: list[int]
    strides: list[int]
    row_b: int
    row_h: int
    column_h: int

    @property
    def steps(self) -> tuple[int, int, int]:
        """The three steps of an index."""
        return self.row_b, self.row_h, self.column_h


def flatten(x: Tensor) -> Flat | None:
    """How [B, H, T, D] lies as such a matrix, or None if it does not, or if it is not aligned."""
    batch, heads, tokens, width = x.shape
    step_b, step_h, row, one = x.stride()
    step_b, step_h = step_b if batch > 1 else 0, step_h if heads > 1 else 0
    bytes_of_row = row * x.element_size()
    if one != 1 or row < width or bytes_of_row % ALIGNED or x.data_ptr() % ALIGNED or step_b % row:
        return None
    inside = (heads - 1) * step_h + width <= row
    if not inside and step_h % row:
        return None
    row_h, column_h = (0, step_h) if inside else (step_h // row, 0)
    rows = (batch - 1) * (step_b // row) + (heads - 1) * row_h + tokens
    return Flat([rows, (heads - 1) * column_h + width], [row, 1], step_b // row, row_h, column_h)


def descriptor(kind: Any, x: Tensor, flat: Flat, block: list[int], *more: Any) -> Any:
    """Triton's description of such copies; `kind` is the class, of Triton or of Gluon."""
    return kind(x, flat.shape, flat.strides, block, *more)
