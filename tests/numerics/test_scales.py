"""Stored group scales against their definitions, one number at a time."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from angelslim.numerics.compensate import Hessian, factorize, gptq, output_error
from angelslim.numerics.quantize import outer_of, quantize, round_to, scales_from_range, tile_range
from angelslim.numerics.scales import (
    e4m3_numbers,
    e8m0_bytes,
    from_e4m3,
    from_e8m0,
    global_scale,
    stored_scales,
)
from angelslim.numerics.scheme import PRESETS

NV, MX4, MX8 = (PRESETS[name].weight for name in ("nvfp4", "mxfp4", "mxfp8"))


def magnitudes() -> torch.Tensor:
    """Every size a float32 can have, and both sides of the places where rounding turns."""
    powers = torch.logspace(-44, 38, 4000)
    turns = torch.tensor([1.0, 1.75, 1.9999999])[:, None] * 2.0 ** torch.arange(-126, 127)
    around = torch.cat([turns, turns.nextafter(torch.tensor(0.0)), turns.nextafter(torch.tensor(math.inf))])
    return torch.cat([torch.zeros(1), powers, around.flatten()])[None]


@pytest.mark.parametrize("quant, top", [(MX4, 2), (MX8, 8)], ids=["fp4", "fp8"])
def test_powers_of_two_cover_the_largest_magnitude(quant, top):
    amax = magnitudes()
    scale = stored_scales(amax, quant)
    for size, found in zip(amax[0].tolist(), scale[0].tolist(), strict=True):
        assert found > 0 and Fraction(found).numerator & (Fraction(found).numerator - 1) == 0
        if size < 2.0**-100:
            continue
        exponent = (
            math.floor(math.log2(size) + 1e-12)
            if size != 2.0 ** round(math.log2(size))
            else round(math.log2(size))
        )
        mantissa = Fraction(size) / Fraction(2) ** exponent
        exponent += (mantissa >= Fraction(7, 4)) - (mantissa < 1)
        assert found == 2.0 ** (exponent - top), size
        assert size / found <= 448 if top == 8 else size / found < 7


def test_exponent_bytes_are_exact_both_ways():
    bytes_ = torch.arange(255, dtype=torch.uint8)[None]
    powers = from_e8m0(bytes_)
    assert [math.log2(value) for value in powers[0].tolist()] == [exponent - 127 for exponent in range(255)]
    assert torch.equal(e8m0_bytes(powers), bytes_)


def test_exponents_of_all_magnitudes_survive_the_file():
    for quant in (MX4, MX8):
        scale = stored_scales(magnitudes(), quant)
        assert torch.equal(from_e8m0(e8m0_bytes(scale)), scale)


def test_the_largest_group_of_nvfp4_has_the_scale_448():
    values = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    quantized = quantize(values, NV)
    outer = quantized.global_scale
    assert outer.shape == (1, 1) and outer.item() == pytest.approx(448 * 6 / values.abs().max().item())
    numbers = e4m3_numbers(quantized.scale, outer)
    assert numbers.float().max() == 448
    assert torch.equal(from_e4m3(numbers, outer), quantized.scale)


def test_every_number_over_any_global_scale_survives_the_file():
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)[None]
    for outer in torch.logspace(-6, 30, 500).reshape(-1, 1, 1):
        assert torch.equal(
            e4m3_numbers(from_e4m3(codes, outer), outer).view(torch.uint8), codes.view(torch.uint8)
        )


@pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-30, 3e38])
def test_global_scales_are_finite(amax):
    outer = global_scale(torch.tensor([[amax]]), NV)
    assert outer.isfinite().all() and (outer > 0).all()
    scale = stored_scales(torch.tensor([[amax]]), NV)
    assert scale.isfinite().all() and (scale > 0).all()


def test_a_shared_global_scale_is_that_of_the_largest_member():
    small, large = torch.randn(8, 32) * 0.01, torch.randn(8, 32)
    outer = outer_of(*tile_range(torch.cat([small, large]), NV.granularity), NV)
    own = quantize(large, NV)
    assert torch.equal(quantize(large, NV, global_scale=outer).scale, own.scale)
    shared = quantize(small, NV, global_scale=outer)
    assert torch.equal(shared.global_scale, own.global_scale)
    error = (shared.dequantize() - small).norm() / small.norm()
    assert error < 1.1 * (quantize(small, NV).dequantize() - small).norm() / small.norm()


def test_an_outer_scale_given_for_a_shrunken_range_stays():
    low, high = tile_range(torch.randn(4, 64), NV.granularity)
    outer = outer_of(low, high, NV)
    clipped, _ = scales_from_range(low * 0.5, high * 0.5, NV, outer=outer)
    numbers = e4m3_numbers(clipped, outer)
    assert torch.equal(from_e4m3(numbers, outer), clipped) and numbers.float().max() == 224


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8", "w4a8_fp8"])
def test_gptq_keeps_stored_scales_and_loses_less_of_the_output(name):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    weight = torch.randn(48, 128, generator=generator)
    hessian = Hessian(128)
    hessian.update(inputs)
    factor = factorize(hessian)
    assert factor is not None
    rounded = quantize(weight, PRESETS[name].weight)
    better = gptq(weight, factor, rounded)
    assert torch.equal(better.scale, rounded.scale)
    assert (better.global_scale is None) == (name != "nvfp4")
    assert torch.equal(round_to(better.codes.float(), better.quant.format).float(), better.codes.float())
    assert output_error(weight, better, hessian.matrix) < 0.8 * output_error(weight, rounded, hessian.matrix)
