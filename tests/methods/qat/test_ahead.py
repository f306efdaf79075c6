"""What is computed before the step is what the step would have computed, and never of a weight that has changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from angelslim.methods.qat import _ahead, _formula, _fused
from angelslim.methods.qat.base import enabled, master_weight, quantizers, set_progress

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
    assert calls.several()[2 * LAYERS :] == ["repeated"] * 2


def test_many_layers_are_cut_into_calls_of_one_length(calls, monkeypatch):
    monkeypatch.setattr(_ahead, "TOGETHER", 2)
    trained("twn", {}, "true", steps=2)
    assert calls.several()[2 * LAYERS :] == ["repeated"] * 2 + ["ternary_values"] * 2, "the fifth is alone"


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


GRADED = [
    ("twn", {}),
    ("tequila", {"group_size": 16, "lambda": 0.05}),
    ("sherry", {"group_size": 16, "anneal": "linear"}),
    ("seq", {}),
    ("dlt", {"group_size": 16}),
]
GRADED_NAMES = [name for name, _ in GRADED]


def stacked(name, options, choice, prepared=True):
    """Layers one after another, ready for their third step; those that are not compiled need no preparation."""
    model = nn.ModuleList(
        nn.Sequential(quantized(name, {**options, "compile": choice}, True, seed), nn.Linear(12, IN))
        for seed in range(LAYERS)
    )
    torch.manual_seed(0)
    for block in model:
        nn.init.normal_(block[1].weight, std=0.1)
        nn.init.zeros_(block[1].bias)
    model.train()
    for step in range(2):
        set_progress(model, step, 9)
        forward(model, inputs()).sum().backward()
        model.zero_grad()
    set_progress(model, 2, 9)
    return model


def forward(model, x, reentrant=None):
    for block in model:
        x = x + (block(x) if reentrant is None else checkpoint(block, x, use_reentrant=reentrant))
    return x


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (value is None) == (found[key] is None), key
        if value is not None:
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "options"), GRADED, ids=GRADED_NAMES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_blocks_share_one_node(name, options, reentrant, calls):
    """A block that is recomputed within the backward pass visits the node with its own gradient alone."""
    found = []
    for choice in ("false", "true"):
        model = stacked(name, options, choice)
        calls.several()
        forward(model, inputs().requires_grad_(True), reentrant).square().mean().backward()
        found.append(gradients(model))
    assert_same(*found)
    if not reentrant:
        assert len(calls.several()) <= 1, "the slopes of all layers are one call, where there are any"


@pytest.mark.parametrize(("name", "options"), GRADED, ids=GRADED_NAMES)
def test_losses_of_one_step_may_reach_some_layers_only(name, options, calls):
    found = []
    for choice in ("false", "true"):
        model = stacked(name, options, choice)
        model[0](inputs()).square().mean().backward()  # the first layer alone
        with torch.no_grad():
            model[1](inputs())  # asked for without gradients first
        forward(model, inputs()).mean().backward()
        forward(model[2:], inputs(seed=3)).square().mean().backward()
        found.append(gradients(model))
    assert_same(*found)


@pytest.mark.parametrize(("name", "options"), GRADED, ids=GRADED_NAMES)
def test_frozen_weights_among_them_get_no_gradient(name, options, calls):
    found = []
    for choice in ("false", "true"):
        model = stacked(name, options, choice)
        for turn in range(2):  # frozen after the preparation, and before it
            for layer in (model[0][0], model[3][0]):
                for parameter in layer.parameters():
                    parameter.requires_grad_(False)
            forward(model, inputs()).square().mean().backward()
            set_progress(model, 3 + turn, 9)
        found.append(gradients(model))
    assert_same(*found)
    assert all(value is None for key, value in found[1].items() if key.startswith(("0.0", "3.0")))


def test_the_backward_pass_goes_through_one_node_for_all_layers(calls):
    model = stacked("tequila", {"group_size": 16}, "true")
    calls.several()
    outputs = [block(inputs()) for block in model]
    sum(output.square().mean() for output in outputs).backward()
    assert calls.several() == ["repeated"]


def test_gradients_are_handed_on_before_earlier_layers_have_theirs(monkeypatch, calls):
    """So that processes that average gradients may do so while the rest is computed, and little waits for the end."""
    monkeypatch.setattr(_ahead, "TOGETHER", 2)
    model, order = stacked("twn", {}, "true"), []
    for number, block in enumerate(model):
        for kind, weight in (("quantized", master_weight(block[0])), ("plain", block[1].weight)):
            weight.register_post_accumulate_grad_hook(lambda _, key=(kind, number): order.append(key))
    forward(model, inputs()).square().mean().backward()
    for number in (2, 3):  # the second two
        assert order.index(("quantized", number)) < order.index(("plain", 1))
    assert len(order) == 2 * LAYERS


def test_a_weight_changed_before_the_backward_pass_is_an_error(calls):
    model = stacked("seq", {}, "true")
    loss = forward(model, inputs()).square().mean()
    with torch.no_grad():
        master_weight(model[2][0]).mul_(2)
    with pytest.raises(RuntimeError, match="between the forward and the backward"):
        loss.backward()


def test_turning_quantizers_off_and_copies_leave_results_behind(calls):
    model = stacked("tequila", {"group_size": 16}, "true")
    plain = stacked("tequila", {"group_size": 16}, "false")
    with enabled(model, False), enabled(plain, False):
        assert torch.equal(forward(model, inputs()), forward(plain, inputs()))
    forward(model, inputs())
    twin = copy.deepcopy(model)
    assert not any(quantizer.calls for _, _, quantizer in quantizers(twin))
    torch.testing.assert_close(forward(twin, inputs()), forward(plain, inputs()))


@pytest.mark.parametrize(("name", "options"), GRADED[1:2] + GRADED[3:4], ids=["tequila", "seq"])
def test_by_the_compiler_of_this_machine_too(name, options, monkeypatch):
    monkeypatch.setattr(_fused, "_ready", {})
    monkeypatch.setattr(_fused, "_broken", set())
    losses, parameters = trained(name, options, "false", steps=3)
    found, others = trained(name, options, "true", steps=3)
    assert found == pytest.approx(losses, rel=1e-3) and not _fused._broken
    for key, value in parameters.items():
        torch.testing.assert_close(others[key], value, rtol=1e-3, atol=1e-5)
    together = [
        dict(zip(("of", "count"), key[2][:2], strict=True))
        for key in _fused._ready
        if key[0] is _formula.repeated
    ]
    assert len(together) == 2 and {each["count"] for each in together} == {LAYERS}, "forward and backward"
