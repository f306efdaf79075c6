"""SEQ against float64: levels, first ranges, both gradients, and what the published code gets wrong."""

from __future__ import annotations

import math

import pytest
import torch

from angelslim.methods.qat.base import master_weight, merge
from angelslim.numerics.lowbit.tiles import tiled
from angelslim.numerics.scheme import PER_CHANNEL, PER_TENSOR, per_group

from .helpers import EXACT, IN, OUT, inputs, linear, quantized, quantizer_of, slope

LEVELS = {2: [-0.75, -0.25, 0.25, 0.75], "ternary": [-2 / 3, 0.0, 2 / 3]}
GRAINS = {"tensor": PER_TENSOR, "channel": PER_CHANNEL, "group": per_group(16)}
widths = pytest.mark.parametrize("bits", [2, "ternary"])


def made(bits, grain="channel", share=1.0, **options):
    layer = quantized("seq", {"bits": bits, "granularity": grain, "group_size": 16, **EXACT, **options})
    with torch.no_grad():
        quantizer_of(layer).scale.mul_(share)
    return layer


def nearest(bits, layer, grain="channel"):
    """Levels over a, u, and a, all float64 tiles."""
    tiles = tiled(linear().weight.detach(), GRAINS[grain]).double()
    span = quantizer_of(layer).scale.detach().double()[..., None]
    levels = torch.tensor(LEVELS[bits], dtype=torch.float64)
    u = tiles / span
    return levels[(u[..., None] - levels).abs().argmin(-1)], u, span


@widths
@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_layer_computes_with_the_nearest_levels(bits, grain, share):
    layer = made(bits, grain, share)
    level, _, span = nearest(bits, layer, grain)
    assert torch.allclose(layer.weight.double().view_as(level), level * span, rtol=1e-6, atol=1e-9)


@widths
@pytest.mark.parametrize("grain", GRAINS)
def test_ranges_start_at_the_largest_magnitude_and_not_at_one(bits, grain):
    layer = made(bits, grain)
    tiles = tiled(linear().weight.detach(), GRAINS[grain])
    assert torch.equal(quantizer_of(layer).scale, tiles.abs().amax(-1))
    error = (layer.weight - linear().weight).norm() / linear().weight.norm()
    assert error < 0.8 and (layer.weight != 0).float().mean() > 0.1


@widths
@pytest.mark.parametrize("grain", GRAINS)
def test_fitted_ranges_lose_least(bits, grain):
    layer = made(bits, grain, init="fit")
    weight = linear().weight.detach()
    tiles, span = (
        tiled(weight, GRAINS[grain]).double(),
        quantizer_of(layer).scale.detach().double()[..., None],
    )
    levels = torch.tensor(LEVELS[bits], dtype=torch.float64)

    def error(a):
        return ((tiles / a)[..., None] - levels).abs().amin(-1).mul(a).square().sum(-1, keepdim=True)

    largest = tiles.abs().amax(-1, keepdim=True)
    every = torch.stack([error(largest * part / 32) for part in range(1, 33)])
    torch.testing.assert_close(error(span), every.amin(0), rtol=1e-4, atol=0)
    assert (span <= largest).all() and (layer.weight - weight).norm() < (
        made(bits, grain).weight - weight
    ).norm()


@widths
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_ranges_gradient_is_that_of_the_emitted_levels(bits, share):
    layer = made(bits, share=share)
    level, u, span = nearest(bits, layer)
    out_grad = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(3))
    layer.weight.backward(out_grad)
    inside = u.abs() <= 0.99
    assert share == 1.0 or (~inside).sum() > 20

    def value(a):  # rounding as a constant offset inside, the fixed level outside
        return (out_grad.double()[:, None] * torch.where(inside, u * span + a * (level - u), a * level)).sum()

    exact = slope(value, span)[..., 0] / math.sqrt(OUT * IN)
    assert torch.allclose(quantizer_of(layer).scale.grad.double(), exact, rtol=1e-4, atol=1e-7)
    assert torch.equal(master_weight(layer).grad, out_grad * inside.view(OUT, IN))


def test_the_published_gradient_differs_for_clipped_ternary_weights_only():
    grad = torch.ones(OUT, IN)
    for bits, share in ((2, 0.5), ("ternary", 2.0), ("ternary", 0.5)):
        both = []
        for kind in ("corrected", "published"):
            layer = made(bits, share=share, gradient=kind)
            layer.weight.backward(grad)
            both.append(quantizer_of(layer).scale.grad)
        if (bits, share) != ("ternary", 0.5):
            assert torch.equal(*both)
            continue
        _, u, _ = nearest(bits, layer)
        outside = (u.sign() * (u.abs() > 0.99)).sum(-1) / math.sqrt(OUT * IN)
        assert outside.abs().max() > 0
        assert torch.allclose((both[1] - both[0]).double(), outside / 3, atol=1e-6)


def test_scales_can_be_trained_while_the_weights_are_frozen():
    layer = made(2)
    master_weight(layer).requires_grad_(False)
    layer(inputs()).square().sum().backward()
    assert master_weight(layer).grad is None and quantizer_of(layer).scale.grad.abs().max() > 0


@widths
def test_a_range_below_zero_keeps_a_gradient_and_finite_weights(bits):
    layer = made(bits, share=-1.0)
    layer(inputs()).square().sum().backward()
    assert layer.weight.isfinite().all() and quantizer_of(layer).scale.grad.abs().min() > 0


def test_records_hold_the_codes_of_the_files():
    record = merge(made(2))[""]
    assert record.levels == "seq2" and set(record.codes.unique().tolist()) == {0, 1, 2, 3}
    record = merge(made("ternary"))[""]
    assert record.levels == "ternary" and set(record.codes.unique().tolist()) == {-1, 0, 1}
