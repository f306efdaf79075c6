"""Second moments: plain ones for tokens of like size, and loud tokens turned down to twice the median."""

from __future__ import annotations

import pytest
import torch

from angelslim.base import parallel
from angelslim.numerics.moments import LOUD, Moments


def tokens(count: int = 40, seed: int = 0) -> torch.Tensor:
    """Tokens of one size, in random directions."""
    values = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return values / values.norm(dim=1, keepdim=True)


def seen(*samples: torch.Tensor) -> Moments:
    moments = Moments(6)
    for sample in samples:
        moments.update(sample)
    return moments


def test_tokens_of_like_size_count_as_they_are():
    values = tokens() * torch.linspace(0.8, 1.5, 40)[:, None]
    exact = values.double().T @ values.double() / 40
    assert torch.allclose(seen(values).matrix.double(), exact, atol=1e-6)
    assert torch.allclose(seen(values).mean, values.abs().mean(0))


def test_a_loud_token_counts_as_one_of_twice_the_median():
    values = tokens()
    values[0] *= 500
    turned = values.clone()
    turned[0] *= LOUD / 500
    exact = turned.double().T @ turned.double() / 40
    assert torch.allclose(seen(values).matrix.double(), exact, atol=1e-5)


def test_each_sample_has_its_own_median_and_all_tokens_the_same_weight():
    quiet, loud = tokens(30, 1), tokens(10, 2) * 100
    expected = (quiet.T @ quiet + loud.T @ loud) / 40
    assert torch.allclose(seen(quiet, loud).matrix, expected, rtol=1e-4, atol=1e-3)
    assert seen(quiet, loud).tokens == 40


def test_nothing_seen_gives_zeros():
    nothing = seen(torch.zeros(0, 6))
    assert nothing.tokens == 0 and not nothing.matrix.any() and not nothing.mean.any()
    assert not seen(torch.zeros(3, 6)).matrix.any()


def test_processes_add_up(monkeypatch):
    """Two that saw the same."""
    monkeypatch.setattr(parallel, "total", lambda value: 2 * value)
    monkeypatch.setattr(parallel, "total_count", lambda value: 2 * value)
    moments, values = Moments(6), tokens()
    moments.update(values)
    moments.merge()
    assert moments.tokens == 80
    assert torch.allclose(moments.matrix, seen(values).matrix) and torch.allclose(
        moments.mean, seen(values).mean
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_float32(dtype):
    values = torch.full((4, 6), 300.0, dtype=dtype)
    assert seen(values).matrix.dtype == torch.float32 and seen(values).matrix[0, 0] == 300**2


def test_divided_inputs_are_what_was_seen_divided():
    values, columns = tokens(), torch.linspace(0.5, 2, 6)
    moments = seen(values)
    assert moments.rescale(columns)
    divided = values / columns
    assert torch.allclose(moments.matrix, divided.T @ divided / 40, rtol=1e-5)
    assert torch.allclose(moments.mean, divided.abs().mean(0), rtol=1e-5)
