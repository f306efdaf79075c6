"""Sherry against float64: 3:4 signs, and an addition that fades with optimizer steps and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from angelslim.methods.qat.base import master_weight, merge, set_progress
from angelslim.numerics.lowbit.reference import sparse_tile
from angelslim.numerics.lowbit.sparse34 import decode34, encode34, is_encodable

from .helpers import EXACT, IN, OUT, inputs, linear, quantized, quantizer_of

OPTIONS = {"group_size": 16, **EXACT}


def reference(weight: torch.Tensor) -> torch.Tensor:
    values = torch.zeros(weight.shape, dtype=torch.float64)
    for row, line in enumerate(weight.tolist()):
        for start in range(0, IN, 16):
            scale, codes = sparse_tile(line[start : start + 16])
            values[row, start : start + 16] = scale * torch.tensor(codes)
    return values


def middle() -> torch.nn.Linear:
    layer = quantized("sherry", {**OPTIONS, "anneal": "linear"})
    set_progress(layer, 55, 100)
    return layer


def test_without_arenas_it_computes_with_sparse_signs():
    layer = quantized("sherry", {**OPTIONS, "anneal": "none"})
    set_progress(layer, 55, 100)
    exact = reference(linear().weight)
    assert torch.allclose(layer.weight.double(), exact, rtol=1e-5, atol=1e-9)
    layer.weight.backward(torch.ones(OUT, IN))
    assert torch.equal(master_weight(layer).grad, torch.ones(OUT, IN)), "all four of a four are trained"


def test_arenas_adds_the_weight_within_one_product():
    layer, x = middle(), inputs().requires_grad_(True)
    share, weight = 0.5, linear().weight.detach().double()
    mixed = reference(weight) + share * weight
    with FlopCounterMode(display=False) as counter:
        out = layer(x)
    assert counter.get_total_flops() == 2 * len(x) * OUT * IN
    assert torch.allclose(out.double(), x.detach().double() @ mixed.T, rtol=1e-4, atol=1e-6)
    grad = torch.randn(len(x), OUT, generator=torch.Generator().manual_seed(2))
    out.backward(grad)
    assert torch.allclose(x.grad.double(), grad.double() @ mixed, rtol=1e-4, atol=1e-6)
    exact = (1 + share) * grad.double().T @ x.detach().double()
    assert torch.allclose(master_weight(layer).grad.double(), exact, rtol=1e-4, atol=1e-4)


def test_the_addition_counts_optimizer_steps_only():
    layer = middle()
    share = quantizer_of(layer).share.clone()
    for _ in range(7):
        checkpoint(layer, inputs(), use_reentrant=False).sum().backward()
        layer.eval()(inputs())
        layer.train()
    assert torch.equal(quantizer_of(layer).share, share) and share == pytest.approx(0.5)


def test_evaluations_see_what_will_be_exported():
    layer = middle()
    layer.eval()
    assert torch.allclose(layer.weight.double(), reference(linear().weight), rtol=1e-5, atol=1e-9)


def test_a_run_that_stops_early_still_yields_sparse_signs():
    layer = middle()
    assert layer.weight.unique().numel() > 100
    record = merge(layer)[""]
    assert is_encodable(record.codes) and torch.equal(decode34(encode34(record.codes)), record.codes)
    assert layer.weight.unique().numel() <= 1 + 2 * record.scale.numel()


def test_weights_of_zero_are_encodable_too():
    layer = quantized("sherry", OPTIONS)
    with torch.no_grad():
        master_weight(layer)[:, ::3] = 0
        master_weight(layer)[0] = 0
    assert is_encodable(merge(layer)[""].codes)


def test_the_step_is_part_of_the_state():
    layer, other = middle(), quantized("sherry", {**OPTIONS, "anneal": "linear"}, seed=4)
    assert quantizer_of(other).share == 0
    other.load_state_dict(layer.state_dict())
    assert quantizer_of(other).share == quantizer_of(layer).share == pytest.approx(0.5)
