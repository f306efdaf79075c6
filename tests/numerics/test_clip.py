"""Clipped ranges against a float64 loop over tiles and candidates, and what has to hold for any weight."""

from __future__ import annotations

import pytest
import torch

from angelslim.numerics import clip
from angelslim.numerics.clip import clip_range, tile_loss
from angelslim.numerics.quantize import outer_of, quantize, quantize_with, tile_range
from angelslim.numerics.scales import e4m3_numbers, e8m0_bytes, from_e4m3, from_e8m0
from angelslim.numerics.scheme import FORMATS, PER_CHANNEL, PER_TENSOR, PRESETS, Quant, per_block, per_group

OUT, IN = 12, 96
QUANTS = {
    "int4 groups": Quant(FORMATS["int4"], per_group(32)),
    "int4 groups asymmetric": Quant(FORMATS["int4"], per_group(16), symmetric=False),
    "int8 channel": Quant(FORMATS["int8"], PER_CHANNEL),
    "int4 channel asymmetric": Quant(FORMATS["int4"], PER_CHANNEL, symmetric=False),
    "fp8 tensor": Quant(FORMATS["fp8_e4m3"], PER_TENSOR),
    "int4 block": Quant(FORMATS["int4"], per_block(8, 40)),  # ragged in both directions
}


def weights(seed: int = 0) -> torch.Tensor:
    """Weights with a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(OUT, IN, generator=generator) * 0.05
    return values * (1 + 6 * (torch.rand(OUT, IN, generator=generator) < 0.03))


def hessian(seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(IN, IN, generator=generator) / IN**0.5
    inputs = torch.randn(400, IN, generator=generator) @ mix * torch.rand(IN, generator=generator)
    return inputs.T @ inputs / 400


KINDS = {"full": hessian(), "diagonal": hessian().diagonal().clone(), "none": None}


def nearest(value: float, quant: Quant) -> float:
    value = min(max(value, quant.format.low), quant.format.high)
    if quant.format.kind == "int":
        return float(round(value))
    return float(torch.tensor(value, dtype=torch.float32).to(torch.float8_e4m3fn))


def reference(weight, quant, squares) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition in float64, tile by tile: the losses of all candidates, and the losses at the best."""
    kind, full = quant.granularity.kind, squares
    if full is None:
        full = torch.eye(IN)
    elif full.dim() == 1:
        full = torch.diag(full)
    full = full.double()
    rows, columns = {
        "group": (1, quant.granularity.columns),
        "channel": (1, IN),
        "tensor": (OUT, IN),
        "block": (quant.granularity.rows, quant.granularity.columns),
    }[kind]
    every = []
    for top in range(0, OUT, rows):
        for left in range(0, IN, columns):
            tile = weight[top : top + rows, left : left + columns].double()
            block = full[left : left + columns, left : left + columns]
            losses = []
            for step in range(21):
                share = 1 - 0.5 * step / 20
                low, high = min(tile.min().item(), 0) * share, max(tile.max().item(), 0) * share
                if quant.symmetric:
                    half = 448 if quant.format.kind == "float" else (quant.format.high - quant.format.low) / 2
                    scale, zero = max(-low, high) / half, 0
                else:
                    scale = (high - low) / 15
                    zero = min(max(round(quant.format.low - low / scale), -8), 7)
                # The largest weight lies on a border between codes, so the quotient is taken in float32.
                wanted = tile.float() / torch.tensor(scale, dtype=torch.float32) + zero
                codes = [[nearest(float(value), quant) for value in row] for row in wanted]
                error = tile - (torch.tensor(codes, dtype=torch.float64) - zero) * scale
                losses.append((error @ block * error).sum().item())
            every.append(losses)
    found = torch.tensor(every, dtype=torch.float64)
    return found, torch.stack([losses[coarse_then_fine(losses.tolist())] for losses in found])


def coarse_then_fine(losses: list[float]) -> int:
    """Every fourth candidate, then those two beside the best, then those one beside it."""
    best = min(range(0, 21, 4), key=lambda step: losses[step])
    for distance in (2, 1):
        near = (best, best - distance, best + distance)
        best = min((step for step in near if 0 <= step <= 20), key=lambda step: losses[step])
    return best


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", QUANTS)
def test_what_the_search_finds_in_every_tile(name, kind):
    quant, weight, squares = QUANTS[name], weights(), KINDS[kind]
    every, best = reference(weight, quant, squares)
    scale, zero = clip_range(weight, quant, squares)
    plain = quantize(weight, quant)
    assert scale.shape == plain.scale.shape and (zero is None) == (plain.zero is None)
    losses = tile_loss(weight, scale, zero, quant, squares).flatten().double()
    assert torch.allclose(
        losses, best, rtol=1e-2
    )  # ranges that lose alike to two digits are taken for each other
    if quant.format.bits == 4:
        assert losses.sum() < 0.95 * every[:, 0].sum()


@pytest.mark.parametrize("name", QUANTS)
def test_no_tile_is_worse_than_with_the_full_range(name):
    quant = QUANTS[name]
    for seed in range(5):
        weight, squares = weights(seed).bfloat16(), hessian(seed + 7)
        plain = quantize(weight, quant, torch.bfloat16)
        scale, zero = clip_range(weight, quant, squares, torch.bfloat16)
        assert scale.dtype == torch.bfloat16
        exact = weight.float()
        clipped = tile_loss(exact, scale, zero, quant, squares)
        full = tile_loss(exact, plain.scale, plain.zero, quant, squares)
        assert (clipped <= full * 1.001).all() and clipped.sum() <= full.sum()


def test_the_loss_is_that_of_the_output():
    """One tile a row: the block of H is all of H."""
    generator = torch.Generator().manual_seed(3)
    inputs, weight = torch.randn(200, IN, generator=generator, dtype=torch.float64), weights()
    rounded = quantize(weight, QUANTS["int8 channel"])
    squares = (inputs.T @ inputs).float()
    lost = ((weight - rounded.dequantize()).double() @ inputs.T).square().sum(1)
    found = tile_loss(weight, rounded.scale, None, rounded.quant, squares)
    assert torch.allclose(found[:, 0].double(), lost, rtol=1e-3)


def test_zero_weights_and_dead_inputs_give_usable_scales():
    quant = QUANTS["int4 groups asymmetric"]
    for weight in (torch.zeros(OUT, IN), weights()):
        scale, zero = clip_range(weight, quant, torch.zeros(IN, IN))
        plain = quantize(weight, quant)
        assert torch.equal(scale, plain.scale) and torch.equal(zero, plain.zero)  # ties keep the full range
        assert quantize_with(weight, scale, zero, quant).dequantize().isfinite().all()


def test_scales_of_one_byte_stay_what_can_be_stored():
    weight, squares = weights(), hessian()
    small = torch.cat([weight, weight[:, :32] * 0.01], dim=1)  # groups far below the largest one
    nvfp4, mxfp4 = PRESETS["nvfp4_weight_only"].weight, PRESETS["mxfp4_weight_only"].weight
    scale, _ = clip_range(small, nvfp4, None)
    outer = outer_of(*tile_range(small, nvfp4.granularity), nvfp4)
    assert torch.equal(from_e4m3(e4m3_numbers(scale, outer), outer), scale)
    assert not torch.equal(scale, quantize(small, nvfp4).scale)
    scale, _ = clip_range(weight, mxfp4, squares)
    assert torch.equal(from_e8m0(e8m0_bytes(scale)), scale)
    tied = PRESETS["w4a8_fp8"].weight  # its scales are searched for in another way
    wide = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    assert torch.equal(clip_range(wide, tied, None)[0], quantize(wide, tied).scale)


def test_only_the_outliers_tile_is_clipped():
    quant, weight = QUANTS["int4 groups"], torch.full((1, 64), 0.07)
    weight[0, ::2] = -0.03
    weight[0, 5] = 0.14  # costs the rest of its tile half of the steps
    scale, _ = clip_range(weight, quant, None)
    full = quantize(weight, quant).scale
    assert scale[0, 0] < full[0, 0] and scale[0, 0] >= full[0, 0] * (1 - clip.MAX_SHRINK)
