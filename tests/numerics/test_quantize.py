"""Quantization against a slow loop over elements, against compressed-tensors, and against its own laws."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from angelslim.base.errors import SchemeError
from angelslim.numerics.quantize import (
    dequantize,
    fake_quantize,
    quantize,
    quantize_with,
    round_to,
    tile_of,
)
from angelslim.numerics.scheme import (
    FORMATS,
    PER_CHANNEL,
    PER_TENSOR,
    PER_TOKEN,
    PRESETS,
    Format,
    Granularity,
    Quant,
    per_block,
    per_group,
)

GRANULARITIES = (
    PER_TENSOR, PER_CHANNEL, PER_TOKEN, per_group(8), per_group(24), per_block(4, 8), per_block(5, 7)
)  # fmt: skip
SCHEMES = [
    Quant(grid, granularity, symmetric)
    for grid, granularity, symmetric in product(FORMATS.values(), GRANULARITIES, (True, False))
    if symmetric or grid.kind == "int"
]
ENGINES = [quant for quant in SCHEMES if quant.format.name in ("int4", "int8", "fp8_e4m3", "fp4_e2m1")]
FP8 = FORMATS["fp8_e4m3"]


def matrix(rows: int = 10, columns: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * torch.logspace(-2, 1, rows)[:, None]
    values[3] = values[3].abs() + 1  # a row without negative values, so that the zero point is at an end
    return values


def nearest(value: float, grid: Format) -> float:
    """Round one number to a format's grid by the definition of the format, ties to even."""
    if grid.kind == "int":
        return float(min(max(round(value), grid.low), grid.high))
    size = min(abs(value), grid.high)
    if size == 0:
        return 0.0
    mantissa, smallest = (
        (3, -6) if grid.bits == 8 else (1, 0)
    )  # bits; the exponent below which steps stay equal
    step = 2.0 ** (max(math.floor(math.log2(size)), smallest) - mantissa)
    return math.copysign(min(round(size / step) * step, grid.high), value)


def tile_indices(granularity: Granularity, row: int, column: int) -> tuple[int, int]:
    if granularity.kind == "tensor":
        return 0, 0
    if granularity.kind in ("channel", "token"):
        return row, 0
    if granularity.kind == "group":
        return row, column // granularity.columns
    return row // granularity.rows, column // granularity.columns


def slow(values: torch.Tensor, quant: Quant) -> tuple[torch.Tensor, dict[tuple[int, int], float]]:
    """Quantize and decode element by element in Python floats; returns (decoded, scale of each tile).

    ``decoded[0]`` and ``decoded[1]`` differ only where a value lies so near the middle between two codes (as the
    largest magnitude of a symmetric integer tile always does) that float32 may go either way.
    """
    members: dict[tuple[int, int], list[float]] = {}
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            members.setdefault(tile_indices(quant.granularity, row, column), []).append(value)
    grid = quant.format
    scales, zeros = {}, {}
    for tile, inside in members.items():
        low, high = min(*inside, 0.0), max(*inside, 0.0)
        if quant.symmetric:
            steps = grid.high if grid.kind == "float" else (grid.high - grid.low) / 2
            scales[tile], zeros[tile] = max(-low, high) / steps, 0.0
        else:
            scales[tile] = (high - low) / (grid.high - grid.low)
            zeros[tile] = nearest(grid.low - low / scales[tile], grid)
    decoded = torch.empty(2, *values.shape, dtype=torch.float64)
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            tile = tile_indices(quant.granularity, row, column)
            scaled = value / scales[tile] + zeros[tile]
            for way, nudge in enumerate((1 - 1e-6, 1 + 1e-6)):
                code = nearest(scaled * nudge - grid.centre, grid)
                decoded[way, row, column] = (code + grid.centre - zeros[tile]) * scales[tile]
    return decoded, scales


def equals_either(ours: torch.Tensor, decoded: torch.Tensor) -> bool:
    return bool(torch.isclose(decoded, ours.double(), rtol=2e-6, atol=1e-12).any(0).all())


@pytest.mark.parametrize("quant", SCHEMES, ids=str)
def test_equals_a_loop_over_elements(quant):
    values = matrix()
    result = quantize(values, quant)
    decoded, scales = slow(values, quant)
    for (row, column), scale in scales.items():
        assert result.scale[row, column].item() == pytest.approx(scale, rel=1e-6)
    assert result.scale.numel() == len(scales)
    assert equals_either(result.dequantize(), decoded)
    assert (decoded[0] != decoded[1]).float().mean() <= 0.2  # the largest of each tile of eight at most


@pytest.mark.parametrize("quant", ENGINES, ids=str)
def test_equals_compressed_tensors_bit_for_bit(quant):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle import forward as theirs
    from compressed_tensors.quantization.utils import calculate_qparams

    from angelslim.export._arguments import arguments as entry

    if quant.granularity.kind == "block" and quant.granularity.rows == 5:
        quant = Quant(quant.format, per_block(5, 8), quant.symmetric)  # the library wants whole blocks
    values = matrix()
    rows, columns = tile_of(quant.granularity, (10, 24))
    down, across = math.ceil(10 / rows), math.ceil(24 / columns)
    padded = torch.nn.functional.pad(values, (0, across * columns - 24, 0, down * rows - 10))
    tiles = padded.reshape(down, rows, across, columns)
    per_token = quant.granularity == PER_TOKEN  # which the library allows for dynamic scales only
    arguments = QuantizationArgs(**entry(replace(quant, dynamic=per_token)))
    scale, zero = calculate_qparams(tiles.amin((1, 3)), tiles.amax((1, 3)), arguments)

    ours = quantize(values, quant)
    assert torch.equal(ours.scale, scale)
    if ours.zero is not None:
        assert torch.equal(ours.zero, zero.to(torch.int8))
    shaped = scale.reshape(1) if quant.granularity == PER_TENSOR else scale
    zeros = (zero.reshape(1) if quant.granularity == PER_TENSOR else zero).to(torch.int8)
    codes = theirs.quantize(values, shaped, zeros, arguments, dtype=ours.codes.dtype)
    assert torch.equal(ours.codes.float(), codes.float())
    theirs_decoded = theirs.dequantize(ours.codes, shaped, None if quant.symmetric else zeros, arguments)
    assert torch.equal(ours.dequantize(), theirs_decoded)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("grid", [FP8, FORMATS["fp4_e2m1"]], ids=lambda grid: grid.name)
def test_floats_map_the_largest_magnitude_of_each_tile_to_the_largest_code(granularity, grid):
    values = matrix()
    quantized = quantize(values, Quant(grid, granularity))
    tiles: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for row in range(10):
        for column in range(24):
            pair = (values[row, column].item(), quantized.codes[row, column].item())
            tiles.setdefault(tile_indices(granularity, row, column), []).append(pair)
    for pairs in tiles.values():
        value, code = max(pairs, key=lambda pair: abs(pair[0]))
        assert code == math.copysign(grid.high, value)


@pytest.mark.parametrize("quant", [q for q in SCHEMES if q.format == FP8], ids=str)
def test_fp8_error_is_at_most_half_a_step_of_three_mantissa_bits(quant):
    values = matrix()
    quantized = quantize(values, quant)
    rows, columns = tile_of(quant.granularity, (10, 24))
    scale = quantized.scale.repeat_interleave(rows, 0)[:10].repeat_interleave(columns, 1)[:, :24]
    normal = (values / scale).abs() >= 2**-6
    error = (quantized.dequantize() - values).abs()
    assert normal.float().mean() > 0.5
    assert (error <= values.abs() / 16 * (1 + 1e-6))[normal].all()
    assert (error <= scale * 2**-10 * (1 + 1e-6))[~normal].all()


@pytest.mark.parametrize("quant", SCHEMES, ids=str)
def test_quantizing_twice_changes_nothing(quant):
    first = quantize(matrix(), quant)
    again = quantize_with(first.dequantize(), first.scale, first.zero, quant)
    assert torch.equal(again.codes.float(), first.codes.float())


@pytest.mark.parametrize("quant", SCHEMES, ids=str)
def test_a_zero_tensor_has_finite_scales_and_stays_zero(quant):
    quantized = quantize(torch.zeros(10, 24), quant)
    assert (quantized.scale > 0).all() and quantized.scale.isfinite().all()
    if quant.format.centre:  # no level at zero
        assert torch.equal(quantized.dequantize().abs(), quant.format.centre * torch.ones(10, 24))
    else:
        assert torch.equal(quantized.dequantize(), torch.zeros(10, 24))


@pytest.mark.parametrize("grid", FORMATS.values(), ids=lambda grid: grid.name)
def test_subnormal_weights_give_finite_results(grid):
    tiny = torch.full((4, 8), 1e-42)
    quantized = quantize(tiny, Quant(grid, PER_CHANNEL), torch.bfloat16)
    assert quantized.dequantize().isfinite().all() and (quantized.scale > 0).all()


def test_ragged_blocks_have_one_scale_each_and_zero_padding_does_not_leak():
    values = torch.full((5, 7), 2.0)
    quantized = quantize(values, Quant(FP8, per_block(4, 4)))
    assert quantized.scale.shape == (2, 2)
    assert torch.equal(quantized.scale, torch.full((2, 2), 2.0 / 448))
    assert torch.equal(quantized.codes.float(), torch.full((5, 7), 448.0))


def test_an_odd_group_is_refused_with_both_sizes():
    with pytest.raises(SchemeError, match=r"Input size 24 is not a multiple of the group size 7"):
        quantize(matrix(), Quant(FORMATS["int4"], per_group(7)))


@pytest.mark.parametrize("size", [0, -1, -128])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(SchemeError, match="is not positive"):
        per_group(size)
    with pytest.raises(SchemeError, match="is not positive"):
        per_block(size, 128)


def test_fp4_rounds_to_the_nearest_of_fifteen_numbers_and_ties_to_the_even_mantissa():
    grid = FORMATS["fp4_e2m1"]
    values = torch.linspace(-7, 7, 28 * 64 + 1)  # every tie is among them
    expected = torch.tensor([nearest(value, grid) for value in values.tolist()])
    assert torch.equal(round_to(values, grid).float(), expected)
    assert sorted(set(expected.abs().tolist())) == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert round_to(ties, grid).tolist() == [0, 1, 1, 2, 2, 4, 4]


def test_the_fp8_grid_is_all_253_finite_codes():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = codes[codes.isfinite()]
    assert finite.unique().numel() == 253  # 256 patterns, two of them NaN, and -0 equals 0
    assert torch.equal(round_to(finite, FP8).float(), finite)
    assert round_to(torch.tensor([1e9, -1e9, 464.0]), FP8).tolist() == [448.0, -448.0, 448.0]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20), st.sampled_from(SCHEMES))
def test_any_row_keeps_the_error_below_one_step(row, quant):
    quant = Quant(quant.format, PER_CHANNEL, quant.symmetric)
    values = torch.tensor([row])
    quantized = quantize(values, quant)
    error = (quantized.dequantize() - values).abs()
    step = quantized.scale.item() * (
        1 if quant.format.kind == "int" else 16
    )  # 2^(8 - 3) / 2 for values near 448
    assert error.max().item() <= step * (1 + 1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_blocks_of_any_size_on_any_shape_equal_the_loop(rows, columns, tall, wide, seed):
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    quant = Quant(FORMATS["int8"], per_block(tall, wide))
    assert equals_either(quantize(values, quant).dequantize(), slow(values, quant)[0])


@settings(max_examples=25, deadline=None)
@given(st.floats(2**-20, 2**20), st.sampled_from([q for q in SCHEMES if q.symmetric]))
def test_scaling_by_a_power_of_two_scales_the_result(factor, quant):
    factor = 2.0 ** round(math.log2(factor))
    first, second = quantize(matrix(), quant), quantize(matrix() * factor, quant)
    assert torch.equal(second.dequantize(), first.dequantize() * factor)


def test_scales_are_rounded_before_the_codes_are_chosen():
    values = matrix()
    quantized = quantize(values, Quant(FORMATS["int4"], per_group(8)), torch.bfloat16)
    assert quantized.scale.dtype == torch.bfloat16
    expected = quantize_with(values, quantized.scale, None, quantized.quant)
    assert torch.equal(quantized.codes, expected.codes)


def test_dynamic_inputs_are_quantized_row_by_row_whatever_the_leading_shape():
    quant = Quant(FORMATS["int8"], PER_TOKEN, dynamic=True)
    values = matrix().reshape(2, 5, 24).to(torch.bfloat16)
    result = fake_quantize(values, quant)
    assert result.dtype == torch.bfloat16 and result.shape == values.shape
    alone = fake_quantize(values[1, 3][None], quant)[0]
    assert torch.equal(result[1, 3], alone)


def test_static_inputs_saturate_at_the_given_scale():
    quant = Quant(FP8, PER_TENSOR)
    result = fake_quantize(torch.tensor([[1.0, 100.0]]), quant, torch.tensor([[1 / 448]]))
    torch.testing.assert_close(result, torch.tensor([[1.0, 1.0]]))


def test_stored_bits_count_scales_and_zero_points():
    values = torch.randn(4, 64)
    assert (
        quantize(values, Quant(FORMATS["int4"], per_group(32)), torch.bfloat16).bits_per_weight == 4 + 16 / 32
    )
    asymmetric = quantize(values, Quant(FORMATS["int4"], per_group(32), symmetric=False), torch.bfloat16)
    assert asymmetric.bits_per_weight == 4 + (16 + 4) / 32
    assert quantize(values, Quant(FP8, PER_CHANNEL)).bits_per_weight == 8 + 32 / 64


def test_stored_bits_count_small_scales_and_the_global_one():
    values = torch.randn(4, 64)
    bits = {
        name: quantize(values, PRESETS[name].weight).bits_per_weight for name in ("mxfp4", "mxfp8", "nvfp4")
    }
    assert bits["mxfp4"] == 4 + 8 / 32 and bits["mxfp8"] == 8 + 8 / 32
    assert bits["nvfp4"] == 4 + 8 / 16 + 32 / 256
    wide = quantize(torch.randn(4, 256), PRESETS["w4a8_fp8"].weight)
    assert wide.bits_per_weight == 4 + 16 / 128


def test_dequantize_is_codes_minus_zero_times_scale():
    quant = Quant(FORMATS["int8"], PER_CHANNEL, symmetric=False)
    decoded = dequantize(
        torch.tensor([[3, -5]], dtype=torch.int8),
        torch.tensor([[0.5]]),
        torch.tensor([[1]], dtype=torch.int8),
        quant,
    )
    assert decoded.tolist() == [[1.0, -3.0]]


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_bands_of_rows_change_nothing(granularity, symmetric, monkeypatch):
    quant = Quant(FORMATS["int8"], granularity, symmetric)
    matrix = torch.randn(23, 48, generator=torch.Generator().manual_seed(3))
    whole = quantize(matrix, quant)
    decoded = whole.dequantize()
    monkeypatch.setattr("angelslim.numerics.quantize.BAND", 3 * 48)
    banded = quantize(matrix, quant)
    assert torch.equal(banded.codes, whole.codes) and torch.equal(banded.dequantize(), decoded)


@pytest.mark.parametrize("name", ["fp8_static", "fp8_dynamic", "nvfp4"])
def test_inputs_without_tokens_stay_empty(name):
    quant, scale = PRESETS[name].input, torch.ones(1, 1)
    assert quant is not None
    assert fake_quantize(torch.empty(0, 32), quant, None if quant.dynamic else scale).shape == (0, 32)
