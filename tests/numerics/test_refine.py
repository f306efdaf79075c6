"""Searched scales, descent and aims against float64 loops, and what has to hold for any weight."""

from __future__ import annotations

import pytest
import torch

from angelslim.numerics import compensate, refine
from angelslim.numerics.clip import clip_range
from angelslim.numerics.compensate import Hessian, factorize
from angelslim.numerics.quantize import Quantized, quantize, quantize_with, spread, tile_of
from angelslim.numerics.scheme import FORMATS, PER_CHANNEL, PER_TENSOR, PRESETS, Quant, per_block, per_group

OUT, IN = 6, 96
INT4 = FORMATS["int4"]
QUANTS = {
    "int4 groups": Quant(INT4, per_group(32)),
    "int4 groups asymmetric": Quant(INT4, per_group(16), symmetric=False),
    "int4 channel": Quant(INT4, PER_CHANNEL),
    "int8 channel": Quant(FORMATS["int8"], PER_CHANNEL),
}
OTHERS = {
    "fp8 tensor": Quant(FORMATS["fp8_e4m3"], PER_TENSOR),
    "fp8 block": Quant(FORMATS["fp8_e4m3"], per_block(4, 40)),  # ragged in both directions
    "nvfp4": PRESETS["nvfp4"].weight,
    "mxfp4": PRESETS["mxfp4"].weight,
    "fp8 scales": Quant(INT4, per_group(32), scale="fp8_channel"),
}


def weights(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(OUT, IN, generator=generator) * 0.05
    return values * (1 + 3 * (torch.rand(OUT, IN, generator=generator) < 0.03))


def inputs(tokens: int = 400, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(IN, IN, generator=generator) / IN**0.5
    return torch.randn(tokens, IN, generator=generator) @ mix * torch.rand(IN, generator=generator)


def hessian_of(values: torch.Tensor, originals: torch.Tensor | None = None) -> Hessian:
    hessian = Hessian(IN)
    hessian.update(values, originals)
    return hessian


def lost(weight: torch.Tensor, quantized: Quantized, matrix: torch.Tensor) -> float:
    error = weight.double() - quantized.dequantize().double()
    return float(((error @ matrix.double()) * error).sum())


def damped(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    return matrix.double() + damping * matrix.diagonal().double().mean() * torch.eye(IN, dtype=torch.float64)


# ------------------------------------------------------------------------------------------- before rounding


def test_importance_is_the_cost_that_no_later_column_makes_up_for():
    hessian = hessian_of(inputs())
    factor = factorize(hessian)
    matrix, cost = damped(hessian.matrix, factor.damping), refine.importance(factor)
    for place in (0, 1, 40, IN - 1):
        column, rest = factor.order[place], factor.order[place + 1 :]
        explained = matrix[column, rest] @ torch.linalg.solve(matrix[rest][:, rest], matrix[rest, column])
        assert cost[column].item() == pytest.approx((matrix[column, column] - explained).item(), rel=1e-3)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", QUANTS)
def test_scales_are_the_best_of_all_candidates(name, signed):
    quant, weight, cost = QUANTS[name], weights(), refine.importance(factorize(hessian_of(inputs())))
    scale, zero = refine.searched(weight, quant, cost, torch.bfloat16, signed=signed)
    grid, width = quant.format, tile_of(quant.granularity, (OUT, IN))[1]
    for row in range(OUT):
        for tile in range(IN // width):
            part = slice(tile * width, (tile + 1) * width)
            values = weight[row, part].double()
            low, high = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
            candidates = []
            for step in range(refine.STEPS):
                share = 1 - (1 - refine.SHRINK) * step / (refine.STEPS - 1)
                top = max(-low, high) * share
                ranges = [top / ((grid.high - grid.low) / 2)]
                if not quant.symmetric:
                    ranges = [(high - low) * share / (grid.high - grid.low)]
                elif signed:
                    ranges.append((-top if high > -low else top) / -grid.low)
                for wanted in ranges:
                    s = torch.tensor(wanted, dtype=torch.float64).bfloat16().double()
                    z = (
                        0.0
                        if quant.symmetric
                        else (grid.low - low * share / s).round().clamp(grid.low, grid.high)
                    )
                    restored = ((values / s + z).round().clamp(grid.low, grid.high) - z) * s
                    candidates.append(((values - restored).square() * cost[part].double()).sum().item())
            s = scale[row, tile].double()
            z = 0.0 if zero is None else zero[row, tile].double()
            restored = ((values / s + z).round().clamp(grid.low, grid.high) - z) * s
            found = ((values - restored).square() * cost[part].double()).sum().item()
            assert found <= min(candidates) * (1 + 1e-4) + 1e-12


def test_the_long_end_of_the_grid_goes_to_the_largest_weight():
    weight = torch.tensor([[0.8, -0.1, 0.2, 0.1] * 24, [-0.8, 0.1, -0.2, 0.1] * 24])
    quant = Quant(INT4, per_group(32))
    scale, _ = refine.searched(weight, quant, torch.ones(IN), torch.float32, signed=True, steps=1)
    plain, _ = refine.searched(weight, quant, torch.ones(IN), torch.float32, steps=1)
    assert (scale[0] < 0).all() and (scale[1] > 0).all() and (plain > 0).all()
    exact = quantize_with(weight, scale, None, quant).dequantize()
    assert exact[0, 0] == pytest.approx(0.8) and exact[1, 0] == pytest.approx(-0.8)


@pytest.mark.parametrize("name", OTHERS)
def test_other_numbers_are_left_to_clipping(name):
    quant, weight, cost = OTHERS[name], weights(), torch.rand(IN) + 0.1
    plain = quantize(weight, quant)
    found = refine.searched(weight, quant, cost, torch.float32, signed=True, outer=plain.global_scale)
    expected = clip_range(weight, quant, cost, torch.float32, plain.global_scale)
    assert torch.equal(found[0], expected[0]) and found[1] is expected[1] is None


# -------------------------------------------------------------------------------------------- after rounding


def slow_descent(weight, rounded, matrix, passes):
    """The definition, in float64: each tile's scale, then each of its columns, with everything recomputed."""
    quant = rounded.quant
    tile = tile_of(quant.granularity, (OUT, IN))
    codes, scale = rounded.codes.double(), rounded.scale.double()
    zero = 0.0 if rounded.zero is None else spread(rounded.zero.double(), tile, (OUT, IN))
    exact = weight.double()
    for _ in range(passes):
        for start in range(0, IN, tile[1]):
            part, number = slice(start, start + tile[1]), start // tile[1]
            for row in range(OUT):
                offsets = torch.zeros(IN, dtype=torch.float64)
                offsets[part] = (codes - zero)[row, part]
                error = exact[row] - ((codes - zero) * spread(scale, tile, (OUT, IN)))[row]
                slope, curve = error @ matrix @ offsets, offsets @ matrix @ offsets
                wanted = (scale[row, number] + slope / curve).to(rounded.scale.dtype).double()
                after = error - (wanted - scale[row, number]) * offsets
                if after @ matrix @ after < error @ matrix @ error and 0.5 < wanted / scale[row, number] < 2:
                    scale[row, number] = wanted
            for column in range(start, start + tile[1]):
                values = (codes - zero) * spread(scale, tile, (OUT, IN))
                best = values[:, column] + ((exact - values) @ matrix)[:, column] / matrix[column, column]
                at = zero if rounded.zero is None else zero[:, column]
                place = best / scale[:, number] + at
                codes[:, column] = place.round().clamp(quant.format.low, quant.format.high)
    return codes, scale


@pytest.mark.parametrize("name", QUANTS)
def test_descent_is_that_of_the_definition(name):
    weight, hessian = weights(), hessian_of(inputs())
    factor = factorize(hessian)
    rounded = compensate.gptq(weight, factor, quantize(weight, QUANTS[name], torch.bfloat16))
    found = refine.descended(weight, rounded, hessian.matrix, damping=0.05, passes=2)
    codes, scale = slow_descent(weight, rounded, damped(hessian.matrix, 0.05), 2)
    assert torch.equal(found.codes.double(), codes) and torch.equal(found.scale.double(), scale)
    assert found.scale.dtype == torch.bfloat16 and found.zero is rounded.zero


@pytest.mark.parametrize("name", [*QUANTS, *OTHERS])
def test_every_pass_loses_less(name):
    weight, hessian = weights(), hessian_of(inputs())
    quant = {**QUANTS, **OTHERS}[name]
    now = compensate.gptq(weight, factorize(hessian), quantize(weight, quant))
    for passes in range(3):
        after = refine.descended(weight, now, hessian.matrix, passes=1)
        before, left = lost(weight, now, hessian.matrix), lost(weight, after, hessian.matrix)
        assert left <= before * (1 + 1e-5)
        assert passes or left < 0.97 * before
        if name in OTHERS:
            assert torch.equal(after.scale, now.scale) and after.global_scale is now.global_scale
        now = after


def test_negative_scales_stay_negative():
    weight, hessian, quant = weights(), hessian_of(inputs()), QUANTS["int4 groups"]
    factor = factorize(hessian)
    scale, _ = refine.searched(weight, quant, refine.importance(factor), torch.bfloat16, signed=True)
    rounded = compensate.gptq(weight, factor, quantize_with(weight, scale, None, quant))
    after = refine.descended(weight, rounded, hessian.matrix)
    assert (scale < 0).any() and torch.equal(after.scale < 0, scale < 0)
    assert not torch.equal(after.scale, scale)


@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_dead_inputs_and_empty_tiles_do_no_harm(damping):
    values, weight = inputs(), weights()
    values[:, 32:64] = 0  # a whole group never seen
    weight[2] = 0
    hessian, quant = hessian_of(values), QUANTS["int4 groups"]
    rounded = quantize(weight, quant)
    after = refine.descended(weight, rounded, hessian.matrix, damping=damping)
    assert after.dequantize().isfinite().all()
    assert not after.codes[2].any()
    nearest = quantize_with(weight, after.scale, None, quant)
    assert torch.equal(after.codes[:, 32:64], nearest.codes[:, 32:64])


# ------------------------------------------------------------------------------------------------------ aims


def test_an_aimed_weight_is_the_least_squares_answer():
    values = inputs(2000)
    originals = values + 0.2 * inputs(2000, seed=5)
    weight, hessian = weights(), hessian_of(values, originals)
    factor = factorize(hessian, alpha=0.0)
    assert factor.drift is None
    found = refine.aimed(weight, hessian, factor, 1.0)
    matrix, drift = damped(hessian.matrix, factor.damping), hessian.drift.double()
    expected = weight.double() + torch.linalg.solve(matrix, (weight.double() @ drift).T).T
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)
    aim = originals @ weight.T
    assert (aim - values @ found.T).norm() < (aim - values @ weight.T).norm()
    torch.testing.assert_close(
        refine.aimed(weight, hessian, factor, 0.5), (found + weight) / 2, rtol=1e-5, atol=1e-6
    )
    assert torch.equal(refine.aimed(weight, hessian_of(values), factor, 1.0), weight)
