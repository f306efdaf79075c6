"""Tequila against float64: the dead zone's bias, its gradient, and the merge that has no publication."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from angelslim.methods.qat.base import master_weight, merge, set_progress
from angelslim.numerics.lowbit.reference import threshold_tile

from .helpers import EXACT, IN, OUT, inputs, linear, quantized, quantizer_of, slope

LAMBDA = 0.05
OPTIONS = {"group_size": 16, "lambda": LAMBDA, **EXACT}


def reference() -> tuple[torch.Tensor, torch.Tensor]:
    """The ternary weight and the dead zone, float64 and bool."""
    values, dead = torch.zeros(OUT, IN, dtype=torch.float64), torch.zeros(OUT, IN, dtype=torch.bool)
    for row, weight in enumerate(linear().weight.tolist()):
        for start in range(0, IN, 16):
            scale, codes = threshold_tile("absmean", weight[start : start + 16])
            values[row, start : start + 16] = scale * torch.tensor(codes)
            dead[row, start : start + 16] = torch.tensor(codes) == 0
    return values, dead


@pytest.mark.parametrize("bias", [False, True])
def test_dead_weights_speak_through_a_bias(bias):
    layer, x = quantized("tequila", OPTIONS, bias), inputs()
    values, dead = reference()
    sums = LAMBDA * (linear(bias).weight.double() * dead).sum(1)
    exact = x.double() @ values.T + sums + (linear(bias).bias.double() if bias else 0)
    assert torch.allclose(layer(x).double(), exact, rtol=1e-4, atol=1e-6)
    assert sums.abs().max() > 1e-3


def test_dead_weights_get_the_papers_second_gradient():
    layer, x = quantized("tequila", OPTIONS), inputs()
    grad = torch.randn(len(x), OUT, generator=torch.Generator().manual_seed(2))
    layer(x).backward(grad)
    _, dead = reference()
    exact = grad.double().T @ x.double() + LAMBDA * grad.double().sum(0)[:, None] * dead
    assert torch.allclose(master_weight(layer).grad.double(), exact, rtol=1e-4, atol=1e-4)
    plain = grad.double().T @ x.double()
    assert (master_weight(layer).grad.double() - plain)[dead].abs().mean() > 0.05


def test_the_row_sums_slope_is_that_of_finite_differences():
    layer = quantized("tequila", OPTIONS)
    grad = torch.randn(OUT, generator=torch.Generator().manual_seed(2))
    quantizer_of(layer).dead_sum(master_weight(layer)).backward(grad)
    _, dead = reference()
    weight = linear().weight.detach().double()
    exact = slope(lambda w: (grad.double() * LAMBDA * (w * dead).sum(1)).sum(), weight, 1e-3)
    assert torch.allclose(master_weight(layer).grad.double(), exact, rtol=1e-4, atol=1e-7)


def test_sums_wait_for_the_layer_and_for_nothing_else():
    """A weight that was read alone, and has changed since, leaves no bias behind; copies have none waiting."""
    layer = quantized("tequila", OPTIONS)
    layer.weight  # noqa: B018 (it is computed)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        master_weight(layer).mul_(2)
    assert torch.allclose(layer.bias, 2 * twin.bias) and twin.bias.grad_fn is not None
    layer.weight  # noqa: B018
    with torch.no_grad():
        assert layer.bias.grad_fn is None


def test_a_weight_without_its_bias_and_a_bias_without_its_weight_have_gradients():
    alone = quantized("tequila", OPTIONS)
    alone.weight.sum().backward()
    assert torch.equal(master_weight(alone).grad, torch.ones(OUT, IN))
    alone = quantized("tequila", OPTIONS)
    alone.bias.sum().backward()
    assert torch.allclose(master_weight(alone).grad, LAMBDA * reference()[1].float())


def test_it_costs_one_matrix_product():
    layer, x = quantized("tequila", OPTIONS), inputs()
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * len(x) * OUT * IN  # forward, and the weight's gradient


def test_merging_makes_an_ordinary_bias():
    layer = quantized("tequila", OPTIONS, bias=True)
    own = linear(bias=True).bias
    record = merge(layer)[""]
    assert torch.allclose(layer.bias, own + record.bias) and record.bias.abs().max() > 1e-3
    assert set(layer.state_dict()) == {"weight", "bias"} and isinstance(layer.bias, torch.nn.Parameter)


def test_lambda_zero_adds_nothing():
    layer = quantized("tequila", {**OPTIONS, "lambda": 0})
    assert layer.bias.abs().max() == 0


def older():
    return quantized("tequila", {**OPTIONS, "variant": "reactivation"})


def test_the_older_form_adds_signs_times_signs():
    layer, x = older(), inputs().requires_grad_(True)
    values, dead = reference()
    signs = LAMBDA * linear().weight.double().sign() * dead
    wide = x.detach().double()
    assert torch.allclose(layer(x).double(), wide @ values.T + wide.sign() @ signs.T, rtol=1e-4, atol=1e-5)
    grad = torch.randn(len(x), OUT, generator=torch.Generator().manual_seed(2))
    layer(x).backward(grad)
    exact = grad.double().T @ wide + LAMBDA * (grad.double().T @ wide.sign()) * dead
    assert torch.allclose(master_weight(layer).grad.double(), exact, rtol=1e-4, atol=1e-4)
    assert torch.allclose(x.grad.double(), grad.double() @ values, rtol=1e-4, atol=1e-5)


def test_the_older_form_is_gone_in_the_end():
    layer, x = older(), inputs()
    plain = quantized("absmean", {"group_size": 16, **EXACT})(x)
    assert not torch.allclose(layer(x), plain)
    set_progress(layer, 10, 10)
    assert torch.equal(layer(x), plain)
    record = merge(layer)[""]
    assert record.bias is None and layer.bias is None and torch.equal(layer(x), plain)
    assert not layer._forward_hooks
