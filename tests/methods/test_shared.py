"""What post-training methods share."""

from __future__ import annotations

import pytest
import torch

from angelslim.methods.ptq._shared import PROBE_VALUES, InputStatistics, round_weight
from angelslim.numerics.observers import make_observer
from angelslim.numerics.scheme import FORMATS, PER_TENSOR, PRESETS, Quant

FP8 = Quant(FORMATS["fp8_e4m3"], PER_TENSOR)


def test_scales_below_eight_bits_take_the_weights_type():
    weight = torch.randn(8, 128).to(torch.bfloat16)
    assert round_weight(weight, PRESETS["int4"].weight).scale.dtype == torch.bfloat16
    assert round_weight(weight, PRESETS["int8_dynamic"].weight).scale.dtype == torch.float32


def test_statistics_keep_a_bounded_sample():
    statistics = InputStatistics(make_observer("absmax", FP8.format))
    for _ in range(20):
        statistics.update(torch.randn(100, 256))
    statistics.update(torch.full((1, 256), -9.0))
    assert 0 < statistics.values.numel() <= PROBE_VALUES
    assert statistics.scale(FP8).item() == pytest.approx(9 / 448)
    assert statistics.scale(FP8).shape == (1, 1)


def test_inputs_that_are_always_zero_give_a_usable_scale():
    statistics = InputStatistics(make_observer("absmax", FP8.format))
    statistics.update(torch.zeros(4, 8))
    assert statistics.scale(FP8).item() > 0
