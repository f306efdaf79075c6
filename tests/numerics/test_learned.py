"""Learned rounding against autograd on the formulas of the paper, in float64."""

from __future__ import annotations

import pytest
import torch

from angelslim.numerics import refine
from angelslim.numerics.learned import EDGE, Rounding, step_size
from angelslim.numerics.quantize import quantize, quantize_with, spread, tile_of
from angelslim.numerics.scheme import FORMATS, PER_CHANNEL, Quant, per_group

OUT, IN = 8, 64
QUANTS = {
    "int4 groups": Quant(FORMATS["int4"], per_group(32)),
    "int4 groups asymmetric": Quant(FORMATS["int4"], per_group(16), symmetric=False),
    "int8 channel": Quant(FORMATS["int8"], PER_CHANNEL),
}


def weights(seed: int = 0) -> torch.Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed)) * 0.05


def inputs(seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(200, IN, generator=generator) @ torch.randn(IN, IN, generator=generator) / IN**0.5


def loss_of(quantized, weight, values):
    return (values.double() @ (quantized.double() - weight.double()).T).square().mean()


def by_autograd(weight, rounded, values, sizes):
    """V and the factor after the steps of `sizes`, with straight-through rounding left to autograd."""
    grid, tile = rounded.quant.format, tile_of(rounded.quant.granularity, (OUT, IN))
    shift = torch.zeros(OUT, IN, dtype=torch.float64, requires_grad=True)
    factor = torch.ones(rounded.scale.shape, dtype=torch.float64, requires_grad=True)
    zero = 0.0 if rounded.zero is None else spread(rounded.zero.double(), tile, (OUT, IN))
    for size in sizes:
        scale = spread(rounded.scale.double() * factor, tile, (OUT, IN))
        place = weight.double() / scale + zero + shift
        code = (place + (place.round() - place).detach()).clamp(grid.low, grid.high)
        loss = loss_of((code - zero) * scale, weight, values)
        slopes = torch.autograd.grad(loss, (shift, factor))
        with torch.no_grad():
            shift -= size * slopes[0].sign()
            shift.clamp_(-0.5, 0.5)
            factor -= size * slopes[1].sign()
            factor.clamp_(0.5, 1.0)
    return shift.detach(), factor.detach()


@pytest.mark.parametrize("name", QUANTS)
def test_steps_are_those_of_autograd(name):
    weight, values = weights(), inputs()
    plain = quantize(weight, QUANTS[name])  # its largest weights lie halfway between two codes: a tie
    rounded = quantize_with(weight, plain.scale * 1.03, plain.zero, plain.quant)
    one = Rounding(weight, rounded)
    assert torch.equal(one.value(), rounded.dequantize())
    sizes = [step_size(iteration, 4, 0.1) for iteration in range(4)]
    assert sizes == pytest.approx([0.1, 0.075, 0.05, 0.025])
    for size in sizes:
        now = one.value().requires_grad_(True)
        loss_of(now, weight, values).backward()
        one.step(now.grad, size, size)
    shift, factor = by_autograd(weight, rounded, values, sizes)
    near = (one.shift.view(OUT, IN).double() - shift).abs() < 1e-5
    assert near.float().mean() > 0.995  # a slope of nearly zero may have either sign
    torch.testing.assert_close(one.factor.double(), factor, rtol=1e-5, atol=1e-6)
    assert not torch.equal(one.result().codes, rounded.codes)


@pytest.mark.parametrize("name", [name for name in QUANTS if "int4" in name])
def test_the_result_is_the_value_and_is_better(name):
    weight, values = weights(), inputs()
    rounded = quantize(weight, QUANTS[name], torch.bfloat16)
    one = Rounding(weight, rounded)
    smallest, best = float("inf"), one.state()
    for iteration in range(200):
        now = one.value().requires_grad_(True)
        loss = loss_of(now, weight, values)
        loss.backward()
        if loss.item() < smallest:
            smallest, best = loss.item(), one.state()
        one.step(now.grad, step_size(iteration, 200, 1 / 200), step_size(iteration, 200, 1 / 200))
    one.restore(best)
    found = one.result()
    assert torch.equal(found.dequantize(), one.value())
    assert found.scale.dtype == torch.bfloat16 and found.codes.dtype == rounded.codes.dtype
    assert loss_of(one.value(), weight, values) < 0.92 * loss_of(rounded.dequantize(), weight, values)
    assert one.shift.abs().max() <= 0.5


@pytest.mark.parametrize("signed", [False, True])
def test_it_can_start_at_given_codes(signed):
    weight, quant = weights(), QUANTS["int4 groups"]
    scale, _ = refine.searched(weight, quant, torch.ones(IN), torch.bfloat16, signed=signed)
    nearest = quantize_with(weight, scale, None, quant)
    moved = (nearest.codes + 2 * (torch.rand(OUT, IN) < 0.2)).clamp(-8, 7).to(torch.int8)
    given = quantize_with(weight, scale, None, quant)
    given.codes.copy_(moved)
    one = Rounding(weight, given, start=True)
    assert torch.equal(one.result().codes, moved) and torch.equal(one.result().scale, scale)
    place = one._place(one._steps()) + one.offset
    assert (place.view(OUT, IN) - moved).abs().max() <= EDGE + 1e-5


def test_a_state_can_be_restored():
    weight, rounded = weights(), quantize(weights(), QUANTS["int4 groups"])
    one = Rounding(weight, rounded)
    before = one.state()
    one.step(torch.randn(OUT, IN), 0.5, 0.5)
    assert not torch.equal(one.value(), rounded.dequantize())
    one.restore(before)
    assert torch.equal(one.value(), rounded.dequantize())
