"""The packed layout of low-bit weights: bit for bit there and back, and every field where the page says it lies."""

from __future__ import annotations

import pytest
import torch

from angelslim.base.errors import ModelError
from angelslim.export.lowbit import FORMAT
from angelslim.numerics.lowbit.record import LowBit
from angelslim.numerics.packing import pack_bits, unpack_bits
from angelslim.numerics.scheme import PRESETS, Scheme

NAME = "model.layers.0.mlp.up_proj"
CASES = {
    "seq2": ("seq2", 0, 4, 2),
    "ternary": ("ternary", -1, 2, 2),
    "int2": ("int", -2, 2, 2),
    "int3": ("int", -4, 4, 3),
}


def record(kind: str, columns: int = 24, group: int = 8) -> LowBit:
    generator = torch.Generator().manual_seed(len(kind))
    if kind == "sherry":
        codes = torch.randint(0, 2, (6, columns), generator=generator, dtype=torch.int8) * 2 - 1
        lanes = torch.randint(0, 4, (6, columns // 4, 1), generator=generator)
        codes.view(6, -1, 4).scatter_(2, lanes, 0)
        levels, bits = "ternary", 2
    else:
        levels, low, high, bits = CASES[kind]
        codes = torch.randint(low, high, (6, columns), generator=generator, dtype=torch.int8)
    scale = (torch.rand(6, columns // group, generator=generator) + 0.5).half().float()
    return LowBit(codes, scale, levels, group, bits=bits)


@pytest.mark.parametrize("kind", [*CASES, "sherry"])
@pytest.mark.parametrize("group", [8, 24])
def test_a_layer_comes_back_bit_for_bit(kind, group):
    weight = record(kind, group=group).quantized()
    scheme = Scheme(weight.quant)
    assert not FORMAT.refuses(scheme) and not FORMAT.refuses_shape(scheme, (6, 24))
    tensors = FORMAT.tensors(NAME, weight, scheme, None)
    config = FORMAT.config({NAME: scheme}, ["lm_head"])
    assert FORMAT.reads(config) and FORMAT.schemes(config, [NAME]) == {NAME: scheme}
    back = FORMAT.restore(NAME, tensors, scheme)
    assert back is not None and torch.equal(back.weight.codes, weight.codes)
    assert torch.equal(back.weight.dequantize(), weight.dequantize())
    assert tensors[f"{NAME}.weight_scale"].dtype == torch.float16
    bits = 8 * tensors[f"{NAME}.weight_packed"].numel() / weight.codes.numel()
    assert bits - weight.quant.format.stored_bits < 8 / 24  # the last byte of a row


def test_fields_lie_where_the_layout_says():
    """Read with shifts and masks alone, as an engine would."""
    weight = record("seq2").quantized()
    packed = FORMAT.tensors(NAME, weight, Scheme(weight.quant), None)[f"{NAME}.weight_packed"]
    for row in range(6):
        for column in range(24):
            field = int(packed[row, column // 4]) >> 2 * (column % 4) & 3
            assert field - 1.5 == float(weight.codes[row, column]) + 0.5


def test_five_bit_fields_form_one_stream():
    fields = torch.arange(32, dtype=torch.uint8).view(4, 8)
    packed = pack_bits(fields, 5)
    assert packed.shape == (4, 5)
    for row in range(4):
        stream = sum(int(byte) << 8 * place for place, byte in enumerate(packed[row]))
        assert [stream >> 5 * place & 31 for place in range(8)] == fields[row].tolist()
    assert torch.equal(unpack_bits(packed, 5, 8), fields)
    assert torch.equal(
        unpack_bits(pack_bits(fields[:, :3], 5), 5, 3), fields[:, :3]
    )  # a last byte that is not full


@pytest.mark.parametrize("name", ["int4", "fp8_dynamic", "nvfp4"])
def test_other_schemes_are_refused_with_the_reason(name):
    assert FORMAT.refuses(PRESETS[name])


def test_a_layer_without_a_group_and_a_newer_version_are_errors():
    weight = record("ternary").quantized()
    config = FORMAT.config({NAME: Scheme(weight.quant)}, [])
    with pytest.raises(ModelError, match="does not say how 'other' is packed"):
        FORMAT.schemes(config, ["other"])
    with pytest.raises(ModelError, match="version 2"):
        FORMAT.schemes({**config, "version": 2}, [NAME])
