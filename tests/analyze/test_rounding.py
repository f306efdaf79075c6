from __future__ import annotations

import pytest
import torch

from angelslim.analyze.rounding import (
    InputRanges,
    computing_with,
    precise,
    replace_weights,
    rounded,
    units,
)
from angelslim.models.loading import open_model
from angelslim.models.select import select
from angelslim.numerics.error import error_of
from angelslim.numerics.quantize import fake_quantize, quantize
from angelslim.numerics.scheme import PRESETS, with_group
from families import save_random

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "mixture"
    save_random("qwen3_moe", folder)
    return open_model(folder)


def layers_of(source, scheme=PRESETS["int4"]):
    return [layer for layer in select(source, scheme).layers if layer.block is not None]


def test_a_linear_is_a_unit_and_so_are_the_experts_of_a_role(mixture):
    found = units(layers_of(mixture, with_group(PRESETS["int4"], 32)))
    names = [unit.name for unit in found]
    assert "model.layers.1.self_attn.q_proj" in names
    experts = next(unit for unit in found if unit.name == "model.layers.1.mlp.experts.*.up_proj")
    assert len(experts.layers) == 4 and experts.experts and experts.block == 1
    assert experts.role == "mlp.experts.up_proj" and "together" in experts.note
    assert experts.weights == 4 * 32 * 64
    assert len(names) == len(set(names)) == 2 * (4 + 3)


def test_rounding_is_that_of_the_stored_weights(tiny_folder):
    source = open_model(tiny_folder)
    unit = next(unit for unit in units(layers_of(source)) if unit.name.endswith("1.mlp.down_proj"))
    found = rounded(source, unit, CPU)
    stored = source.checkpoint.read(unit.layers[0].tensor)
    expected = quantize(stored, PRESETS["int4"].weight, torch.bfloat16)
    assert torch.equal(found.weights[unit.layers[0].tensor], expected.dequantize())
    assert found.sqnr_db == pytest.approx(error_of(stored, expected.dequantize())[0], rel=1e-6)
    assert found.bits_per_weight == expected.bits_per_weight == 4 + 16 / 128


def test_the_precise_twin_computes_in_float32_and_shares_the_checkpoint(tiny_folder):
    source = open_model(tiny_folder)
    twin = precise(source)
    assert twin.checkpoint is source.checkpoint and source.dtype == torch.bfloat16
    weight = twin.materialize("model.layers.0", CPU).mlp.down_proj.weight
    stored = source.checkpoint.read("model.layers.0.mlp.down_proj.weight")
    assert weight.dtype == torch.float32 and torch.equal(weight, stored.float())
    assert source.model.get_submodule("model.layers.0.mlp.down_proj").weight.is_meta


def test_the_model_computes_rounded_and_then_as_before(tiny_folder):
    twin = precise(open_model(tiny_folder))
    scheme = PRESETS["fp8_dynamic"]
    unit = next(unit for unit in units(layers_of(twin, scheme)) if unit.name.endswith("0.self_attn.o_proj"))
    linear = twin.materialize("model.layers.0", CPU).self_attn.o_proj
    inputs = torch.randn(1, 5, linear.in_features, generator=torch.Generator().manual_seed(0))
    weights = rounded(twin, unit, CPU).weights
    before = linear(inputs)
    kept = linear.weight
    with computing_with(twin, unit, weights, InputRanges({}), CPU):
        now = linear(inputs)
    expected = fake_quantize(inputs, scheme.input) @ weights[unit.layers[0].tensor].T
    torch.testing.assert_close(now, expected)
    assert not torch.equal(now, before)
    assert linear.weight is kept and torch.equal(linear(inputs), before)
    with pytest.raises(ZeroDivisionError), computing_with(twin, unit, weights, InputRanges({}), CPU):
        1 / 0  # noqa: B018
    assert torch.equal(linear(inputs), before)


def test_static_inputs_use_the_range_that_was_seen(tiny_folder):
    twin = precise(open_model(tiny_folder))
    scheme = PRESETS["fp8_static"]
    unit = next(unit for unit in units(layers_of(twin, scheme)) if unit.name.endswith("0.mlp.up_proj"))
    linear = twin.materialize("model.layers.0", CPU).mlp.up_proj
    ranges = InputRanges({})
    observe = ranges.watch(unit.layers)
    assert list(observe) == ["model.layers.0.mlp.up_proj"]
    inputs = torch.randn(7, linear.in_features, generator=torch.Generator().manual_seed(1))
    observe["model.layers.0.mlp.up_proj"](inputs)
    with computing_with(twin, unit, {}, ranges, CPU):
        now = linear(2 * inputs)  # beyond the range: clipped
    scale = (inputs.abs().max() / 448).reshape(1, 1)
    torch.testing.assert_close(now, fake_quantize(2 * inputs, scheme.input, scale) @ linear.weight.T)


def test_dynamic_inputs_need_no_range(tiny_folder):
    layers = layers_of(open_model(tiny_folder), PRESETS["int8_dynamic"])
    assert InputRanges({}).watch(layers) == {}


def test_a_stack_of_experts_is_joined_with_the_rounded_matrices(mixture):
    twin = precise(mixture)
    unit = next(
        unit for unit in units(layers_of(twin, with_group(PRESETS["int4"], 32))) if unit.name.endswith("0.mlp.experts.*.up_proj")
    )  # fmt: skip
    stack = twin.materialize("model.layers.0", CPU).mlp.experts
    before = stack.gate_up_proj.clone()
    weights = rounded(twin, unit, CPU).weights
    kept = replace_weights(twin, unit.layers, weights)
    assert list(kept) == ["model.layers.0.mlp.experts.gate_up_proj"]
    gate, up = stack.gate_up_proj.chunk(2, dim=1)
    assert torch.equal(gate, before.chunk(2, dim=1)[0])
    for expert, layer in enumerate(unit.layers):
        assert torch.equal(up[expert], weights[layer.tensor])
    assert twin.checkpoint is mixture.checkpoint
