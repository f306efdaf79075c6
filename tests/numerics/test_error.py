from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch

from angelslim.numerics.error import Histogram, LayerRecord, error_of


def test_sqnr_is_ten_log_of_the_power_ratio():
    original = torch.tensor([3.0, 4.0])
    assert error_of(original, original + torch.tensor([0.3, 0.4]))[0] == pytest.approx(20.0, rel=1e-5)
    assert error_of(original, original) == (math.inf, 0.0)
    assert error_of(torch.zeros(2), torch.zeros(2)) == (math.inf, 0.0)
    assert error_of(torch.zeros(2), torch.ones(2))[0] < -1000


def test_each_bit_is_worth_six_decibels():
    values = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    levels = [error_of(values, (values * 2**bits).round() / 2**bits)[0] for bits in (4, 5, 6)]
    assert levels[1] - levels[0] == pytest.approx(6.02, abs=0.2)
    assert levels[2] - levels[1] == pytest.approx(6.02, abs=0.2)


def test_relative_error_is_a_ratio_of_norms():
    assert error_of(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0]))[1] == pytest.approx(0.2)


def test_histograms_share_their_bins_and_count_every_value():
    before = torch.linspace(-1, 1, 1000)
    histogram = Histogram.of(before, before * 1.5)
    assert (histogram.low, histogram.high) == (-1.0, 1.0)
    assert sum(histogram.before) == sum(histogram.after) == 1000
    assert histogram.after[0] > histogram.before[0]  # what left the range is counted at its end


def test_a_constant_tensor_has_a_histogram():
    assert sum(Histogram.of(torch.zeros(5), torch.zeros(5)).before) == 5


def test_a_record_survives_json():
    record = LayerRecord(
        "a", 0, "W int8", (2, 3), 8.5, math.inf, 0.0, weights=Histogram(0.0, 1.0, [1], [1]), input_scale=0.5
    )
    assert LayerRecord.from_dict(json.loads(json.dumps(asdict(record)))) == record


def test_large_tensors_are_measured_part_by_part_and_nothing_is_left_out():
    generator = torch.Generator().manual_seed(5)
    before = torch.randn(120_001, generator=generator)
    before[-1] = 9.0  # the largest value lies in the last, ragged part
    after = (before * 8).round() / 8
    noise, signal = (before - after).double().square().sum(), before.double().square().sum()
    assert error_of(before, after)[1] == pytest.approx(math.sqrt(noise / signal), rel=1e-5)
    counted = Histogram.of(before, after)
    assert counted.high == 9.0 and sum(counted.before) == sum(counted.after) == 120_001
    low = float(before.min())
    expected = torch.histc(before, len(counted.before), low, 9.0).long().tolist()
    assert counted.before == expected


def test_the_histogram_of_a_sample_reaches_to_the_largest_value():
    before = torch.zeros(2_000_000)
    before[1] = 9.0
    counted = Histogram.of(before, before)
    assert counted.high == 9.0 and sum(counted.before) < 100_000
