"""GPTQ's arithmetic against slow float64 loops, and what has to hold for any weight."""

from __future__ import annotations

import pytest
import torch

from angelslim.numerics import compensate
from angelslim.numerics.compensate import Hessian, factorize, inverse_factor, output_error
from angelslim.numerics.quantize import quantize, spread, tile_of
from angelslim.numerics.scheme import FORMATS, PER_CHANNEL, PER_TENSOR, Quant, per_block, per_group

OUT, IN = 24, 192  # more than one lazy block of columns
QUANTS = {
    "int4 groups": Quant(FORMATS["int4"], per_group(64)),
    "int4 groups asymmetric": Quant(FORMATS["int4"], per_group(32), symmetric=False),
    "int8 channel": Quant(FORMATS["int8"], PER_CHANNEL),
    "int8 channel asymmetric": Quant(FORMATS["int8"], PER_CHANNEL, symmetric=False),
    "fp8 tensor": Quant(FORMATS["fp8_e4m3"], PER_TENSOR),
    "fp8 block": Quant(FORMATS["fp8_e4m3"], per_block(16, 128)),  # ragged in both directions
}


def weights(seed: int = 0) -> torch.Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed)) * 0.05


def inputs(tokens: int = 600, seed: int = 1) -> torch.Tensor:
    """Correlated inputs whose columns differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(IN, IN, generator=generator) / IN**0.5
    return torch.randn(tokens, IN, generator=generator) @ mix * torch.rand(IN, generator=generator)


def hessian_of(values: torch.Tensor, originals: torch.Tensor | None = None) -> Hessian:
    hessian = Hessian(IN)
    hessian.update(values, originals)
    return hessian


def nearest(value: float, quant: Quant) -> float:
    value = min(max(value, quant.format.low), quant.format.high)
    if quant.format.kind == "int":
        return float(round(value))
    return float(torch.tensor(value, dtype=torch.float32).to(torch.float8_e4m3fn))


def reference(weight, hessian, quant, rounded, *, act_order, alpha=0.0) -> torch.Tensor:
    """The definition, one column at a time, in float64: the weights left are solved for, no factor is shared."""
    exact = hessian.matrix.double()
    order = torch.argsort(exact.diagonal(), descending=True) if act_order else torch.arange(IN)
    damped = exact + compensate.DAMP * exact.diagonal().mean() * torch.eye(IN, dtype=torch.float64)
    damped = damped[order][:, order]
    drift = None if hessian.drift is None else alpha * hessian.drift.double()[order][:, order]
    tile = tile_of(quant.granularity, (OUT, IN))
    scale = spread(rounded.scale.double(), tile, (OUT, IN))
    zero = spread(
        torch.zeros_like(rounded.scale) if rounded.zero is None else rounded.zero, tile, (OUT, IN)
    ).double()
    left, codes = weight.double()[:, order], torch.zeros(OUT, IN, dtype=torch.float64)
    for j, column in enumerate(order):
        value = left[:, j].clone()
        for row in range(OUT):
            wanted = value[row] / scale[row, column] + zero[row, column]
            codes[row, column] = nearest(float(wanted), quant)
        error = value - (codes[:, column] - zero[:, column]) * scale[:, column]
        rest = damped[j + 1 :, j + 1 :]
        # Least squares: the columns left reproduce what column j loses, x_j error, and what drifted, x_j value.
        left[:, j + 1 :] += error[:, None] * torch.linalg.solve(rest, damped[j + 1 :, j])
        if drift is not None:
            left[:, j + 1 :] += value[:, None] * torch.linalg.solve(rest, drift[j, j + 1 :])
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("name", QUANTS)
def test_codes_are_those_of_the_definition(name, act_order):
    quant, weight, hessian = QUANTS[name], weights(), hessian_of(inputs())
    rounded = quantize(weight, quant)
    result = compensate.gptq(weight, factorize(hessian, act_order=act_order), rounded)
    expected = reference(weight, hessian, quant, rounded, act_order=act_order)
    assert torch.equal(result.codes.double(), expected)
    assert not torch.equal(result.codes.float(), rounded.codes.float())


@pytest.mark.parametrize("name", ["int4 groups", "int8 channel asymmetric", "fp8 block"])
def test_gptaq_codes_are_those_of_the_definition(name):
    quant, weight, values = QUANTS[name], weights(), inputs()
    hessian = hessian_of(values, values + 0.1 * inputs(seed=5))
    rounded = quantize(weight, quant)
    result = compensate.gptq(weight, factorize(hessian, alpha=0.7), rounded)
    expected = reference(weight, hessian, quant, rounded, act_order=True, alpha=0.7)
    assert torch.equal(result.codes.double(), expected)


@pytest.mark.parametrize("name", QUANTS)
def test_uncorrelated_inputs_give_rounding_to_nearest(name):
    quant, weight = QUANTS[name], weights()
    hessian = hessian_of(torch.eye(IN))
    rounded = quantize(weight, quant)
    result = compensate.gptq(weight, factorize(hessian), rounded)
    assert torch.equal(result.codes.float(), rounded.codes.float())
    assert result.codes.dtype == rounded.codes.dtype and result.scale is rounded.scale


@pytest.mark.parametrize("alpha", [0.0, 0.7])
@pytest.mark.parametrize("rows", [(24, 8, 8), (300, 40), (1, 24)])
@pytest.mark.parametrize("names", [[name] for name in QUANTS] + [list(QUANTS)])
def test_weights_rounded_together_get_the_codes_that_each_gets_alone(names, rows, alpha):
    """Of one scheme, and of schemes that differ in grid, zero points and tiles."""
    values = inputs()
    factor = factorize(hessian_of(values, values + 0.2 * values.roll(1, 1)), alpha=alpha)
    given = [torch.randn(count, IN, generator=torch.Generator().manual_seed(count)) * 0.05 for count in rows]
    given = given * len(names)
    rounded = [
        quantize(weight, QUANTS[names[number % len(names)]], torch.bfloat16)
        for number, weight in enumerate(given)
    ]
    found = compensate.together(given, factor, rounded)
    for weight, start, result in zip(given, rounded, found, strict=True):
        alone = compensate.gptq(weight, factor, start)
        assert torch.equal(result.codes.float(), alone.codes.float())
        assert result.scale is start.scale and result.zero is start.zero and result.quant == start.quant


@pytest.mark.parametrize("name", QUANTS)
def test_less_of_the_output_is_lost_than_by_rounding(name):
    quant, weight, hessian = QUANTS[name], weights(), hessian_of(inputs())
    rounded = quantize(weight, quant)
    result = compensate.gptq(weight, factorize(hessian), rounded)
    assert output_error(weight, result, hessian.matrix) < 0.9 * output_error(weight, rounded, hessian.matrix)


def test_gptaq_brings_outputs_closer_to_the_originals():
    quant, weight, values = QUANTS["int4 groups"], weights(), inputs(2000)
    originals = values + 0.2 * values.roll(1, 1)  # as much as a linear correction can see
    aimed, plain = hessian_of(values, originals), hessian_of(values)
    rounded = quantize(weight, quant)
    lost = []
    for hessian in (aimed, plain):
        result = compensate.gptq(weight, factorize(hessian, alpha=1.0), rounded)
        lost.append((originals @ weight.T - values @ result.dequantize().T).norm())
    assert lost[0] < 0.8 * lost[1]


def test_equal_originals_give_gptq():
    weight, values = weights(), inputs()
    rounded = quantize(weight, QUANTS["int4 groups"])
    results = [
        compensate.gptq(weight, factorize(hessian_of(values, originals), alpha=1.0), rounded).codes
        for originals in (values, None)
    ]
    assert torch.equal(*results)


def test_output_error_is_that_of_the_outputs():
    weight, values = weights(), inputs()
    rounded = quantize(weight, QUANTS["int4 groups"])
    exact, after = values @ weight.T, values @ rounded.dequantize().T
    expected = ((exact - after).norm() / exact.norm()).item()
    assert output_error(weight, rounded, hessian_of(values).matrix) == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------------------- the Hessian


@pytest.mark.parametrize("sizes", [(600,), (1, 599), (7,) * 85 + (5,), (300, 0, 300)])
def test_a_hessian_does_not_depend_on_how_tokens_are_split(sizes):
    values, originals = inputs(), inputs(seed=3)
    hessian = Hessian(IN)
    for part, other in zip(values.split(list(sizes)), originals.split(list(sizes)), strict=True):
        hessian.update(part, other)
    assert hessian.tokens == 600
    exact = values.double()
    torch.testing.assert_close(hessian.matrix.double(), exact.T @ exact / 600, rtol=1e-5, atol=1e-7)
    expected = (originals.double() - exact).T @ exact / 600
    torch.testing.assert_close(hessian.drift.double(), expected, rtol=1e-4, atol=1e-6)
    weight = weights()
    rounded = quantize(weight, QUANTS["int4 groups"])
    whole = compensate.gptq(weight, factorize(hessian_of(values, originals)), rounded)
    assert torch.equal(compensate.gptq(weight, factorize(hessian), rounded).codes, whole.codes)


def test_the_factor_is_that_of_the_damped_inverse():
    matrix = hessian_of(inputs()).matrix
    before = matrix.clone()
    upper, damping = inverse_factor(matrix, 0.01)
    damped = matrix.double() + 0.01 * matrix.diagonal().mean() * torch.eye(IN)
    assert damping == 0.01
    assert torch.equal(upper, upper.triu()) and torch.equal(matrix, before)
    torch.testing.assert_close((upper.T @ upper).double() @ damped, torch.eye(IN).double(), atol=1e-3, rtol=0)


def test_fewer_tokens_than_inputs_are_enough():
    weight, hessian = weights(), hessian_of(inputs(20))
    rounded = quantize(weight, QUANTS["int4 groups"])
    result = compensate.gptq(weight, factorize(hessian), rounded)
    assert output_error(weight, result, hessian.matrix) < 0.5 * output_error(weight, rounded, hessian.matrix)


@pytest.mark.parametrize("least, damping", [(-0.05, 0.1), (-0.5, 1.0), (-2.0, None)])
def test_damping_grows_from_the_undamped_matrix_and_gives_up(least, damping):
    """An eigenvalue of `least` times the mean diagonal needs more damping than that."""
    matrix = torch.diag(torch.tensor([1.0] * 99 + [least]))
    matrix /= matrix.diagonal().mean()
    found = inverse_factor(matrix, 0.01)
    assert (found[1] if found else None) == damping
    if found:
        lowest = matrix[-1, -1] + damping  # compounding 0.01 + 0.1 + 1.0 would give another
        assert found[0][-1, -1].item() == pytest.approx(lowest.item() ** -0.5, rel=1e-4)


def test_a_hopeless_hessian_is_reported():
    hessian = Hessian(IN)
    hessian.update(torch.full((4, IN), torch.nan))
    assert factorize(hessian) is None


@pytest.mark.parametrize("act_order", [True, False])
def test_dead_inputs_are_rounded_to_nearest_and_disturb_nobody(act_order):
    values, weight = inputs(), weights()
    dead = torch.zeros(IN, dtype=torch.bool)
    dead[[0, 5, 70, 190]] = True
    values[:, dead] = 0
    rounded = quantize(weight, QUANTS["int8 channel"])
    factor = factorize(hessian_of(values), act_order=act_order)
    result = compensate.gptq(weight, factor, rounded)
    assert factor.dead == 4
    assert torch.equal(result.codes[:, dead], rounded.codes[:, dead])
    other = weight.clone()
    other[:, dead] = 0.01
    again = compensate.gptq(other, factor, quantize(weight, QUANTS["int8 channel"]))
    assert torch.equal(again.codes[:, ~dead], result.codes[:, ~dead])


def test_inputs_that_are_all_dead_give_rounding_to_nearest():
    weight = weights()
    rounded = quantize(weight, QUANTS["int4 groups"])
    result = compensate.gptq(weight, factorize(hessian_of(torch.zeros(3, IN))), rounded)
    assert torch.equal(result.codes, rounded.codes)


def test_columns_with_large_inputs_come_first():
    hessian = hessian_of(inputs())
    diagonal = hessian.matrix.diagonal()
    ordered = diagonal[factorize(hessian).order]
    assert (ordered.diff() <= 0).all()
    assert torch.equal(factorize(hessian, act_order=False).order, torch.arange(IN))
