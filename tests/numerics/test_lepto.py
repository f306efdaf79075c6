"""LeptoQuant's candidates against sorted tensors and plain float64 sums."""

from __future__ import annotations

import math

import pytest
import torch

from angelslim.numerics.lepto import (
    ALPHAS,
    FLOOR,
    MagnitudeCounts,
    candidates,
    denominator,
    shortlist,
)
from angelslim.numerics.quantize import fake_quantize
from angelslim.numerics.scheme import FORMATS, PER_TENSOR, Quant

GRID = FORMATS["fp8_e4m3"]


def heavy_tailed(rows: int = 700, columns: int = 24, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Laplace values with a few channels, and a few single values, far out."""
    generator = torch.Generator().manual_seed(5)
    values = (
        -torch.rand(rows, columns, generator=generator).log()
        * torch.randn(rows, columns, generator=generator).sign()
    )
    values[:, 3] *= 40
    values[torch.randint(rows, (12,), generator=generator), 7] *= 300
    return values.to(dtype)


def counted(values: torch.Tensor, weights: torch.Tensor | None = None) -> MagnitudeCounts:
    counts = MagnitudeCounts(torch.ones(values.shape[1]) if weights is None else weights)
    counts.update(values)
    return counts


def rounded(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return fake_quantize(values.float(), Quant(GRID, PER_TENSOR), scale)


@pytest.mark.parametrize("alpha", [0.0, 5e-5, 3e-4, 1e-3, 0.02, 0.5])
def test_outliers_are_those_of_the_sorted_tensor(alpha):
    values = heavy_tailed()
    ranked = values.float().abs().flatten().sort(descending=True).values
    assert counted(values).outlier(alpha) == ranked[math.floor(alpha * len(ranked))].item()


@pytest.mark.parametrize("alpha", [0.0, *ALPHAS])
def test_the_denominator_is_the_sorted_code_of_equation_5(alpha):
    values = heavy_tailed()
    amax = values.abs().max().item()
    codes = (values.float() / (amax / 448)).clamp(-448, 448).to(torch.float8_e4m3fn).float().abs()
    ranked = codes.flatten().sort(descending=True).values
    expected = ranked[math.floor(alpha * len(ranked))].item()
    assert denominator(counted(values), amax, alpha, GRID) == expected
    assert expected == 448 or alpha > 0


@pytest.mark.parametrize(("dtype", "exact"), [(torch.bfloat16, 1e-9), (torch.float32, 0.02)])
def test_the_predicted_error_is_the_weighted_squared_error(dtype, exact):
    values = heavy_tailed(dtype=dtype)
    weights = torch.rand(values.shape[1], generator=torch.Generator().manual_seed(1)) * 5
    counts = counted(values, weights)
    for factor in (0.5, 1.0, 1.3, 4.0):
        scale = values.abs().max().float().reshape(1, 1) / 448 * factor
        lost = (values.double() - rounded(values, scale).double()).square() * weights.double()
        assert counts.error(scale, GRID) == pytest.approx(lost.sum().item(), rel=exact)


def test_counts_do_not_depend_on_how_the_values_come(monkeypatch):
    values = heavy_tailed()
    whole, parts = counted(values), MagnitudeCounts(torch.ones(values.shape[1]))
    monkeypatch.setattr("angelslim.numerics.lepto.CHUNK", 100)
    for piece in values.flip(0).split(171):
        parts.update(piece)
    assert torch.equal(whole.counts, parts.counts) and torch.equal(whole.weights, parts.weights)


def test_processes_count_as_one(monkeypatch):
    values = heavy_tailed()
    whole, mine, theirs = (counted(part) for part in (values, values[:300], values[300:]))
    others = iter([theirs.counts, theirs.weights])
    monkeypatch.setattr("angelslim.base.parallel.total", lambda value: value + next(others))
    mine.merge()
    assert torch.equal(mine.counts, whole.counts) and torch.equal(mine.weights, whole.weights)


def test_nothing_zeros_and_the_largest_numbers_can_be_counted():
    assert MagnitudeCounts(torch.ones(2)).outlier(0.5) == 0.0
    zeros = counted(torch.zeros(4, 2))
    (only,) = candidates(zeros, 0.0, GRID)
    assert zeros.outlier(0.0) == 0.0 and only.scale.item() > 0 and zeros.error(only.scale, GRID) == 0
    top = torch.finfo(torch.float32).max
    assert math.isfinite(counted(torch.tensor([[top, -1.0]])).outlier(0.0))


def test_the_papers_scales_only_grow_and_never_clip():
    values = heavy_tailed()
    amax = values.abs().max().item()
    found = candidates(counted(values), amax, GRID)
    plain = torch.tensor([[amax]]) / 448
    assert found[0].name == "alpha 0" and torch.equal(found[0].scale, plain)
    codes = [amax / candidate.scale.item() for candidate in found]
    assert len(found) > 3 and len(set(codes)) == len(codes)
    assert all(FLOOR <= code <= 448.001 for code in codes)
    assert all(values.abs().max().float() / candidate.scale <= 448.001 for candidate in found)


def test_one_huge_value_does_not_ruin_the_scale():
    values = heavy_tailed(rows=2000)
    values[0, 0] = 30000.0
    counts = counted(values)
    assert denominator(counts, 30000.0, ALPHAS[-1], GRID) < 8  # what the unbounded formula would take
    found = candidates(counts, 30000.0, GRID)
    assert max(candidate.scale.item() for candidate in found) <= 30000 / FLOOR * 1.001


def test_the_extended_set_adds_clipping_and_phases():
    values = heavy_tailed()
    amax = values.abs().max().item()
    counts = counted(values)
    base, more = candidates(counts, amax, GRID), candidates(counts, amax, GRID, extended=True)
    assert [each.name for each in more[: len(base)]] == [each.name for each in base]
    added = {each.name: each.scale.item() / base[0].scale.item() for each in more[len(base) :]}
    clips = [factor for name, factor in added.items() if name.startswith("clip")]
    phases = [factor for name, factor in added.items() if name.startswith("phase")]
    assert len(clips) == 10 and min(clips) >= 0.5 and max(clips) < 1
    assert len(phases) == 7 and min(phases) > 1 and max(phases) < 2


def test_the_shortlist_is_the_best_of_those_that_promise_a_gain():
    values = heavy_tailed()
    counts = counted(values)
    found = candidates(counts, values.abs().max().item(), GRID, extended=True)
    ranked = sorted(found, key=lambda each: counts.error(each.scale, GRID))
    middle = len(ranked) // 2
    offered = [ranked[middle], *ranked[middle + 1 :], *ranked[:middle]]  # the first is what has to be beaten
    kept, share = shortlist(counts, offered, GRID, 3)
    assert [each.name for each in kept] == [each.name for each in ranked[:3]]
    best, beaten = (counts.error(each.scale, GRID) for each in (ranked[0], ranked[middle]))
    assert share == pytest.approx(1 - best / beaten) and 0 < share < 1
    assert shortlist(counts, offered, GRID, 99)[0] == ranked[:middle]
    assert shortlist(counts, ranked, GRID, 3) == ([], 0.0)
