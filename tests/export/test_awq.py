"""Our tensors against the layout, written out one code at a time."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from angelslim.base.errors import ModelError, SchemeError
from angelslim.config.schemes import EXTRA
from angelslim.export.awq import FORMAT
from angelslim.numerics.quantize import Quantized, quantize
from angelslim.numerics.scheme import FORMATS, PER_CHANNEL, PRESETS, Quant, Scheme, per_group

NAME = "model.layers.0.mlp.down_proj"
PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # where engines look for output 0, 1, 2, ... of a word
EVERY = pytest.mark.parametrize("grain", [per_group(32), per_group(64), PER_CHANNEL], ids=str)


def made(grain) -> tuple[Quantized, Scheme]:
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(0)) + 0.2
    quant = Quant(FORMATS["int4"], grain, symmetric=False)
    return quantize(weight, quant, torch.float16), Scheme(quant)


def nibble(words: torch.Tensor, row: int, output: int) -> int:
    word = int(words[row, output // 8]) & 0xFFFFFFFF
    return (word >> (4 * PLACES[output % 8])) & 15


@EVERY
def test_every_code_is_where_the_layout_has_it(grain):
    quantized, scheme = made(grain)
    tensors = FORMAT.tensors(NAME, quantized, scheme, None)
    words, zeros, scales = (tensors[f"{NAME}.{part}"] for part in ("qweight", "qzeros", "scales"))
    groups = quantized.scale.shape[1]
    assert (words.dtype, tuple(words.shape)) == (torch.int32, (128, 3))
    assert (zeros.dtype, tuple(zeros.shape)) == (torch.int32, (groups, 3))
    assert (scales.dtype, tuple(scales.shape)) == (torch.float16, (groups, 24))
    assert quantized.zero is not None and quantized.zero.unique().numel() > 1
    decoded = quantized.dequantize()
    for output, column in product(range(24), (0, 1, 31, 32, 127)):
        group = column * groups // 128
        value = nibble(words, column, output) - nibble(zeros, group, output)
        assert float(value * scales[group, output].float()) == decoded[output, column]


@EVERY
def test_round_trip(grain):
    quantized, scheme = made(grain)
    read = FORMAT.schemes(FORMAT.config({NAME: scheme}, ["lm_head"]), [NAME])[NAME]
    assert read == FORMAT.stored(scheme) and read.weight.scale == "float16"
    tensors = FORMAT.tensors(NAME, quantized, scheme, None)
    restored = FORMAT.restore(NAME, tensors, read)
    assert restored is not None
    assert torch.equal(restored.weight.codes, quantized.codes)
    assert torch.equal(restored.weight.dequantize(), quantized.dequantize())
    parts = {name.rpartition(".")[2]: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert FORMAT.shape(parts, read) == (24, 128)
    assert FORMAT.restore("model.norm", tensors, read) is None


def test_config():
    config = FORMAT.config({NAME: EXTRA["int4_asym"]}, ["lm_head"])
    assert config == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }
    assert FORMAT.config({NAME: EXTRA["int4_asym"]}, [])["modules_to_not_convert"] is None
    older = {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "version": "GEMM", "zero_point": True}
    assert FORMAT.schemes(older, [NAME]) == {NAME: FORMAT.stored(EXTRA["int4_asym"])}


@pytest.mark.parametrize("changes", [{"bits": 8}, {"version": "gemv"}, {"zero_point": False}])
def test_other_versions_are_refused(changes):
    with pytest.raises(ModelError, match="can be read here"):
        FORMAT.schemes({**FORMAT.config({NAME: EXTRA["int4_asym"]}, []), **changes}, [NAME])


def test_refusals():
    assert "zero points" in FORMAT.refuses(PRESETS["int4"])
    assert "INT4" in FORMAT.refuses(PRESETS["fp8_block"])
    assert "inputs" in FORMAT.refuses(Scheme(EXTRA["int4_asym"].weight, PRESETS["int8_dynamic"].input))
    assert not FORMAT.refuses(EXTRA["int4_asym"])
    assert "multiples of 8" in FORMAT.refuses_shape(EXTRA["int4_asym"], (10, 128))
    quantized = quantize(torch.randn(8, 32), Quant(FORMATS["int4"], per_group(32), symmetric=False))
    with pytest.raises(SchemeError, match="float16"):
        FORMAT.tensors(NAME, quantized, Scheme(quantized.quant), None)
