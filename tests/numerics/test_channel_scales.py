"""INT4 scales after an engine's conversion to FP8: nothing may have moved."""

from __future__ import annotations

import pytest
import torch

from angelslim.numerics import channel_scales
from angelslim.numerics.clip import clip_range
from angelslim.numerics.quantize import (
    Quantized,
    outer_of,
    quantize,
    quantize_with,
    scales_from_range,
    tile_range,
)
from angelslim.numerics.scheme import PRESETS, Quant

QUANT = PRESETS["w4a8_fp8"].weight
FREE = PRESETS["int4"].weight


def weights(spread: float = 0.02, rows: int = 96, columns: int = 1024) -> torch.Tensor:
    """Rows of very different sizes, as trained matrices have, with outliers."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, columns, generator=generator) * spread
    return (
        values
        * torch.logspace(-0.3, 0.7, rows)[:, None]
        * (1 + 3 * torch.rand(rows, columns, generator=generator) ** 20)
    )


def engine(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What vLLM makes of group scales ``[out, groups]``: (FP8 numbers, channel factors ``[out, 1]``).

    `convert_bf16_scales_to_fp8`: the scales are loaded in the model's type, quantized per row with a smallest
    factor, and the numbers are divided by 8, the factors multiplied.
    """
    loaded = scale.to(torch.bfloat16)
    smallest = 1.0 / (torch.finfo(torch.float8_e4m3fn).max * 512)
    factor = (loaded.abs().amax(-1, keepdim=True).float() / 448).clamp(min=smallest)
    numbers = (loaded.float() * factor.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return (numbers.float() / 8).to(torch.float8_e4m3fn), factor * 8


def as_computed(quantized: Quantized) -> torch.Tensor:
    """The weights that the engine's kernel multiplies with."""
    numbers, factor = engine(quantized.scale)
    groups = quantized.codes.float().unflatten(1, (-1, 128)) * numbers.float()[..., None]
    return groups.flatten(1) * factor


def test_the_engine_computes_with_the_weights_that_were_chosen():
    for spread in (0.02, 1.0, 30.0):
        quantized = quantize(weights(spread), QUANT)
        assert quantized.scale.dtype == torch.bfloat16
        assert torch.equal(as_computed(quantized), quantized.dequantize())


def test_scales_that_were_not_made_for_it_move():
    quantized = quantize(weights(), FREE, torch.bfloat16)
    moved = as_computed(quantized) / quantized.dequantize().where(quantized.codes != 0, torch.nan)
    assert 0.02 < (moved - 1).abs().nan_to_num().max() <= 2**-4


def test_rows_below_the_engines_smallest_factor_are_right_to_a_last_place():
    quantized = quantize(weights(1e-4), QUANT)
    assert quantized.scale.dtype == torch.float32
    computed, chosen = as_computed(quantized), quantized.dequantize()
    assert ((computed - chosen).abs() <= 2**-23 * chosen.abs()).all()


def test_rows_and_groups_of_zeros_survive():
    values = weights()
    values[3] = 0
    values[4, 128:512] = 0
    values[5] *= 1e-30
    quantized = quantize(values, QUANT)
    assert (quantized.scale > 0).all() and quantized.dequantize().isfinite().all()
    rest = torch.arange(96) != 5
    assert torch.equal(as_computed(quantized)[rest], quantized.dequantize()[rest])
    assert quantized.dequantize()[3].abs().max() == 0


@pytest.mark.parametrize("spread", [1e-3, 0.02, 1.0])
def test_decoded_weights_lie_on_the_weights(spread):
    values = torch.randn(256, 512, generator=torch.Generator().manual_seed(1)) * spread
    decoded = quantize(values, QUANT).dequantize().double()
    slope = (decoded * values).sum() / values.double().square().sum()
    assert 0.995 < slope < 1.005


def test_searching_loses_less_than_free_scales_of_rounding_to_nearest():
    values = weights()

    def lost(decoded: torch.Tensor) -> float:
        return (decoded - values).square().sum().item()

    low, high = tile_range(values, QUANT.granularity)
    plain = quantize_with(values, scales_from_range(low, high, QUANT)[0], None, QUANT)
    free = lost(quantize(values, FREE).dequantize())
    assert lost(plain.dequantize()) < 1.03 * free
    assert lost(quantize(values, QUANT).dequantize()) < 0.97 * free
    assert torch.equal(as_computed(plain), plain.dequantize())


def test_search_equals_trying_both_neighbours():
    values = weights(rows=6, columns=512)
    amax = values.abs().unflatten(1, (-1, 128)).amax(-1).double() / 7.5

    def loss(scale: torch.Tensor) -> torch.Tensor:
        error = values - quantize_with(values, scale, None, QUANT).dequantize()
        return error.square().unflatten(1, (-1, 128)).sum(-1)

    found = channel_scales.search(amax, loss).float()
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = numbers[(numbers > 0) & (numbers * 64 == (numbers * 64).round())].tolist()
    for row in range(6):
        factor = channel_scales.factors(amax[row : row + 1]).double().item()
        for group in range(4):
            quotient = amax[row, group].item() / factor
            pair = [
                max(v for v in numbers if v <= quotient),
                min((v for v in numbers if v >= quotient), default=448),
            ]
            pair = [448.0] if amax[row, group] == amax[row].max() else pair
            scored = [(loss(torch.full((6, 4), v * factor))[row, group].item(), v * factor) for v in pair]
            assert found[row, group].item() == min(scored)[1]


def test_clipped_ranges_keep_the_rows_factor():
    values = weights()
    low, high = tile_range(values, QUANT.granularity)
    outer = outer_of(low, high, QUANT)
    halves = scales_from_range(low / 2, high / 2, QUANT, outer=outer)[0]
    full = scales_from_range(low, high, QUANT, outer=outer)[0]
    mixed = torch.where(
        torch.rand(full.shape, generator=torch.Generator().manual_seed(2)) < 0.5, halves, full
    )
    quantized = quantize_with(values, mixed, None, QUANT)
    assert torch.equal(as_computed(quantized), quantized.dequantize())


def test_clipping_by_the_layers_inputs_keeps_them_too():
    values = weights()
    scale, _ = clip_range(values, QUANT, None)
    quantized = quantize_with(values, scale, None, QUANT)
    assert torch.equal(as_computed(quantized), quantized.dequantize())


def test_groups_of_other_sizes_work_alike():
    quant = Quant(QUANT.format, PRESETS["mxfp4"].weight.granularity, scale="fp8_channel")
    quantized = quantize(weights(), quant)
    numbers, factor = engine(quantized.scale)
    assert torch.equal(numbers.float() * factor, quantized.scale.float())
