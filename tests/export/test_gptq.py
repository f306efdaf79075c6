"""Our tensors against the layout, written out one code at a time."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from angelslim.base.errors import ModelError, SchemeError
from angelslim.export.gptq import FORMAT
from angelslim.numerics.quantize import Quantized, quantize
from angelslim.numerics.scheme import FORMATS, PER_CHANNEL, PER_TENSOR, PRESETS, Quant, Scheme, per_group

GRAINS = {"groups of 32": per_group(32), "groups of 64": per_group(64), "per channel": PER_CHANNEL}
NAME = "model.layers.0.mlp.down_proj"
EVERY = pytest.mark.parametrize("bits, grain", list(product((4, 8), GRAINS.values())))


def made(bits: int, grain) -> tuple[Quantized, Scheme]:
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(bits))
    quant = Quant(FORMATS[f"int{bits}"], grain)
    return quantize(weight, quant, torch.float16), Scheme(quant)


def code_at(words: torch.Tensor, bits: int, row: int, column: int) -> int:
    """The code of output `row` and input `column` in a ``qweight``, by the layout's own words."""
    per_word = 32 // bits
    word = int(words[column // per_word, row]) & 0xFFFFFFFF
    return (word >> (bits * (column % per_word))) & (2**bits - 1)


@EVERY
def test_every_code_is_where_the_layout_has_it(bits, grain):
    quantized, scheme = made(bits, grain)
    tensors = FORMAT.tensors(NAME, quantized, scheme, None)
    words, zeros, scales = (tensors[f"{NAME}.{part}"] for part in ("qweight", "qzeros", "scales"))
    groups = quantized.scale.shape[1]
    assert (words.dtype, tuple(words.shape)) == (torch.int32, (128 * bits // 32, 24))
    assert (zeros.dtype, tuple(zeros.shape)) == (torch.int32, (groups, 24 * bits // 32))
    assert (scales.dtype, tuple(scales.shape)) == (torch.float16, (groups, 24))
    assert tensors[f"{NAME}.g_idx"].tolist() == [column * groups // 128 for column in range(128)]
    middle = 2 ** (bits - 1)
    for row, column in product((0, 7, 23), (0, 1, 9, 31, 127)):
        assert code_at(words, bits, row, column) - middle == quantized.codes[row, column]
    word = sum((middle - 1) << (bits * position) for position in range(32 // bits))
    assert set(zeros.flatten().tolist()) == {word - 2**32 if word >= 2**31 else word}  # 0x77777777 for 4 bits


@EVERY
def test_round_trip(bits, grain):
    quantized, scheme = made(bits, grain)
    read = FORMAT.schemes(FORMAT.config({NAME: scheme}, ["lm_head"]), [NAME])[NAME]
    assert read == FORMAT.stored(scheme) and read.weight.scale == "float16"
    tensors = FORMAT.tensors(NAME, quantized, scheme, None)
    restored = FORMAT.restore(NAME, tensors, read)
    assert restored is not None and restored.weight.zero is None
    assert torch.equal(restored.weight.codes, quantized.codes)
    assert torch.equal(restored.weight.dequantize(), quantized.dequantize())
    parts = {name.rpartition(".")[2]: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert FORMAT.shape(parts, read) == (24, 128)
    assert FORMAT.restore("model.norm", tensors, read) is None


def test_zero_points_of_other_tools_are_read():
    """They are stored less one, so 0 is 15; engines run none, so we write none."""
    quant = Quant(FORMATS["int4"], per_group(32), symmetric=False)
    quantized = quantize(torch.rand(8, 32) - 0.01, quant, torch.float16)
    tensors = FORMAT.tensors(NAME, quantized, Scheme(quant), None)
    assert quantized.zero is not None
    word = sum(((int(z) + 8 - 1) & 15) << (4 * row) for row, z in enumerate(quantized.zero[:, 0]))
    tensors[f"{NAME}.qzeros"] = torch.tensor([[word - 2**32 if word >= 2**31 else word]], dtype=torch.int32)
    restored = FORMAT.restore(NAME, tensors, Scheme(quant))
    assert restored is not None and torch.equal(restored.weight.dequantize(), quantized.dequantize())
    assert "no zero points" in FORMAT.refuses(Scheme(quant))


def test_a_symmetric_layer_with_zero_points_is_damaged():
    quantized, scheme = made(4, per_group(32))
    tensors = FORMAT.tensors(NAME, quantized, scheme, None)
    tensors[f"{NAME}.qzeros"] += 1
    with pytest.raises(ModelError, match=r"down_proj' has zero points"):
        FORMAT.restore(NAME, tensors, scheme)


def test_inputs_out_of_order_are_refused_and_a_useless_order_is_not():
    quantized, scheme = made(4, per_group(32))
    tensors = FORMAT.tensors(NAME, quantized, scheme, None)
    tensors[f"{NAME}.g_idx"] = tensors[f"{NAME}.g_idx"].flip(0)
    with pytest.raises(ModelError, match="not in order"):
        FORMAT.restore(NAME, tensors, scheme)
    del tensors[f"{NAME}.g_idx"]
    assert FORMAT.restore(NAME, tensors, scheme) is not None


def test_scales_that_float16_does_not_hold_are_refused():
    quantized = quantize(torch.randn(8, 32), Quant(FORMATS["int4"], per_group(32)))
    with pytest.raises(SchemeError, match=r"down_proj' has scales that float16 does not hold"):
        FORMAT.tensors(NAME, quantized, Scheme(quantized.quant), None)
    halves = Quantized(quantized.codes, quantized.scale.bfloat16(), None, quantized.quant)
    assert FORMAT.tensors(NAME, halves, Scheme(quantized.quant), None)  # bfloat16 has fewer digits


def test_config():
    int4 = PRESETS["int4"]
    config = FORMAT.config({"model.layers.0.mlp.up_proj": int4}, ["lm_head", "model.layers.0.mlp.gate"])
    assert config == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
        "static_groups": True,
        "true_sequential": True,
        "lm_head": False,
        "dynamic": {r"-:^model\.layers\.0\.mlp\.gate$": {}},
    }
    assert FORMAT.reads(config) and not FORMAT.reads({"quant_method": "awq"})
    assert FORMAT.config({"lm_head": Scheme(Quant(FORMATS["int8"], PER_CHANNEL))}, [])["group_size"] == -1


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"bits": 3}, "codes of 3 bits"),
        ({"checkpoint_format": "gptq_v2"}, "checkpoint_format 'gptq_v2'"),
        ({"dynamic": {"+:.*down_proj": {"bits": 8}}}, "rules for single layers"),
    ],
)
def test_what_cannot_be_read_says_why(changes, reason):
    with pytest.raises(ModelError, match=reason):
        FORMAT.schemes({**FORMAT.config({NAME: PRESETS["int4"]}, []), **changes}, [NAME])


@pytest.mark.parametrize(
    "scheme, reason",
    [
        (PRESETS["fp8_dynamic"], "INT4 or INT8"),
        (Scheme(Quant(FORMATS["int8"], PER_TENSOR)), "per group or per channel"),
        (PRESETS["int8_dynamic"], "inputs cannot be quantized"),
        (Scheme(PRESETS["int4"].weight, kv=Quant(FORMATS["fp8_e4m3"], PER_TENSOR)), "KV cache"),
        (PRESETS["int4"], ""),
    ],
)
def test_refusals(scheme, reason):
    assert reason in FORMAT.refuses(scheme)
    assert bool(FORMAT.refuses(scheme)) == bool(reason)


def test_layers_share_a_scheme_and_fill_whole_words():
    int4, int8 = PRESETS["int4"], Scheme(Quant(FORMATS["int8"], per_group(128)))
    assert "one scheme for all" in FORMAT.refuses_together({"a": int4, "b": int8})
    assert not FORMAT.refuses_together({"a": int4, "b": int4})
    assert "multiples of 8" in FORMAT.refuses_shape(int4, (12, 128))
    assert not FORMAT.refuses_shape(int8, (12, 128))
