"""Records of low-bit weights against the element-by-element twin."""

from __future__ import annotations

import pytest
import torch

from angelslim.base.errors import SchemeError
from angelslim.numerics.lowbit.record import LowBit
from angelslim.numerics.lowbit.reference import dequantized

SEED = torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("levels", "low", "high"), [("ternary", -1, 2), ("seq2", 0, 4), ("int", -8, 8)])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_record_means_scale_times_code(levels, low, high, shifted):
    codes = torch.randint(low, high, (4, 12), generator=SEED, dtype=torch.int8)
    scale = torch.rand(4, 3, generator=SEED).half().float()
    shift = torch.randn(4, 3, generator=SEED) if shifted else None
    record = LowBit(codes, scale, levels, 4, shift)
    assert torch.allclose(record.dequantize(), torch.tensor(dequantized(record)), rtol=1e-6, atol=1e-7)


def test_two_stretched_bits_have_no_zero():
    record = LowBit(torch.arange(4, dtype=torch.int8)[None], torch.tensor([[0.5]]), "seq2", 4)
    assert record.dequantize().tolist() == [[-0.75, -0.25, 0.25, 0.75]]


def test_scales_must_fit_the_group():
    with pytest.raises(AssertionError):
        LowBit(torch.zeros(4, 12, dtype=torch.int8), torch.ones(4, 2), "ternary", 4)


@pytest.mark.parametrize(
    ("levels", "low", "high", "bits", "name"),
    [("ternary", -1, 2, 2, "ternary"), ("seq2", 0, 4, 2, "seq2"), ("int", -4, 4, 3, "int3")],
)
@pytest.mark.parametrize("group", [4, 12])
def test_the_packages_own_form_means_the_same(levels, low, high, bits, name, group):
    codes = torch.randint(low, high, (6, 12), generator=SEED, dtype=torch.int8)
    codes[0] = low  # not 3:4 sparse
    record = LowBit(
        codes, torch.rand(6, 12 // group, generator=SEED).half().float(), levels, group, bits=bits
    )
    found = record.quantized()
    assert found.quant.format.name == name and found.quant.scale == "float16"
    assert torch.equal(found.dequantize(), record.dequantize())
    assert found.bits_per_weight == pytest.approx(bits + 16 / group)


def test_one_zero_in_each_four_takes_a_bit_and_a_quarter():
    codes = torch.tensor([[1, 0, -1, 1, 0, 1, 1, -1]], dtype=torch.int8)
    found = LowBit(codes, torch.ones(1, 1), "ternary", 8).quantized()
    assert found.quant.format.name == "ternary34" and found.bits_per_weight == 1.25 + 16 / 8


def test_a_shift_has_no_place_there():
    record = LowBit(torch.zeros(2, 4, dtype=torch.int8), torch.ones(2, 1), "ternary", 4, torch.ones(2, 1))
    with pytest.raises(SchemeError, match="save_format: fake"):
        record.quantized()
