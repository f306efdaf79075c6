"""Rounding that sets in: its formula and gradients in float64, its schedule, and that it leaves nothing behind."""

from __future__ import annotations

import pytest
import torch

from angelslim.base.errors import ConfigError
from angelslim.methods.base import make_quantizer
from angelslim.methods.qat._phase import left_over, phased
from angelslim.methods.qat.base import master_weight, merge, set_progress
from angelslim.numerics.lowbit.record import LowBit

from .helpers import EXACT, IN, NAMES, OUT, VARIANTS, linear, quantized, quantizer_of

EVERY = pytest.mark.parametrize(
    ("name", "options"),
    [(n, {**o, "anneal": "none"} if n == "sherry" else o) for n, o in VARIANTS],
    ids=NAMES,
)


def test_the_gradients_are_those_of_the_formula():
    made = torch.Generator().manual_seed(0)
    values, weight = (
        torch.randn(3, 4, dtype=torch.float64, generator=made).requires_grad_() for _ in range(2)
    )
    left = torch.tensor(0.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v, w: phased(v, w, left), (values, weight))
    assert torch.allclose(phased(values, weight, left), values + 0.3 * (weight - values), rtol=1e-15)


def test_it_falls_from_one_to_zero_and_stays_there():
    found = [left_over(step, 40, 0.25) for step in range(41)]
    assert found[0] == 1 and found[5] == 0.5 and set(found[10:]) == {0.0}
    assert found == sorted(found, reverse=True)


@EVERY
def test_the_first_step_sees_the_model_as_it_was(name, options):
    layer = quantized(name, {**options, "phase_in": 0.5}, bias=True)
    set_progress(layer, 0, 100)
    plain, found = linear(bias=True).weight, layer.weight
    assert (found - plain).abs().max() < 1e-7


@EVERY
def test_in_between_it_is_a_mixture_and_at_the_end_nothing_but_rounded(name, options):
    layer = quantized(name, {**options, **(EXACT if name != "fp" else {}), "phase_in": 0.5})
    rounded, weight = layer.weight.detach().double(), linear().weight.detach().double()
    set_progress(layer, 30, 100)
    assert torch.allclose(layer.weight.double(), 0.6 * rounded + 0.4 * weight, rtol=1e-5, atol=1e-8)
    assert torch.equal(layer.eval().weight.double(), rounded), "evaluations see what will be exported"
    layer.train()
    for step in (50, 75, 100):
        set_progress(layer, step, 100)
        assert torch.equal(layer.weight.double(), rounded)


def test_a_straight_through_quantizer_has_the_whole_gradient_at_any_time():
    layer = quantized("twn", {"phase_in": 0.5})
    for step in (0, 20, 60):
        set_progress(layer, step, 100)
        grad = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(step))
        master_weight(layer).grad = None
        layer.weight.backward(grad)
        torch.testing.assert_close(master_weight(layer).grad, grad)


def test_clipped_weights_come_back_while_rounding_sets_in():
    layer = quantized("seq", {"phase_in": 0.5})
    quantizer = quantizer_of(layer)
    with torch.no_grad():
        quantizer.scale.div_(4)
    set_progress(layer, 20, 100)
    layer.weight.backward(torch.ones(OUT, IN))
    clipped = (master_weight(layer).abs() > 0.99 * quantizer.scale).reshape(OUT, IN)
    assert clipped.any()
    assert torch.allclose(master_weight(layer).grad[clipped], torch.tensor(0.6))
    assert torch.allclose(master_weight(layer).grad[~clipped], torch.tensor(1.0))


def test_a_run_that_stops_early_still_yields_ternary_weights():
    layer = quantized("twn", {"phase_in": 1.0})
    set_progress(layer, 10, 100)
    record = merge(layer)[""]
    assert isinstance(record, LowBit) and set(record.codes.unique().tolist()) == {-1, 0, 1}
    assert torch.equal(layer.weight, record.dequantize())


def test_it_is_part_of_the_state_and_of_no_other_layer():
    layer = quantized("twn", {"phase_in": 0.5})
    set_progress(layer, 10, 100)
    other = quantized("twn", {"phase_in": 0.5}, seed=3)
    other.load_state_dict(layer.state_dict())
    assert quantizer_of(other).unrounded == pytest.approx(0.8)
    assert not [key for key in quantized("twn", {}).state_dict() if "unrounded" in key]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phase_in": 1.5}, "phase_in is 1.5"),
        ({"phase_in": "half"}, "phase_in"),
        ({"phase_in": 0.5, "anneal": "linear"}, "two ways"),
        ({"ends": 0.05}, "before the end of the warmup"),
        ({"compile": "yes"}, "compile is 'yes'"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        make_quantizer("sherry", options)
