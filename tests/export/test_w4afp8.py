"""SGLang's layout against its own way of packing, and the mixture of the two schemes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from angelslim.base.errors import SchemeError
from angelslim.export.w4afp8 import DENSE, FORMAT, is_expert
from angelslim.numerics.quantize import quantize
from angelslim.numerics.scheme import FORMATS, PER_TENSOR, PER_TOKEN, PRESETS, Quant, Scheme, per_group

FP8 = FORMATS["fp8_e4m3"]
EXPERT = Scheme(Quant(FORMATS["int4"], per_group(128)), Quant(FP8, PER_TENSOR))
NAMES = {
    "model.layers.3.mlp.experts.7.up_proj": EXPERT,
    "model.layers.3.mlp.shared_experts.up_proj": DENSE,
    "model.layers.0.self_attn.o_proj": DENSE,
}
NAME = next(iter(NAMES))


def expert(scale_dtype: torch.dtype = torch.bfloat16):
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    return quantize(weight, EXPERT.weight, scale_dtype)


def test_experts_are_two_signed_nibbles_a_byte():
    quantized = expert()
    tensors = FORMAT.tensors(NAME, quantized, EXPERT, torch.tensor([[0.5]]))
    packed = tensors[f"{NAME}.weight"]
    assert (packed.dtype, tuple(packed.shape)) == (torch.int8, (16, 128))
    for row, column in ((0, 0), (3, 1), (15, 254), (15, 255)):
        byte = int(packed[row, column // 2]) & 0xFF
        half = byte >> 4 if column % 2 else byte & 15
        assert (half - 16 if half > 7 else half) == quantized.codes[row, column]
    assert {int(code) for code in quantized.codes.unique()} == set(range(-8, 8))
    scale = tensors[f"{NAME}.weight_scale_inv"]
    assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (16, 2))
    assert (
        tensors[f"{NAME}.input_scale"].shape == () and tensors[f"{NAME}.input_scale"].dtype == torch.bfloat16
    )


def test_round_trip_of_a_mixture():
    read = FORMAT.schemes(FORMAT.config(NAMES, ["lm_head"]), list(NAMES))
    assert read == {name: FORMAT.stored(scheme) for name, scheme in NAMES.items()}
    for name, scheme in NAMES.items():
        quantized = expert() if is_expert(name) else quantize(torch.randn(130, 256), scheme.weight)
        given = torch.tensor([[0.5]]) if is_expert(name) else None
        tensors = FORMAT.tensors(name, quantized, scheme, given)
        restored = FORMAT.restore(name, tensors, read[name])
        assert restored is not None and torch.equal(restored.weight.dequantize(), quantized.dequantize())
        assert (restored.input_scale is None) == (given is None)
        parts = {part.rpartition(".")[2]: tuple(tensor.shape) for part, tensor in tensors.items()}
        assert FORMAT.shape(parts, scheme) == tuple(quantized.codes.shape)


def test_input_scales_are_rounded_up_so_that_nothing_new_saturates():
    for value in (0.0123, 0.5, 3.14159, 1e-6):
        tensors = FORMAT.tensors(NAME, expert(), EXPERT, torch.tensor([[value]]))
        stored = float(tensors[f"{NAME}.input_scale"])
        assert value <= stored <= value * (1 + 2**-7)
    assert float(FORMAT.tensors(NAME, expert(), EXPERT, torch.tensor([[0.5]]))[f"{NAME}.input_scale"]) == 0.5


def test_group_scales_that_the_engine_would_round_are_refused():
    with pytest.raises(SchemeError, match="bfloat16 does not hold"):
        FORMAT.tensors(NAME, expert(torch.float32), EXPERT, torch.tensor([[0.5]]))


def test_config():
    assert FORMAT.config(NAMES, ["lm_head"]) == {
        "quant_method": "w4afp8",
        "group_size": 128,
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }


@pytest.mark.parametrize(
    "scheme",
    [
        PRESETS["int4"],
        replace(EXPERT, input=Quant(FP8, PER_TOKEN, dynamic=True)),
        Scheme(Quant(FORMATS["int4"], per_group(64)), EXPERT.input),
        Scheme(Quant(FORMATS["int4"], per_group(128), symmetric=False), EXPERT.input),
        PRESETS["fp8_static"],
    ],
    ids=str,
)
def test_other_schemes_are_refused(scheme):
    assert "layers must be" in FORMAT.refuses(scheme)
    assert not FORMAT.refuses(EXPERT) and not FORMAT.refuses(DENSE)


def test_experts_and_the_rest_have_their_schemes():
    assert not FORMAT.refuses_together(NAMES)
    assert "'model.layers.0.self_attn.o_proj'" in FORMAT.refuses_together(
        {**NAMES, "model.layers.0.self_attn.o_proj": EXPERT}
    )
    assert f"'{NAME}'" in FORMAT.refuses_together({**NAMES, NAME: DENSE})
    assert "without routed experts" in FORMAT.refuses_together({"model.layers.0.self_attn.o_proj": DENSE})
