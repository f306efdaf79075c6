"""Records of low-bit weights against the element-by-element twin."""

from __future__ import annotations

import pytest
import torch

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
