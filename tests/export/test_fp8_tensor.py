from __future__ import annotations

import pytest
import torch

from angelslim.export.fp8_tensor import DYNAMIC, FORMAT, STATIC
from angelslim.numerics.quantize import quantize
from angelslim.numerics.scheme import PRESETS


@pytest.mark.parametrize("scheme", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_round_trip(scheme):
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    quantized = quantize(weight, scheme.weight)
    given = torch.tensor([[0.25]]) if scheme.needs_data else None
    tensors = FORMAT.tensors("a", quantized, scheme, given)
    assert tensors["a.weight_scale"].tolist() == [float(weight.float().abs().max() / 448)]
    assert tensors["a.weight"].dtype == torch.float8_e4m3fn
    assert ("a.input_scale" in tensors) == scheme.needs_data
    config = FORMAT.config({"a": scheme}, ["lm_head"])
    assert config == {
        "quant_method": "fp8",
        "activation_scheme": "static" if scheme.needs_data else "dynamic",
        "weight_block_size": None,
        "ignored_layers": ["lm_head"],
    }
    assert FORMAT.reads(config)
    read = FORMAT.schemes(config, ["a"])["a"]
    assert read == scheme
    restored = FORMAT.restore("a", tensors, read)
    assert restored is not None and torch.equal(restored.weight.dequantize(), quantized.dequantize())
    assert restored.input_scale is None or restored.input_scale.tolist() == [0.25]
    assert FORMAT.shape({"weight": (20, 30)}, read) == (20, 30)
    assert FORMAT.restore("b", tensors, read) is None


def test_scales_without_a_shape_are_read():
    quantized = quantize(torch.randn(4, 8), DYNAMIC.weight)
    tensors = FORMAT.tensors("a", quantized, DYNAMIC, None)
    tensors["a.weight_scale"] = tensors["a.weight_scale"].reshape(())
    restored = FORMAT.restore("a", tensors, DYNAMIC)
    assert restored is not None and torch.equal(restored.weight.dequantize(), quantized.dequantize())


def test_refusals():
    assert not FORMAT.refuses(PRESETS["fp8_static"])
    for name in ("fp8_dynamic", "fp8_block", "int8_dynamic", "int4"):
        assert "it holds only" in FORMAT.refuses(PRESETS[name])
    assert "one scheme" in FORMAT.refuses_together({"a": STATIC, "b": DYNAMIC})
    assert not FORMAT.reads({"quant_method": "fp8", "weight_block_size": [128, 128]})
