"""Rows of the matrix that the copy engine reads are the tokens they should be, for every layout that models use."""

from __future__ import annotations

import pytest
import torch

from angelslim.kernels.attention._flat import flatten

LAYOUTS = {
    "tokens first": torch.randn(2, 7, 3, 16).transpose(1, 2),
    "heads first": torch.randn(2, 3, 7, 16),
    "a part of a cache": torch.randn(2, 3, 10, 16)[:, :, :7],
    "a part of a projection": torch.randn(2, 7, 5, 16)[:, :, 1:4].transpose(1, 2),
    "one head": torch.randn(1, 7, 1, 16).transpose(1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_is_found(layout: str) -> None:
    x = LAYOUTS[layout]
    flat = flatten(x)
    assert flat is not None
    matrix = x.as_strided(flat.shape, flat.strides)
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            row, column = b * flat.row_b + h * flat.row_h, h * flat.column_h
            torch.testing.assert_close(matrix[row : row + 7, column : column + 16], x[b, h])


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(1, 2, 7, 32)[..., ::2],
        torch.randn(1, 2, 7, 18)[..., :16],
        torch.randn(1, 2, 7, 32)[..., 1:17],
        torch.randn(2 * 3 * 7 * 16 + 8).as_strided((2, 3, 7, 16), (3 * 7 * 16 + 4, 7 * 16, 16, 1)),
    ],
)
def test_what_copies_cannot_read_is_refused(x: torch.Tensor) -> None:
    assert flatten(x) is None
