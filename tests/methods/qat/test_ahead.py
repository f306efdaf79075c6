"""What is computed before the step is what the step would have computed, and never of a weight that has changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from angelslim.methods.qat import _ahead, _fused
from angelslim.methods.qat.base import master_weight, quantizers, set_progress

from .helpers import IN, NAMES, VARIANTS, inputs, quantized, traced

LAYERS = 5


class Counted:
    """Counts the compiled calls."""

    def __init__(self, real):
        self.real, self.functions = real, []

    def __call__(self, function, *args, **settings):
        self.functions.append(function)
        return self.real(function, *args, **settings)

    def several(self):
        """How many layers were computed together so far, and forget."""
        found = [function.__name__ for function in self.functions]
        self.functions.clear()
        return found


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(_fused, "_ready", {})
    monkeypatch.setattr(_fused, "_broken", set())
    monkeypatch.setattr(_fused, "compile_graph", traced)
    counted = Counted(_fused.run)
    monkeypatch.setattr(_fused, "run", counted)
    return counted


def branches(name, options, choice):
    made = nn.ModuleList(quantized(name, {**options, "compile": choice}, seed=s) for s in range(LAYERS))
    return made.train()


def trained(name, options, choice, steps=4, micro=2):
    """Weights, scales and losses of a short training, micro-batches included."""
    model, losses = branches(name, options, choice), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(steps):
        set_progress(model, step, steps)
        for part in range(micro):
            loss = sum(layer(inputs(8, seed=part)).square().mean() for layer in model)
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, dict(model.named_parameters())


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=NAMES)
def test_a_training_is_the_same(name, options, calls):
    losses, parameters = trained(name, options, "false")
    found, others = trained(name, options, "true")
    assert found == pytest.approx(losses, rel=1e-6)
    for key, value in parameters.items():
        torch.testing.assert_close(others[key], value, rtol=1e-6, atol=1e-8)


def test_one_call_serves_all_layers_and_all_micro_batches(calls):
    trained("twn", {}, "true", steps=1)
    assert calls.several() == ["ternary_values"] * LAYERS * 2, "nothing is known before the first step"
    trained("twn", {}, "true", steps=3)
    assert calls.several()[2 * LAYERS :] == ["several"] * 2


def test_many_layers_are_cut_into_calls_of_one_length(calls, monkeypatch):
    monkeypatch.setattr(_ahead, "TOGETHER", 2)
    trained("sherry", {"group_size": 16, "anneal": "linear"}, "true", steps=2)
    assert calls.several()[2 * LAYERS :] == ["several"] * 2 + ["sparse_values"] * 2, "the fifth is alone"


def test_a_weight_changed_after_the_preparation_is_quantized_again(calls):
    model = branches("twn", {}, "true")
    x = inputs()
    for step in range(2):
        set_progress(model, step, 9)
        [layer(x) for layer in model]
    with torch.no_grad():
        master_weight(model[0]).mul_(2)
        twin = branches("twn", {}, "false")
        master_weight(twin[0]).mul_(2)
    assert torch.equal(model[0](x), twin[0](x))
    calls.several()
    model[1](x)
    assert not calls.several(), "the others are ready"


def test_another_weight_in_its_place_is_quantized_again(calls):
    model = branches("twn", {}, "true")
    for step in range(2):
        set_progress(model, step, 9)
        [layer(inputs()) for layer in model]
    other = branches("twn", {}, "false")[3]
    model[0].parametrizations.weight.original = nn.Parameter(master_weight(other).detach().clone())
    assert torch.equal(model[0](inputs()), other(inputs()))
    set_progress(model, 2, 9)
    assert torch.equal(model[0](inputs()), other(inputs()))


def test_what_nobody_asks_for_any_more_is_forgotten(calls):
    model = branches("twn", {}, "true")
    [layer(inputs()) for layer in model]
    for step in range(3):
        calls.several()
        set_progress(model, step, 9)
    assert not calls.several() and not any(quantizer.calls for _, _, quantizer in quantizers(model))


def test_a_weight_that_is_not_the_layers_own_is_not_computed_ahead(calls):
    """As with FSDP, where the layer computes with a gathered weight."""
    layers = branches("twn", {}, "true")
    gathered = [torch.randn(12, IN) for _ in layers]
    for (_, _, quantizer), weight in zip(quantizers(layers), gathered, strict=True):
        quantizer(weight)
    calls.several()
    set_progress(layers, 1, 9)
    assert not calls.several()


def test_by_the_compiler_of_this_machine_too(monkeypatch):
    monkeypatch.setattr(_fused, "_ready", {})
    monkeypatch.setattr(_fused, "_broken", set())
    losses, _ = trained("absmean", {}, "false", steps=2)
    found, _ = trained("absmean", {}, "true", steps=2)
    assert found == pytest.approx(losses, rel=1e-3) and not _fused._broken
    assert any(key[0] is _ahead.several for key in _fused._ready)
