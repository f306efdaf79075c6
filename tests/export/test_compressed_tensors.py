"""Our tensors against compressed-tensors' own schema and compressors, bit for bit."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig

from angelslim.base.errors import ConfigError, SchemeError
from angelslim.config.schemes import EXTRA
from angelslim.export.base import FORMATS, choose
from angelslim.export.compressed_tensors import FORMAT
from angelslim.methods.ptq.rtn import round_weight
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
SCHEMES = {**PRESETS, **EXTRA}
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
    if quantized.zero is not None:
        full["weight_zero_point"] = quantized.zero.reshape(full["weight_scale"].shape)
    written = compressor.compress({key: value for key, value in full.items() if value is not None}, group)
    written = {key: value for key, value in written.items() if value is not None}
    if quantized.zero is None:
        written.pop("weight_zero_point", None)
    ours = {name.removeprefix(f"{NAME}."): tensor for name, tensor in tensors.items()}
    ours.pop("input_scale", None)
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
    assert read == Scheme(scheme.weight, scheme.input)
    restored = FORMAT.restore(NAME, tensors, read)
    assert restored is not None
    assert torch.equal(restored.weight.codes.float(), quantized.codes.float())
    assert torch.equal(restored.weight.scale, quantized.scale)
    assert (restored.weight.zero is None) == (quantized.zero is None)
    assert torch.equal(restored.weight.dequantize(), quantized.dequantize())
    assert (restored.input_scale is None) != scheme.needs_data
    assert FORMAT.restore("model.norm", tensors, read) is None


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


@pytest.mark.parametrize(
    "scheme, reason",
    [
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
    assert choose([PRESETS["int4"]])[0] == "compressed_tensors"
    assert choose([PRESETS["fp8_block"]], "fp8_block")[0] == "fp8_block"
    assert choose([PRESETS["fp8_block"]], "fp8-block")[0] == "fp8_block"
    with pytest.raises(
        SchemeError, match="'fp8_block' cannot hold W int4 per-group 128: weights must be FP8"
    ):
        choose([PRESETS["int4"]], "fp8_block")
    with pytest.raises(SchemeError, match="No checkpoint format holds"):
        choose([Scheme(Quant(FP8, PER_TENSOR, symmetric=False))])
    with pytest.raises(ConfigError, match=r"Unknown format 'fp8_blok'. Did you mean 'fp8_block'"):
        choose([PRESETS["fp8_block"]], "fp8_blok")
    assert set(FORMATS) >= {"compressed_tensors", "fp8_block"}
