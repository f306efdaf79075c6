from __future__ import annotations

import pytest
import torch

from angelslim.export.fp8_block import FORMAT
from angelslim.methods.ptq.rtn import round_weight
from angelslim.numerics.scheme import FORMATS, PRESETS, Quant, Scheme, per_block, per_group

SCHEME = PRESETS["fp8_block"]
FP8 = FORMATS["fp8_e4m3"]


def test_tensors_follow_the_published_layout():
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    tensors = FORMAT.tensors("a", round_weight(weight, SCHEME.weight), SCHEME, None)
    codes, scales = tensors["a.weight"], tensors["a.weight_scale_inv"]
    assert (codes.dtype, scales.dtype, scales.shape) == (torch.float8_e4m3fn, torch.float32, (2, 3))
    for row, column in ((0, 0), (1, 2)):
        tile = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
        decoded = codes[tile].float() * scales[row, column]
        assert scales[row, column] == weight[tile].float().abs().max() / 448
        assert (
            (decoded - weight[tile].float()).abs()
            <= weight[tile].float().abs() / 16 + scales[row, column] * 2**-10
        ).all()


@pytest.mark.parametrize("size", [(128, 128), (64, 128), (32, 32)])
def test_round_trip(size):
    scheme = Scheme(Quant(FP8, per_block(*size)), Quant(FP8, per_group(size[1]), dynamic=True))
    quantized = round_weight(torch.randn(130, 140), scheme.weight)
    read = FORMAT.schemes(FORMAT.config({"a": scheme}, ["lm_head"]), ["a"])["a"]
    assert read == scheme
    restored = FORMAT.restore("a", FORMAT.tensors("a", quantized, scheme, None), read)
    assert restored is not None and torch.equal(restored.weight.dequantize(), quantized.dequantize())
    assert FORMAT.restore("b", {}, read) is None


def test_config():
    assert FORMAT.config({"a": SCHEME}, ["lm_head"]) == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }
    assert FORMAT.reads({"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert not FORMAT.reads({"quant_method": "fp8", "weight_block_size": None})


@pytest.mark.parametrize("name", ["fp8_static", "fp8_dynamic", "int8_dynamic", "int4"])
def test_other_schemes_are_refused_with_a_reason(name):
    assert FORMAT.refuses(PRESETS[name])


def test_only_the_matching_activation_groups_fit():
    assert not FORMAT.refuses(SCHEME)
    assert "dynamic" in FORMAT.refuses(Scheme(SCHEME.weight))
    assert "per group of 128" in FORMAT.refuses(
        Scheme(SCHEME.weight, Quant(FP8, per_group(64), dynamic=True))
    )
