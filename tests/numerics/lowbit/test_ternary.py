"""Thresholds and scales of ternary weights against Python's own floats."""

from __future__ import annotations

import pytest
import torch

from angelslim.numerics.lowbit import ternary
from angelslim.numerics.lowbit.reference import threshold_tile
from angelslim.numerics.lowbit.tiles import tiled
from angelslim.numerics.scheme import PER_CHANNEL, PER_TENSOR, per_group

RULES = {"absmean": ternary.absmean, "twn": ternary.twn, "minmax": ternary.minmax}
WEIGHT = torch.randn(6, 48, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grain", [PER_TENSOR, PER_CHANNEL, per_group(16)])
def test_rules_equal_their_twins(rule, grain):
    tiles = tiled(WEIGHT, grain)
    threshold, scale = RULES[rule](tiles)
    codes = ternary.ternary_codes(tiles, threshold)
    for index in range(tiles.shape[0] * tiles.shape[1]):
        place = divmod(index, tiles.shape[1])
        exact, expected = threshold_tile(rule, tiles[place].tolist())
        assert scale[place].item() == pytest.approx(exact, rel=1e-5)
        assert codes[place].int().tolist() == expected
    assert torch.equal(codes == 0, ternary.dead_zone(tiles, threshold))


@pytest.mark.parametrize("rule", RULES)
def test_a_tile_of_zeros_stays_zero(rule):
    tiles = torch.zeros(2, 1, 8)
    threshold, scale = RULES[rule](tiles)
    assert torch.equal(ternary.ternary_codes(tiles, threshold), tiles) and torch.equal(scale, scale * 0)


def test_twn_loses_less_than_its_rivals_on_a_bell():
    tiles = tiled(torch.randn(1, 4096, generator=torch.Generator().manual_seed(1)), PER_TENSOR)

    def lost(rule) -> float:
        threshold, scale = RULES[rule](tiles)
        return (tiles - ternary.ternary_codes(tiles, threshold) * scale).square().mean().item()

    assert lost("twn") < lost("absmean") < lost("minmax")
