"""Absmean against Python's own floats."""

from __future__ import annotations

import pytest
import torch

from angelslim.methods.qat.base import master_weight, merge
from angelslim.numerics.lowbit.reference import threshold_tile

from .helpers import EXACT, OUT, inputs, linear, quantized


def test_one_scale_serves_the_tensor_as_in_the_paper():
    layer = quantized("absmean", EXACT)
    flat = linear().weight.flatten().tolist()
    scale, codes = threshold_tile("absmean", flat)
    assert layer.weight.flatten().tolist() == pytest.approx([scale * code for code in codes], rel=1e-5)
    record = merge(layer)[""]
    assert record.scale.shape == (OUT, 1) and record.scale.unique().numel() == 1


def test_the_gradient_goes_straight_through_for_every_weight():
    layer, x = quantized("absmean", {"group_size": 16}), inputs()
    grad = torch.randn(len(x), OUT, generator=torch.Generator().manual_seed(2))
    layer(x).backward(grad)
    assert torch.allclose(master_weight(layer).grad, grad.T @ x, rtol=1e-5, atol=1e-5)


def test_groups_without_a_bias_are_tequila_without_lambda():
    own = quantized("absmean", {"group_size": 16})
    other = quantized("tequila", {"group_size": 16, "lambda": 0})
    assert torch.equal(own(inputs()), other(inputs()))
    for layer in (own, other):
        layer(inputs()).square().sum().backward()
    assert torch.equal(master_weight(own).grad, master_weight(other).grad)


def test_int8_inputs_are_those_of_a_slow_twin_and_leave_with_the_quantizer():
    layer = quantized("absmean", {"activations": "int8"})
    x = inputs().requires_grad_(True)
    twin = torch.zeros(x.shape, dtype=torch.float64)
    for row, line in enumerate(x.tolist()):
        step = max(map(abs, line)) / 127
        twin[row] = torch.tensor([step * round(value / step) for value in line], dtype=torch.float64)
    out = layer(x)
    assert torch.allclose(out.double(), twin @ layer.weight.double().T, rtol=1e-4, atol=1e-5)
    out.sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0).expand_as(x), atol=1e-6), "straight through"
    merge(layer)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight))
