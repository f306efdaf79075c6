from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from angelslim.base.errors import ConfigError
from angelslim.numerics.observers import BINS, KINDS, MinimumError, Percentile, make_observer
from angelslim.numerics.quantize import round_to
from angelslim.numerics.scheme import FORMATS

INT8, FP8 = FORMATS["int8"], FORMATS["fp8_e4m3"]


def sample(size: int = 4000, seed: int = 0, heavy: bool = True) -> torch.Tensor:
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return values**3 if heavy else values


def observed(kind: str, chunks: list[torch.Tensor], percent: float = 99.0) -> float:
    observer = make_observer(kind, INT8, percent)
    for chunk in chunks:
        observer.update(chunk)
    return observer.amax()


@pytest.mark.parametrize("kind", KINDS)
def test_depends_neither_on_batch_size_nor_on_order(kind):
    values = sample()
    whole = observed(kind, [values])
    assert observed(kind, list(values.split(7))) == whole
    assert observed(kind, list(values.sort().values.split(100))) == whole
    assert observed(kind, list(values.sort(descending=True).values.split(100))) == whole
    assert observed(kind, [values.reshape(40, 100)]) == whole


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-6, 1e6), st.integers(1, 50))
def test_order_does_not_matter_at_any_magnitude(seed, magnitude, pieces):
    values = sample(300, seed) * magnitude
    shuffled = values[torch.randperm(300, generator=torch.Generator().manual_seed(seed))]
    for kind in KINDS:
        assert observed(kind, list(shuffled.split(pieces))) == observed(kind, [values])


def test_absmax_is_the_largest_magnitude_of_either_sign():
    assert observed("absmax", [torch.tensor([1.0, -3.0]), torch.tensor([2.0])]) == 3.0


@pytest.mark.parametrize("percent", [50.0, 90.0, 99.0, 99.9, 100.0])
def test_percentile_is_within_a_bin_of_the_exact_one(percent):
    values = sample()
    observer = Percentile(percent)
    observer.update(values)
    magnitudes = values.abs().double()  # "lower" and "higher" are the two values next to the rank
    low, high = (
        torch.quantile(magnitudes, percent / 100, interpolation=x).item() for x in ("lower", "higher")
    )
    assert low <= observer.amax() <= high + observer.width
    assert observer.width <= 4 * values.abs().max().item() / BINS


def brute_force(values: torch.Tensor, grid, amax: float) -> float:
    scale = amax / grid.high
    rounded = round_to(values / scale, grid).float() * scale
    return (rounded - values).double().square().mean().item()


@pytest.mark.parametrize("grid", [INT8, FP8, FORMATS["int4"]], ids=lambda grid: grid.name)
@pytest.mark.parametrize("heavy", [True, False])
def test_mse_is_never_worse_than_absmax_and_near_the_best_of_all_ranges(grid, heavy):
    values = sample(heavy=heavy).abs()
    observer = MinimumError(grid)
    observer.update(values)
    top = values.max().item()
    found = brute_force(values, grid, observer.amax())
    best = min(brute_force(values, grid, top * share / 400) for share in range(4, 401))
    assert found <= brute_force(values, grid, top) * 1.001
    assert found <= best * 1.1


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_nothing_give_zero(kind):
    assert observed(kind, []) == 0.0
    assert observed(kind, [torch.zeros(5)]) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_before_and_after_data_count_alike(kind):
    values, zeros = sample(500), torch.zeros(300)
    assert observed(kind, [zeros, values]) == observed(kind, [values, zeros])


def test_bfloat16_inputs_are_read_exactly():
    values = sample().to(torch.bfloat16)
    assert observed("percentile", [values]) == observed("percentile", [values.float()])


def test_an_unknown_kind_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'percentile'"):
        make_observer("percentil", FP8)
