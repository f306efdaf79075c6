"""AWQ's search against the definition in float64, and what has to hold for any weight."""

from __future__ import annotations

import pytest
import torch

from angelslim.numerics import awq
from angelslim.numerics.awq import Reader, column_share, scale_of, search
from angelslim.numerics.products import Quadratic
from angelslim.numerics.scheme import FORMATS, PER_CHANNEL, PRESETS, Quant, per_group

IN = 64
INT4 = Quant(FORMATS["int4"], per_group(32), symmetric=False)
QUANTS = {
    "asymmetric groups": INT4,
    "symmetric groups": Quant(FORMATS["int4"], per_group(16)),
    "channel": Quant(FORMATS["int4"], PER_CHANNEL),
    "fp4": PRESETS["nvfp4_weight_only"].weight,
}


def weights(out: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, IN, generator=torch.Generator().manual_seed(seed)) * 0.05


def inputs(seed: int = 1) -> torch.Tensor:
    """A few channels are much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(500, IN, generator=generator) * torch.rand(IN, generator=generator).pow(6) * 20


def hessian(values: torch.Tensor) -> torch.Tensor:
    return values.T @ values / len(values)


def reader(weight: torch.Tensor, quant: Quant = INT4) -> Reader:
    return Reader(weight, quant, torch.float32)


def rounded(weight: torch.Tensor, scale: torch.Tensor, size: int) -> torch.Tensor:
    """INT4 with zero points, one group after another."""
    result = torch.zeros_like(weight)
    for row in range(len(weight)):
        for start in range(0, IN, size):
            part = (weight[row, start : start + size] * scale[start : start + size]).double()
            low, high = min(part.min().item(), 0), max(part.max().item(), 0)
            step = (high - low) / 15
            zero = min(max(round(-8 - low / step), -8), 7)
            codes = (part / step + zero).round().clamp(-8, 7)
            result[row, start : start + size] = (codes - zero) * step / scale[start : start + size]
    return result


def test_the_loss_is_what_the_outputs_lose():
    weight, seen = weights(), inputs()
    scale = scale_of(seen.abs().mean(0), torch.ones(IN), 10, False)
    lost = ((weight - rounded(weight.double(), scale.double(), 32)).double() @ seen.double().T).square().sum()
    assert reader(weight).losses([scale], Quadratic(hessian(seen)))[0] * len(seen) == pytest.approx(
        lost.item(), rel=1e-3
    )


@pytest.mark.parametrize("duo", [False, True])
def test_scales_are_those_of_the_definition(duo):
    mean, share = inputs().abs().mean(0), column_share([reader(weights())])
    for step in range(21):
        exact = mean.double() ** (step / 20)
        if duo:
            exact = exact / (share.double() ** (1 - step / 20) + 1e-4)
        exact = exact.clamp(min=1e-4)
        exact = exact / (exact.max() * exact.min()).sqrt()
        assert torch.allclose(scale_of(mean, share, step, duo).double(), exact, rtol=1e-4)
    assert torch.equal(scale_of(mean, share, 0, False), torch.ones(IN))


def test_the_share_is_that_of_the_tiles_largest_weight():
    weight = weights()
    exact = torch.zeros(IN, dtype=torch.float64)
    for start in range(0, IN, 32):
        part = weight[:, start : start + 32].abs().double()
        exact[start : start + 32] = (part / part.amax(1, keepdim=True)).mean(0)
    assert torch.allclose(column_share([reader(weight)]).double(), exact, rtol=1e-4)
    both = column_share([reader(weight), reader(weights(8, 5))])
    assert torch.allclose(both * 32, exact.float() * 24 + column_share([reader(weights(8, 5))]) * 8)


@pytest.mark.parametrize("name", QUANTS)
@pytest.mark.parametrize("duo", [False, True])
def test_the_best_is_never_worse_than_rounding(name, duo):
    squares, readers = (
        hessian(inputs()),
        [reader(weights(), QUANTS[name]), reader(weights(16, 3), QUANTS[name])],
    )
    found = search(readers, inputs().abs().mean(0), column_share(readers), squares, duo=duo)
    losses = [each.loss for each in found]
    (plain,) = (each for each in found if each.plain)
    assert losses == sorted(losses) and losses[0] <= plain.loss
    assert losses[0] < 0.9 * plain.loss  # these inputs are made for it
    assert duo or not any(each.duo for each in found)
    signal = [((each.weight @ squares) * each.weight).sum() for each in readers]
    plain_loss = sum(
        each.losses([torch.ones(IN)], Quadratic(squares))[0] / s
        for each, s in zip(readers, signal, strict=True)
    )
    assert plain.loss == pytest.approx(float(plain_loss), rel=1e-4)


def test_equal_candidates_leave_the_weights_alone():
    squares = hessian(inputs())
    zeros = [reader(torch.zeros(4, IN))]
    assert search(zeros, torch.ones(IN), torch.ones(IN), squares)[0].plain
    flat = [reader(weights())]  # all scales are one
    assert search(flat, torch.ones(IN), torch.ones(IN), torch.eye(IN), duo=False)[0].plain


def test_dead_channels_keep_finite_scales():
    mean = inputs().abs().mean(0)
    mean[:5] = 0
    share = column_share([reader(weights())])
    share[3:8] = 0
    for step in range(21):
        for duo in (False, True):
            scale = scale_of(mean, share, step, duo)
            assert scale.isfinite().all() and scale.min() > 0


def test_a_sample_of_rows_judges_tall_weights_and_all_rows_the_tied_ones(monkeypatch):
    monkeypatch.setattr(awq, "ROWS", 8)
    tall = weights(50)
    assert torch.equal(reader(tall).sampled().weight, tall[::7])
    tied = reader(tall, PRESETS["fp8_static"].weight)
    assert tied.sampled() is tied
