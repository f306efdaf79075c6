"""Stretched levels against the nearest level by search."""

from __future__ import annotations

import pytest
import torch

from angelslim.numerics.lowbit.reference import stretched_tile
from angelslim.numerics.lowbit.stretched import STRETCHES, first_span, step_of, stretched

TILES = torch.randn(5, 2, 24, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize("levels", STRETCHES)
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_levels_are_the_nearest_ones(levels, share):
    stretch, span = STRETCHES[levels], first_span(TILES) * share
    u, found = stretched(TILES, span, stretch)
    step = step_of(span, stretch)
    assert torch.allclose(u * span, TILES)
    for place in ((row, group) for row in range(5) for group in range(2)):
        exact, codes = stretched_tile(levels, TILES[place].tolist(), span[place].item())
        assert step[place].item() == pytest.approx(exact, rel=1e-6)
        centre = 1.5 if levels == "seq2" else 0
        assert found[place].tolist() == [code - centre for code in codes]


def test_levels_are_those_of_the_paper():
    u = torch.linspace(-1.2, 1.2, 601)[None, None]
    two = stretched(u, torch.ones(1, 1, 1), STRETCHES["seq2"])[1] / 2
    three = stretched(u, torch.ones(1, 1, 1), STRETCHES["ternary"])[1] / 1.5
    assert two.unique().tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert three.unique().tolist() == pytest.approx([-2 / 3, 0.0, 2 / 3])


def test_a_row_of_zeros_has_finite_levels():
    zeros = torch.zeros(1, 1, 8)
    for stretch in STRETCHES.values():
        u, levels = stretched(zeros, first_span(zeros), stretch)
        assert u.isfinite().all() and (levels * step_of(first_span(zeros), stretch)).abs().max() < 1e-5
