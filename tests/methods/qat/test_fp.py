"""Floating-point grids: the weights of rounding to nearest, and FP8's learned scale."""

from __future__ import annotations

import math

import pytest
import torch

from angelslim.methods.qat.base import master_weight, merge, scale_parameters
from angelslim.numerics.quantize import quantize
from angelslim.numerics.scheme import FORMATS, PER_CHANNEL, PRESETS, Quant

from .helpers import IN, OUT, linear, quantized, quantizer_of, slope

QUANTS = {
    "fp8": Quant(FORMATS["fp8_e4m3"], PER_CHANNEL),
    "mxfp4": PRESETS["mxfp4_weight_only"].weight,
    "nvfp4": PRESETS["nvfp4_weight_only"].weight,
}


@pytest.mark.parametrize("name", QUANTS)
def test_training_starts_from_rounding_to_nearest(name):
    layer = quantized("fp", {"format": name})
    plain = quantize(linear().weight.detach(), QUANTS[name])
    assert torch.allclose(layer.weight, plain.dequantize(), rtol=1e-5, atol=1e-8)
    record = merge(layer)[""]
    assert record.quant == plain.quant and record.codes.dtype == torch.float8_e4m3fn
    assert (record.global_scale is not None) == (name == "nvfp4")


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_scales_that_follow_from_the_weights_are_not_learned(name):
    layer = quantized("fp", {"format": name})
    assert scale_parameters(layer) == [] and [n for n, _ in layer.named_parameters()] == [
        "parametrizations.weight.original"
    ]
    grad = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))
    layer.weight.backward(grad)
    assert torch.equal(master_weight(layer).grad, grad)


def test_the_learned_scales_gradient_is_that_of_fixed_codes():
    layer = quantized("fp", {})
    own = quantizer_of(layer)
    with torch.no_grad():
        own.scale.mul_(0.5)  # so that some weights are clipped
    weight, scale = linear().weight.detach().double(), own.scale.detach().double()
    u = (linear().weight.detach() / own.scale.detach()).double()
    inside = u.abs() <= 448
    code = u.clamp(-448, 448).float().to(torch.float8_e4m3fn).double()
    assert (~inside).any()
    grad = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(3))
    layer.weight.backward(grad)

    def value(a):
        return (grad.double() * torch.where(inside, weight + a * (code - u), a * code)).sum()

    exact = slope(value, scale) / math.sqrt(OUT * IN * 448)
    assert torch.allclose(own.scale.grad.double(), exact, rtol=1e-3, atol=1e-5)
    assert torch.equal(master_weight(layer).grad, grad * inside)


@pytest.mark.parametrize("seed", range(5))
def test_the_first_gradient_does_not_hang_on_a_scales_last_bit(seed):
    """A tile's largest weight starts on the end of the grid, and beyond it the gradient is another."""
    grad = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(4))
    found = []
    for towards in (0.0, 1.0, None):
        layer = quantized("fp", {}, seed=seed)
        own = quantizer_of(layer)
        if towards is not None:
            own.scale.data = torch.nextafter(own.scale.data, torch.tensor(towards))
        layer.weight.backward(grad)
        assert torch.equal(master_weight(layer).grad, grad), "nothing is clipped"
        found.append(own.scale.grad)
    torch.testing.assert_close(found[0], found[2], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found[1], found[2], rtol=1e-3, atol=1e-6)
