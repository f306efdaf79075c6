"""TWN against Python's own floats."""

from __future__ import annotations

import pytest
import torch

from angelslim.methods.qat.base import master_weight
from angelslim.numerics.lowbit.reference import threshold_tile

from .helpers import EXACT, linear, quantized


def test_rows_have_their_own_thresholds_and_scales():
    layer = quantized("twn", EXACT)
    for row, weight in enumerate(linear().weight.tolist()):
        scale, codes = threshold_tile("twn", weight)
        assert layer.weight[row].tolist() == pytest.approx([scale * code for code in codes], rel=1e-5)


def test_the_gradient_goes_straight_through():
    layer = quantized("twn", {})
    grad = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(2))
    layer.weight.backward(grad)
    assert torch.equal(master_weight(layer).grad, grad)
