"""Our tensors against compressed-tensors' own schema and compressors, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig

from angelslim.base.errors import ConfigError, SchemeError
from angelslim.config.schemes import EXTRA
from angelslim.export.base import FORMATS, choose
from angelslim.export.compressed_tensors import FORMAT
from angelslim.methods.ptq._shared import round_weight
from angelslim.numerics.quantize import fake_quantize
from angelslim.numerics.scheme import FORMATS as GRIDS
from angelslim.numerics.scheme import (
    PER_CHANNEL,
    PER_TENSOR,
    PER_TOKEN,
    PRESETS,
    Quant,
    Scheme,
    per_block,
    per_group,
)

INT4, INT8, FP8 = GRIDS["int4"], GRIDS["int8"], GRIDS["fp8_e4m3"]
TOKENS = {grid.name: Quant(grid, PER_TOKEN, dynamic=True) for grid in (INT8, FP8)}
SCHEMES = {name: scheme for name, scheme in {**PRESETS, **EXTRA}.items() if name != "w4a8_fp8_static"}
SCHEMES |= {
    f"int4 {grain} {'symmetric' if symmetric else 'asymmetric'}": Scheme(Quant(INT4, grain, symmetric))
    for grain, symmetric in product((per_group(32), per_group(64), PER_CHANNEL), (True, False))
}
SCHEMES |= {
    "fp8 tensor, dynamic tokens": Scheme(Quant(FP8, PER_TENSOR), TOKENS["fp8_e4m3"]),
    "fp8 tensor, dynamic tensor": Scheme(Quant(FP8, PER_TENSOR), Quant(FP8, PER_TENSOR, dynamic=True)),
    "fp8 weights only": Scheme(Quant(FP8, PER_CHANNEL)),
    "int8 weights only": Scheme(Quant(INT8, PER_CHANNEL)),
    "int8 tensor": Scheme(Quant(INT8, PER_TENSOR), TOKENS["int8"]),
    "int8 asymmetric": Scheme(Quant(INT8, PER_CHANNEL, symmetric=False), TOKENS["int8"]),
    "int8 tensor asymmetric": Scheme(Quant(INT8, PER_TENSOR, symmetric=False), TOKENS["int8"]),
    "int8 groups": Scheme(Quant(INT8, per_group(64))),
    "int8 asymmetric inputs": Scheme(
        Quant(INT8, PER_CHANNEL), Quant(INT8, PER_TOKEN, symmetric=False, dynamic=True)
    ),
    "fp8 blocks 64x32": Scheme(Quant(FP8, per_block(64, 32)), Quant(FP8, per_group(32), dynamic=True)),
}
EVERY = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
NAME = "model.layers.0.mlp.down_proj"


def weight(rows: int = 132, columns: int = 256) -> torch.Tensor:
    """A bfloat16 weight whose rows fill neither a word of eight nor a block of 128."""
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05).to(torch.bfloat16)


def exported(scheme: Scheme):
    quantized = round_weight(weight(), scheme.weight)
    input_scale = torch.tensor([[0.0123]]) if scheme.needs_data else None
    return quantized, FORMAT.tensors(NAME, quantized, scheme, input_scale)


@EVERY
def test_their_compressor_decodes_our_tensors_bit_for_bit(scheme):
    quantized, tensors = exported(scheme)
    config = FORMAT.config({NAME: scheme}, ["lm_head"])
    group = QuantizationConfig.model_validate(config).config_groups["group_0"]
    local = {name.removeprefix(f"{NAME}."): tensor for name, tensor in tensors.items()}
    decoded = BaseCompressor.get_value_from_registry(group.format).decompress(local, group)["weight"]
    assert torch.equal(decoded, quantized.dequantize().to(decoded.dtype))
    assert decoded.shape == (132, 256)


@EVERY
def test_their_compressor_writes_the_tensors_that_we_write(scheme):
    quantized, tensors = exported(scheme)
    group = QuantizationConfig.model_validate(FORMAT.config({NAME: scheme}, [])).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(group.format)
    full = {
        "weight": quantized.dequantize(),
        "weight_scale": tensors[f"{NAME}.weight_scale"],
        "weight_zero_point": None,
    }
    if scheme.weight.scale == "e8m0":  # the library packs the scales of these itself
        full["weight_scale"] = quantized.scale
    elif scheme.weight.scale == "e4m3":
        full["weight_scale"] = full["weight_scale"].float()
        full["weight_global_scale"] = tensors[f"{NAME}.weight_global_scale"]
    if scheme.weight.format.bits == 4 and scheme.weight.format.kind == "float":
        full["weight"] = weight().float()  # small negative values become -0, which it makes of no -0
    if quantized.zero is not None:
        full["weight_zero_point"] = quantized.zero.reshape(full["weight_scale"].shape)
    written = compressor.compress({key: value for key, value in full.items() if value is not None}, group)
    written = {key: value for key, value in written.items() if value is not None}
    if quantized.zero is None:
        written.pop("weight_zero_point", None)
    ours = {name.removeprefix(f"{NAME}."): tensor for name, tensor in tensors.items()}
    ours = {key: tensor for key, tensor in ours.items() if not key.startswith("input")}
    assert set(ours) == set(written)
    for key, tensor in ours.items():
        theirs = written[key]
        assert (tensor.shape, tensor.dtype) == (theirs.shape, theirs.dtype), key
        assert torch.equal(
            tensor.view(-1).view(torch.uint8), theirs.contiguous().view(-1).view(torch.uint8)
        ), key


@EVERY
def test_restoring_gives_back_codes_scales_and_scheme(scheme):
    quantized, tensors = exported(scheme)
    config = FORMAT.config({NAME: scheme}, ["lm_head"])
    read = FORMAT.schemes(config, [NAME])[NAME]
    stored = replace(scheme.weight, scale="free") if scheme.weight.scale == "fp8_channel" else scheme.weight
    assert read == Scheme(stored, scheme.input)  # that INT4 scales survive FP8 is no field of the format
    restored = FORMAT.restore(NAME, tensors, read)
    assert restored is not None
    assert torch.equal(restored.weight.codes.float(), quantized.codes.float())
    assert torch.equal(restored.weight.scale, quantized.scale)
    assert (restored.weight.zero is None) == (quantized.zero is None)
    assert torch.equal(restored.weight.dequantize(), quantized.dequantize())
    assert (restored.input_scale is None) != scheme.needs_data
    assert FORMAT.restore("model.norm", tensors, read) is None


MICRO = pytest.mark.parametrize("name", ["nvfp4", "nvfp4_weight_only", "mxfp4", "mxfp4_weight_only", "mxfp8"])


@MICRO
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_floats_are_rounded_as_their_own_path_rounds(name, dtype):
    """From the weight to the file: their range, their scales, their codes, their packing."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    values = weight().to(dtype).float()  # in bfloat16 the library would round the ranges' quotients too
    values[:, :32] *= 1e-4  # groups whose scales lie far below the others'
    values[5, 64:128] = 0
    values[6] = 0
    scheme = PRESETS[name]
    ours = FORMAT.tensors(NAME, round_weight(values, scheme.weight), scheme, None)
    group = QuantizationConfig.model_validate(FORMAT.config({NAME: scheme}, [])).config_groups["group_0"]
    tiles = values.unflatten(1, (-1, scheme.weight.granularity.columns))
    low, high = tiles.amin(-1), tiles.amax(-1)
    full = {"weight": values}
    if name.startswith("nvfp4"):
        full["weight_global_scale"] = generate_gparam(values.min(), values.max())
    full["weight_scale"] = calculate_qparams(low, high, group.weights, full.get("weight_global_scale"))[0]
    theirs = BaseCompressor.get_value_from_registry(group.format).compress(full, group)
    assert {f"{NAME}.{key}" for key in theirs} == set(ours)
    for key, tensor in theirs.items():
        found = ours[f"{NAME}.{key}"]
        assert found.dtype == tensor.dtype, key
        assert torch.equal(found.view(torch.uint8), tensor.contiguous().view(torch.uint8)), key


@MICRO
def test_their_inputs_are_rounded_as_ours(name):
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize as theirs
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    quant = PRESETS[name].input
    if quant is None:
        return
    group = QuantizationConfig.model_validate(FORMAT.config({NAME: PRESETS[name]}, [])).config_groups[
        "group_0"
    ]
    values = torch.randn(3, 9, 256, generator=torch.Generator().manual_seed(1)) * 4
    values[0, 0] = 0
    outer = torch.tensor([448 * 6 / 14.0]) if name == "nvfp4" else None
    arguments = group.input_activations
    scale, zero = compute_dynamic_scales_and_zp(values, arguments, torch.nn.Module(), outer)
    expected = theirs(values, scale, zero, arguments, global_scale=outer)
    assert torch.equal(fake_quantize(values, quant, outer), expected)


def test_the_config_of_nvfp4_names_the_local_scales():
    config = FORMAT.config({NAME: PRESETS["nvfp4"]}, ["lm_head"])
    assert config["format"] == "nvfp4-pack-quantized"
    group = config["config_groups"]["group_0"]
    common = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    for role, dynamic in (("weights", False), ("input_activations", "local")):
        wanted = {**common, "dynamic": dynamic, "scale_dtype": "torch.float8_e4m3fn"}
        assert {key: group[role].get(key) for key in wanted} == wanted


def test_shapes_are_known_without_unpacking():
    for name, leaf in (("nvfp4", "weight_packed"), ("mxfp4", "weight_packed"), ("mxfp8", "weight")):
        _, tensors = exported(PRESETS[name])
        parts = {key.rpartition(".")[2]: tuple(tensor.shape) for key, tensor in tensors.items()}
        assert leaf in parts
        assert FORMAT.shape(parts, PRESETS[name]) == (132, 256)


def test_the_config_says_what_engines_look_for():
    config = FORMAT.config(dict.fromkeys(["a", "b"], PRESETS["fp8_static"]), ["lm_head", "model.visual.x"])
    assert config["quant_method"] == "compressed-tensors"
    assert config["quantization_status"] == "compressed"
    assert config["format"] == "float-quantized"
    assert config["ignore"] == ["lm_head", "model.visual.x"]
    group = config["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert (group["weights"]["type"], group["weights"]["num_bits"]) == ("float", 8)
    assert group["input_activations"]["dynamic"] is False


def test_the_rarer_of_two_schemes_names_its_layers():
    config = FORMAT.config({"a": PRESETS["int4"], "b": PRESETS["int8_dynamic"], "c": PRESETS["int4"]}, [])
    assert config["format"] == "mixed-precision"
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"], ["b"]]
    QuantizationConfig.model_validate(config)
    read = FORMAT.schemes(config, ["a", "b", "c"])
    assert read == {"a": PRESETS["int4"], "b": PRESETS["int8_dynamic"], "c": PRESETS["int4"]}


def test_a_mixture_of_experts_is_named_by_patterns():
    """Tens of thousands of names would not do; what a pattern would catch by mistake is named instead."""
    rest, experts = PRESETS["fp8_block"], PRESETS["w4a8_fp8"]
    layers = [f"model.layers.{i}" for i in range(12)]
    schemes = {f"{path}.self_attn.{name}": rest for path in layers for name in ("q_a_proj", "o_proj")}
    schemes |= {
        f"{path}.mlp.experts.{expert}.{name}_proj": experts
        for path in layers[3:]
        for expert in range(16)
        for name in ("gate", "up", "down")
    }
    schemes |= {f"{path}.mlp.down_proj": rest for path in layers[:3]}
    schemes["model.layers.5.mlp.shared.down_proj"] = rest
    kept = ["lm_head", "model.layers.11.self_attn.q_a_proj"]
    schemes.pop(kept[1])
    config = FORMAT.config(schemes, kept)
    assert config["format"] == "mixed-precision"
    by_format = {group["format"]: group["targets"] for group in config["config_groups"].values()}
    assert by_format["pack-quantized"] == ["Linear"]
    named = by_format["float-quantized"]
    assert r"re:(.*\.)?layers\.\d+\.self_attn\.o_proj$" in named
    assert "model.layers.0.self_attn.q_a_proj" in named  # one of this pattern is kept in full precision
    assert "model.layers.5.mlp.shared.down_proj" in named and len(named) == 11 + 1 + 1 + 1
    read = FORMAT.schemes(config, list(schemes))
    free = Scheme(replace(experts.weight, scale="free"), experts.input)
    assert read == {name: free if scheme == experts else scheme for name, scheme in schemes.items()}


@pytest.mark.parametrize(
    "scheme, reason",
    [
        (Scheme(Quant(GRIDS["fp4_e2m1"], per_group(32))), "no variant for fp4_e2m1 with free scales"),
        (
            Scheme(Quant(FP8, PER_CHANNEL), Quant(GRIDS["fp4_e2m1"], PER_TOKEN, dynamic=True)),
            "no fp4_e2m1 inputs",
        ),
        (EXTRA["w4a8_fp8_static"], "no engine reads 4-bit weights with static activations"),
        (Scheme(Quant(FP8, PER_TENSOR, symmetric=False)), "symmetric"),
        (Scheme(Quant(FP8, PER_TENSOR), Quant(FP8, PER_TOKEN)), "static activation scales are per tensor"),
        (Scheme(Quant(INT4, PER_TENSOR, symmetric=False)), "per group or per channel"),
        (Scheme(Quant(INT4, per_block(8, 8))), "per group or per channel"),
        (Scheme(Quant(INT8, PER_CHANNEL), Quant(FP8, PER_TENSOR)), ""),
    ],
)
def test_refusals_say_why(scheme, reason):
    assert reason in FORMAT.refuses(scheme)
    assert bool(FORMAT.refuses(scheme)) == bool(reason)


def test_choosing_a_format():
    assert choose({"a": PRESETS["int4"]})[0] == "compressed_tensors"
    assert choose({"a": PRESETS["fp8_block"]}, "fp8_block")[0] == "fp8_block"
    assert choose({"a": PRESETS["fp8_block"]}, "fp8-block")[0] == "fp8_block"
    with pytest.raises(
        SchemeError, match="'fp8_block' cannot hold W int4 per-group 128: weights must be FP8"
    ):
        choose({"a": PRESETS["int4"]}, "fp8_block")
    with pytest.raises(SchemeError, match="No checkpoint format holds"):
        choose({"a": Scheme(Quant(FP8, PER_TENSOR, symmetric=False))})
    with pytest.raises(ConfigError, match=r"Unknown format 'fp8_blok'. Did you mean 'fp8_block'"):
        choose({"a": PRESETS["fp8_block"]}, "fp8_blok")
    assert set(FORMATS) >= {"compressed_tensors", "fp8_block"}
