"""Quantizers on and off a model: what holds for every one of them."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from angelslim.base.errors import ConfigError, SchemeError
from angelslim.methods.base import QAT
from angelslim.methods.qat.base import (
    attach,
    detach,
    enabled,
    master_weight,
    merge,
    quantizers,
    scale_parameters,
    set_progress,
    set_trainable,
)
from angelslim.numerics.lowbit.record import LowBit

from .helpers import IN, NAMES, OUT, VARIANTS, inputs, linear, quantized, quantizer_of

every = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=NAMES)
ONE_EACH = list({(name, options.get("variant")): (name, options) for name, options in VARIANTS}.values())


def test_every_quantizer_is_tried_here():
    assert {name for name, _ in VARIANTS} == set(QAT)


@every
@pytest.mark.parametrize("bias", [False, True])
def test_merging_leaves_the_outputs_as_they_were(name, options, bias):
    layer = quantized(name, options, bias)
    layer.eval()
    before = layer(inputs())
    record = merge(layer)[""]
    assert type(layer) is nn.Linear and not list(layer.named_buffers())
    assert (layer(inputs()) - before).abs().max() < 1e-5
    assert torch.equal(layer.weight, record.dequantize())
    assert (layer.bias is not None) == (bias or (isinstance(record, LowBit) and record.bias is not None))


@every
def test_merged_weights_are_the_attached_ones_bit_for_bit(name, options):
    layer = quantized(name, options).eval()
    attached = layer.weight.detach().clone()
    assert torch.equal(merge(layer)[""].dequantize(), attached)


@every
def test_scales_are_numbers_that_the_file_holds(name, options):
    record = merge(quantized(name, options))[""]
    wanted = torch.float16 if isinstance(record, LowBit) else record.scale.dtype
    scale = record.scale.float()
    assert torch.equal(scale.to(wanted).float(), scale) and scale.min() > 0
    if isinstance(record, LowBit):
        assert record.codes.dtype == torch.int8 and record.scale.shape == (OUT, IN // record.group)


@every
def test_detaching_gives_the_original_back(name, options):
    plain, layer = linear(bias=False), quantized(name, options)
    detach(layer)
    assert type(layer) is nn.Linear and layer.bias is None
    assert torch.equal(layer.weight, plain.weight) and isinstance(layer.weight, nn.Parameter)
    assert torch.equal(layer(inputs()), plain(inputs()))
    assert list(layer.state_dict()) == ["weight"]


@every
def test_the_original_is_its_own_teacher(name, options):
    plain, layer = linear(bias=True), quantized(name, options, bias=True)
    student = layer(inputs())
    with enabled(layer, False):
        assert torch.equal(layer(inputs()), plain(inputs()))
    assert torch.equal(layer(inputs()), student) and not torch.equal(student, plain(inputs()))


@every
def test_a_state_dict_comes_back(name, options, tmp_path: Path):
    layer = quantized(name, options, bias=True)
    set_progress(layer, 3, 10)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.1)
    save_file(layer.state_dict(), tmp_path / "state.safetensors")
    other = quantized(name, options, bias=True, seed=5)
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(other(inputs()), layer(inputs()))


@every
def test_a_copy_is_independent(name, options):
    layer = quantized(name, options)
    layer(inputs()).sum().backward()
    twin = copy.deepcopy(layer)
    expected = layer(inputs())
    assert torch.equal(twin(inputs()), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    assert torch.equal(layer(inputs()), expected) and not torch.equal(twin(inputs()), expected)
    merge(twin)
    assert len(list(quantizers(layer))) == 1 and not list(quantizers(twin))


def gradients(layer: nn.Module, run) -> dict[str, torch.Tensor]:
    layer.zero_grad()
    run(inputs()).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}


@every
def test_recomputed_blocks_have_the_same_gradients(name, options):
    layer = quantized(name, options, bias=True)
    set_progress(layer, 3, 10)
    plain = gradients(layer, layer)
    again = gradients(layer, lambda x: checkpoint(layer, x, use_reentrant=False))
    assert plain and all(torch.equal(plain[key], again[key]) for key in plain)


@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_a_compiled_layer_computes_the_same(name, options):
    torch._dynamo.reset()
    layer = quantized(name, options, bias=True)
    set_progress(layer, 3, 10)
    plain = gradients(layer, layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = gradients(layer, compiled)
    assert all(torch.allclose(plain[key], found[key], rtol=1e-4, atol=1e-6) for key in plain)


@every
def test_under_autocast_only_the_product_is_narrow(name, options):
    layer = quantized(name, options, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        weight = layer.weight
        out = layer(inputs())
    assert weight.dtype == torch.bfloat16 and out.dtype == torch.bfloat16
    assert torch.equal(weight, layer.weight.bfloat16()), "computed in float32, rounded once"
    out.float().square().sum().backward()
    for key, parameter in layer.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.grad.dtype == torch.float32, key
        assert parameter.grad.isfinite().all()


@every
def test_a_few_steps_lower_the_loss(name, options):
    teacher = linear(bias=True, seed=9)
    layer = quantized(name, options, bias=True)
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-3)
    steps, losses = 40, []
    for step in range(steps):
        set_progress(layer, step, steps)
        loss = (layer(inputs()) - teacher(inputs())).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    set_progress(layer, steps, steps)
    attached = layer.eval()(inputs())
    merge(layer)
    assert (layer(inputs()) - attached).abs().max() < 1e-5
    after = (layer(inputs()) - teacher(inputs())).square().mean().item()
    first = quantized(name, options, bias=True)
    merge(first)
    before = (first(inputs()) - teacher(inputs())).square().mean().item()
    assert losses[-1] < losses[0] and after < 0.8 * before


@every
def test_the_backward_pass_keeps_no_copy_of_the_weight(name, options):
    layer = quantized(name, options)
    weight, kept = master_weight(layer), []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        product = layer.weight  # which a matrix product keeps anyway
        layer.bias  # noqa: B018 (it is computed)
    held = {weight.data_ptr(), product.data_ptr()}
    large = [t for t in kept if t.numel() >= weight.numel() and t.data_ptr() not in held]
    assert large == []


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tequila", {}),
        ("sherry", {}),
        ("seq", {"group_size": 48}),
        ("int", {}),
        ("sherry", {"group_size": 6}),
    ],
)
def test_an_odd_group_is_refused_with_the_layers_name(name, options):
    layer = linear()
    with pytest.raises(SchemeError, match=r"^model\.layers\.0\.q_proj: .*multiple of"):
        attach(layer, QAT.get(name)(options), "model.layers.0.q_proj")
    assert not parametrize.is_parametrized(layer) and type(layer) is nn.Linear


def test_sherry_refuses_inputs_that_do_not_come_in_fours():
    with pytest.raises(SchemeError, match=r"x: .*30 is not a multiple of 4"):
        attach(nn.Linear(30, 4), QAT.get("sherry")({"granularity": "channel"}), "x")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("seq", {"bits": 3}, "bits is 3.*2, ternary"),
        ("lsq", {"bits": True}, "bits is True"),
        ("lsq", {"init": "maximum"}, "init is 'maximum'"),
        ("seq", {"gradient": "publishd"}, "Did you mean 'published'"),
        ("tequila", {"lambda": "much"}, "lambda is 'much'.*number from 0 to 1"),
        ("tequila", {"variant": "v3"}, "variant is 'v3'"),
        ("sherry", {"anneal": "cosin"}, "Did you mean 'cosine'"),
        ("sherry", {"warmup": 2}, "warmup is 2"),
        ("fp", {"format": "fp4"}, "format is 'fp4'.*Did you mean"),
        ("int", {"bits": 2}, "bits is 2"),
        ("twn", {"granularity": "row"}, "granularity is 'row'"),
        ("twn", {"group_size": 0}, "group_size is 0"),
        ("twn", {"scale_dtype": "half"}, "scale_dtype is 'half'"),
    ],
)
def test_wrong_options_are_config_errors(name, options, message):
    with pytest.raises(ConfigError, match=message):
        QAT.get(name)(options)


def test_words_of_public_files_are_understood():
    for options in ({"granularity": "per_group", "group_size": 32}, {"group_size": 32}):
        assert str(QAT.get("twn")(options).granularity) == "per-group 32"
    assert str(QAT.get("tequila")({"group_size": -1}).granularity) == "per-channel"
    assert QAT.get("seq")({"bits": 1.58}).levels == "ternary"


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = linear(), nn.LayerNorm(OUT), nn.Linear(OUT, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x)))


def test_scales_are_named_and_can_be_trained_alone():
    model = Two()
    attach(model.first, QAT.get("dlt")({}), "first")
    attach(model.second, QAT.get("seq")({}), "second")
    names = scale_parameters(model)
    assert names == [
        "first.parametrizations.weight.0.scale",
        "first.parametrizations.weight.0.shift",
        "second.parametrizations.weight.0.scale",
    ]
    parameters = dict(model.named_parameters())
    assert all(parameters[name].dtype == torch.float32 for name in names)
    set_trainable(model, "quant")
    assert [name for name, each in parameters.items() if each.requires_grad] == names
    model(inputs()).sum().backward()
    assert all((each.grad is not None) == (name in names) for name, each in parameters.items())
    set_trainable(model, "all")
    assert master_weight(model.first).requires_grad and not model.norm.weight.requires_grad


def test_training_scales_alone_needs_scales():
    model = Two()
    attach(model.first, QAT.get("twn")({}), "first")
    with pytest.raises(ConfigError, match="learns no scales"):
        set_trainable(model, "quant")
    with pytest.raises(ConfigError, match="Did you mean 'quant'"):
        set_trainable(model, "quan")


def test_one_configured_quantizer_serves_all_layers():
    model, quantizer = Two(), QAT.get("seq")({})
    attach(model.first, quantizer, "first")
    attach(model.second, quantizer, "second")
    scales = [each.scale for _, _, each in quantizers(model)]
    assert scales[0].shape == (OUT, 1) and scales[1].shape == (4, 1) and not list(quantizer.parameters())


def test_a_frozen_layer_merges_too():
    layer = quantized("tequila", {"group_size": 16})
    layer.requires_grad_(False)
    quantizer_of(layer).requires_grad_(False)
    merge(layer)
    assert not layer.weight.requires_grad and not layer.bias.requires_grad


def test_state_survives_torchs_own_files():
    layer, file = quantized("sherry", {"group_size": 16}), io.BytesIO()
    set_progress(layer, 5, 10)
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = quantized("sherry", {"group_size": 16}, seed=3)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(inputs()), layer(inputs()))


@every
def test_a_model_cast_to_bfloat16_still_computes_in_float32(name, options):
    narrow = quantized(name, options, bias=True).bfloat16()
    assert narrow.weight.dtype == torch.bfloat16
    narrow(inputs().bfloat16()).float().square().sum().backward()
    assert master_weight(narrow).grad.isfinite().all()
    attached = narrow.eval().weight
    assert torch.equal(merge(narrow)[""].dequantize().bfloat16(), attached)
