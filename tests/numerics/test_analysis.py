from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from angelslim.numerics import analysis
from angelslim.numerics.error import error_of
from angelslim.numerics.quantize import quantize, quantize_with
from angelslim.numerics.scheme import FORMATS, PER_CHANNEL, PER_TENSOR, PRESETS, Quant, per_block, per_group


def weights(shape=(48, 96), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator) * 0.02
    values[3, 5], values[7, 11] = 0.9, -1.3  # outliers
    values[0, :10] = 0
    return values.to(dtype)


def precise(tensor):
    return tensor.float().double().numpy().reshape(-1)


@pytest.fixture(params=[1 << 18, 1000], ids=["one chunk", "several chunks"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(analysis, "CHUNK", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_tensor_is_described_as_float64_does(chunk, dtype):
    values = weights(dtype=dtype)
    x = precise(values)
    found = analysis.describe(values)
    ordered = sorted(abs(x))
    assert found.amax == ordered[-1]
    assert found.p999 == ordered[math.ceil(0.999 * len(x)) - 1]
    assert found.p9999 == ordered[math.ceil(0.9999 * len(x)) - 1]
    m2, m4 = ((x - x.mean()) ** 2).mean(), ((x - x.mean()) ** 4).mean()
    assert found.std == pytest.approx(math.sqrt(m2), rel=1e-5)
    assert found.kurtosis == pytest.approx(m4 / m2**2, rel=1e-5)
    assert analysis.zero_share(values) == (x == 0).mean() >= 10 / x.size


def test_every_rank_is_the_sorted_value(chunk):
    values = torch.cat(
        [weights(seed=4).flatten(), torch.tensor([0.0, -0.0, 1e-42, -3e38, 3e38, 1e-3, -1e-3])]
    )
    ordered = values.abs().sort().values
    ranks = [1, 2, 3, 9, 10, 17, 2304, 4000, len(ordered) - 1, len(ordered)]
    assert analysis.magnitudes_at(values, ranks) == [ordered[rank - 1].item() for rank in ranks]


def test_small_and_constant_tensors_are_described():
    assert analysis.describe(torch.tensor([[2.0]])) == analysis.Spread(2.0, 2.0, 2.0, 0.0, 0.0)
    assert analysis.describe(torch.zeros(3, 4)) == analysis.Spread(0.0, 0.0, 0.0, 0.0, 0.0)


def test_a_normal_distribution_has_kurtosis_three():
    values = torch.randn(400, 500, generator=torch.Generator().manual_seed(1))
    assert analysis.describe(values).kurtosis == pytest.approx(3, abs=0.05)


QUANTS = [
    PRESETS["fp8_static"].weight,
    PRESETS["fp8_dynamic"].weight,
    Quant(FORMATS["fp8_e4m3"], per_block(32, 32)),
    PRESETS["int8_dynamic"].weight,
    Quant(FORMATS["int4"], per_group(32)),
    Quant(FORMATS["int4"], per_group(32), symmetric=False),
    Quant(FORMATS["int8"], PER_TENSOR, symmetric=False),
]


@pytest.mark.parametrize("quant", QUANTS, ids=str)
def test_two_tensors_are_compared_as_float64_does(chunk, quant):
    original = weights(dtype=torch.bfloat16)
    restored = quantize(original, quant).dequantize()
    x, q = precise(original), precise(restored)
    found = analysis.compare(original, restored)
    assert found.sqnr_db == pytest.approx(10 * math.log10((x**2).sum() / ((x - q) ** 2).sum()), rel=1e-6)
    assert found.relative_error == pytest.approx(np.linalg.norm(x - q) / np.linalg.norm(x), rel=1e-6)
    assert found.max_error == pytest.approx(abs(x - q).max(), rel=1e-6)
    assert found.mean_error == pytest.approx(abs(x - q).mean(), rel=1e-5)
    assert found.flushed == ((q == 0) & (x != 0)).sum() / (x != 0).sum()
    assert (found.sqnr_db, found.relative_error) == pytest.approx(error_of(original, restored), rel=1e-5)
    low, high = min(x.min(), q.min()), max(x.max(), q.max())
    width = (high - low) / analysis.BINS
    exact = abs(np.sort(x) - np.sort(q)).mean()
    assert abs(found.wasserstein - exact) <= 1.001 * width
    assert (found.histogram.low, found.histogram.high) == (low, high)
    for counts, values in ((found.histogram.before, x), (found.histogram.after, q)):
        assert sum(counts) == values.size
        expected = np.histogram(values, analysis.PLOT_BINS, (low, high))[0]
        assert (
            abs(np.cumsum(counts) - np.cumsum(expected)).max() <= 3
        )  # values at an edge may fall on either side


def test_kl_is_the_sum_over_bins():
    before, after = torch.tensor([5, 0, 3, 2]), torch.tensor([4, 2, 4, 0])
    p, q = (np.array([c + 0.5 for c in counts]) / 12 for counts in ([5, 0, 3, 2], [4, 2, 4, 0]))
    assert analysis.kl_divergence(before, after) == pytest.approx(float(np.sum(p * np.log(p / q))), rel=1e-12)
    assert analysis.kl_divergence(before, before) == 0


def test_wasserstein_of_a_shift_is_the_shift():
    counts = torch.tensor([0, 4, 2, 0, 0, 0])
    assert analysis.wasserstein(counts, counts.roll(3), 0.25) == pytest.approx(0.75)


def test_equal_tensors_differ_in_nothing():
    for values in (weights(), torch.zeros(4, 4), torch.full((4, 4), 2.0)):
        found = analysis.compare(values, values.clone())
        assert found.sqnr_db == math.inf
        assert not any((found.relative_error, found.max_error, found.kl, found.wasserstein, found.flushed))


def ends(code_ends, scale, zero):
    return tuple((end - zero) * scale for end in code_ends)


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipped_and_at_limit_are_counted_one_by_one(chunk, symmetric):
    quant = Quant(FORMATS["int4"], per_group(32), symmetric)
    original = weights()
    honest = quantize(original, quant)
    weight = quantize_with(original, honest.scale * 0.6, honest.zero, quant)  # a grid that is too short
    codes, count = 0, 0
    for row in range(original.shape[0]):
        for column in range(original.shape[1]):
            scale = weight.scale[row, column // 32].item()
            zero = 0 if weight.zero is None else weight.zero[row, column // 32].item()
            codes += weight.codes[row, column].item() in (-8, 7)
            reached = original[row, column].item() / scale + zero
            count += reached > 7.5 * (1 + 2**-7) or reached < -8.5 * (1 + 2**-7)
    assert count > 100
    assert analysis.clipped(original, weight) == count / original.numel()
    assert analysis.at_limit(weight) == codes / original.numel()


@pytest.mark.parametrize("quant", QUANTS, ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_absmax_scales_clip_nothing(quant, scale_dtype):
    original = weights()
    weight = quantize(original, quant, scale_dtype)
    assert analysis.clipped(original, weight) == 0
    assert 0 < analysis.at_limit(weight) < 0.3


def test_fp8_clips_beyond_464():
    quant = Quant(FORMATS["fp8_e4m3"], PER_CHANNEL)
    original = torch.tensor([[448.0, -448.0, 463.0, 480.0, -500.0, 1.0, 0.0, 2.0]])
    weight = quantize_with(original, torch.ones(1, 1), None, quant)
    assert analysis.clipped(original, weight) == 2 / 8
    assert analysis.at_limit(weight) == 5 / 8


def test_finite_is_told_from_not():
    values = weights(dtype=torch.bfloat16)
    assert analysis.is_finite(values)
    for bad in (math.nan, math.inf, -math.inf):
        values[40, 90] = bad
        assert not analysis.is_finite(values)


def test_robust_scores_follow_the_definition():
    values = [4.0, 1.0, 3.0, 2.0, 50.0, 2.5]
    median = np.median(values)
    mad = np.median(abs(np.array(values) - median)) * 1.4826
    assert analysis.robust_scores(values) == pytest.approx([(v - median) / mad for v in values])
    assert analysis.robust_scores(values, floor=100) == pytest.approx([(v - median) / 100 for v in values])
    assert analysis.robust_scores([2.0, 2.0, 2.0]) == [0, 0, 0]
    assert analysis.robust_scores([]) == []


def test_an_outlier_does_not_hide_another():
    scores = analysis.robust_scores([1.0, 1.1, 0.9, 1.05, 0.95, 9.0, 80.0])
    assert scores[5] > 20 and scores[6] > 200 and max(scores[:5]) < 3


def test_the_last_step_is_that_of_the_format():
    assert analysis.last_step(FORMATS["int8"]) == 1
    assert analysis.last_step(FORMATS["fp8_e4m3"]) == 32
    assert analysis.last_step(replace(FORMATS["fp8_e4m3"], high=240.0)) == 16


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 2, 3], [5, 6, 7], 1.0),
        ([1, 2, 3], [7, 6, 5], -1.0),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),  # 1 - 6 * sum d^2 / (n (n^2 - 1))
        ([1, 1, 2, 3], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5)),  # the first two share the rank 1.5
        ([2, 2, 2], [1, 2, 3], 0.0),
    ],
)
def test_rank_correlation_is_spearmans(one, other, expected):
    assert analysis.rank_correlation(one, other) == pytest.approx(expected)
    assert analysis.rank_correlation([math.exp(x) for x in one], other) == pytest.approx(expected)
