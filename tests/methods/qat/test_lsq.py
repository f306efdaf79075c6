"""LSQ against float64: codes, first steps, gradients."""

from __future__ import annotations

import math

import pytest
import torch

from angelslim.methods.qat.base import master_weight, merge
from angelslim.numerics.lowbit.reference import integer_tile

from .helpers import EXACT, IN, OUT, linear, quantized, quantizer_of, slope

LIMITS = {"ternary": (-1, 1), 2: (-2, 1), 4: (-8, 7)}
widths = pytest.mark.parametrize("bits", LIMITS)


@widths
def test_the_layer_computes_with_the_nearest_codes(bits):
    layer = quantized("lsq", {"bits": bits, **EXACT})
    for row, weight in enumerate(linear().weight.tolist()):
        scale = quantizer_of(layer).scale[row].item()
        codes = integer_tile(weight, scale, *LIMITS[bits])
        assert layer.weight[row].tolist() == pytest.approx([scale * code for code in codes], rel=1e-6)
    record = merge(layer)[""]
    assert record.levels == ("ternary" if bits == "ternary" else "int")
    low, high = LIMITS[bits]
    assert record.codes.min() >= low and high // 2 <= record.codes.max() <= high


@widths
def test_steps_start_as_in_the_paper(bits):
    size, top = linear().weight.abs(), LIMITS[bits][1]
    paper = quantizer_of(quantized("lsq", {"bits": bits})).scale
    assert torch.allclose(paper, 2 * size.mean(1, keepdim=True) / math.sqrt(top))
    other = quantizer_of(quantized("lsq", {"bits": bits, "init": "max"})).scale
    assert torch.allclose(other, size.amax(1, keepdim=True) / top)


@widths
def test_the_first_weights_are_not_all_zero(bits):
    layer = quantized("lsq", {"bits": bits})
    assert (layer.weight != 0).float().mean() > 0.3
    assert (layer.weight - linear().weight).norm() < 0.8 * linear().weight.norm()


@widths
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_gradients_are_those_of_fixed_codes(bits, share):
    layer = quantized("lsq", {"bits": bits, **EXACT})
    with torch.no_grad():
        quantizer_of(layer).scale.mul_(share)
    low, high = LIMITS[bits]
    weight, scale = linear().weight.detach().double(), quantizer_of(layer).scale.detach().double()
    u = weight / scale
    code, inside = u.round().clamp(low, high), (u >= low) & (u <= high)
    out_grad = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(3))
    layer.weight.backward(out_grad)

    def value(a):
        return (out_grad.double() * torch.where(inside, weight + a * (code - u), a * code)).sum()

    exact = slope(value, scale) / math.sqrt(OUT * IN * high)
    assert torch.allclose(quantizer_of(layer).scale.grad.double(), exact, rtol=1e-4, atol=1e-7)
    assert torch.equal(master_weight(layer).grad, out_grad * inside)


def test_a_rounded_scale_is_still_learned():
    layer = quantized("lsq", {"bits": 4, "scale_dtype": "bfloat16"})
    scale = quantizer_of(layer).scale
    layer.weight.square().sum().backward()
    assert scale.grad.abs().min() > 0 and not torch.equal(scale, scale.bfloat16().float())
    record = merge(layer)[""]
    assert torch.equal(record.scale, scale.detach().bfloat16().float())
