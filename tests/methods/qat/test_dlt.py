"""DLT against float64: nearest levels around a shift, and its two learned numbers."""

from __future__ import annotations

import math

import pytest
import torch

from angelslim.methods.qat.base import merge
from angelslim.numerics.lowbit.reference import integer_tile, threshold_tile

from .helpers import EXACT, IN, OUT, linear, quantized, quantizer_of, slope


def shifted():
    layer = quantized("dlt", EXACT)
    with torch.no_grad():
        quantizer_of(layer).shift.copy_(torch.linspace(-0.01, 0.01, OUT)[:, None])
    return layer


def test_it_starts_with_the_scale_of_twn_and_no_shift():
    quantizer = quantizer_of(quantized("dlt", {}))
    for row, weight in enumerate(linear().weight.tolist()):
        assert quantizer.scale[row].item() == pytest.approx(threshold_tile("twn", weight)[0], rel=1e-5)
    assert quantizer.shift.shape == quantizer.scale.shape and quantizer.shift.abs().max() == 0
    assert (quantized("dlt", {}).weight != 0).float().mean() > 0.3


def test_the_layer_computes_with_the_nearest_levels_around_the_shift():
    layer = shifted()
    own = quantizer_of(layer)
    for row, weight in enumerate(linear().weight.tolist()):
        scale, shift = own.scale[row].item(), own.shift[row].item()
        codes = integer_tile(weight, scale, -1, 1, shift)
        expected = [scale * code + shift for code in codes]
        assert layer.weight[row].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-8)
    record = merge(layer)[""]
    assert torch.equal(record.shift, own.shift.detach())


def test_gradients_are_those_of_fixed_codes():
    layer = shifted()
    own = quantizer_of(layer)
    weight, scale, shift = (t.detach().double() for t in (linear().weight, own.scale, own.shift))
    u = (weight - shift) / scale
    code, inside = u.round().clamp(-1, 1), u.abs() <= 1
    out_grad = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(3))
    layer.weight.backward(out_grad)
    wide = out_grad.double()
    to_shift = slope(lambda y: (wide * (scale * code + y)).sum(), shift)
    assert torch.allclose(own.shift.grad.double(), to_shift, rtol=1e-4, atol=1e-5)
    to_scale = slope(lambda a: (wide * torch.where(inside, a * (code - u), a * code)).sum(), scale)
    assert torch.allclose(own.scale.grad.double(), to_scale / math.sqrt(OUT * IN), rtol=1e-4, atol=1e-6)
