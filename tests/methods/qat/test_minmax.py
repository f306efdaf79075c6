"""Min-max grids against Python's own floats."""

from __future__ import annotations

import pytest
import torch

from angelslim.methods.qat.base import master_weight, merge
from angelslim.numerics.lowbit.reference import integer_tile, threshold_tile

from .helpers import EXACT, linear, quantized


@pytest.mark.parametrize("bits", ["ternary", 3, 4, 8])
def test_the_largest_weight_of_a_row_decides(bits):
    layer = quantized("minmax", {"bits": bits, **EXACT})
    for row, weight in enumerate(linear().weight.tolist()):
        top = 1 if bits == "ternary" else 2 ** (bits - 1) - 1
        scale = max(map(abs, weight)) / top
        codes = integer_tile(weight, scale, -top, top) if top > 1 else threshold_tile("minmax", weight)[1]
        assert layer.weight[row].tolist() == pytest.approx([scale * code for code in codes], rel=1e-5)
    grad = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(2))
    layer.weight.backward(grad)
    assert torch.equal(master_weight(layer).grad, grad)
    record = merge(layer)[""]
    assert record.levels == ("ternary" if top == 1 else "int") and record.codes.abs().max() == top


def test_a_row_of_zeros_stays_zero():
    layer = quantized("minmax", {"bits": 4})
    with torch.no_grad():
        master_weight(layer)[0] = 0
    assert layer.weight[0].abs().max() == 0
    assert merge(layer)[""].dequantize()[0].abs().max() == 0
