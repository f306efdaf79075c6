"""3:4 sparse signs against Python's own, and the five-bit code both ways."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from angelslim.base.errors import SchemeError
from angelslim.numerics.lowbit.reference import sparse_tile
from angelslim.numerics.lowbit.sparse34 import (
    TABLE,
    decode34,
    encode34,
    is_encodable,
    require_fours,
    signs34,
)

TILES = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(0)) * 0.02


def test_signs_and_scales_equal_their_twins():
    codes, scale = signs34(TILES)
    for place in product(range(4), range(3)):
        exact, expected = sparse_tile(TILES[place].tolist())
        assert scale[place].item() == pytest.approx(exact, rel=1e-5)
        assert codes[place].int().tolist() == expected


def test_the_mask_and_scale_are_the_best_there_are():
    tile = TILES[0, 0, :4]
    codes, scale = signs34(tile.view(1, 1, 4))
    mine = (tile - codes.view(-1) * scale.item()).square().sum()
    for row in TABLE.float():
        best = (tile @ row / 3).clamp(min=0)
        assert mine <= (tile - best * row).square().sum() + 1e-9


@pytest.mark.parametrize("values", sorted({*product((-1.0, -0.0, 0.0, 0.5), repeat=4)}))
def test_zeros_and_ties_can_always_be_encoded(values):
    codes = signs34(torch.tensor(values).view(1, 1, 4))[0].view(1, 4)
    assert is_encodable(codes)
    assert codes.int().tolist()[0] == sparse_tile(list(values))[1]


def test_all_32_codes_are_used_once():
    assert len({tuple(row) for row in TABLE.tolist()}) == 32 and is_encodable(TABLE)
    assert torch.equal(encode34(TABLE).flatten(), torch.arange(32, dtype=torch.uint8))
    assert torch.equal(decode34(torch.arange(32, dtype=torch.uint8)[:, None]), TABLE)


def test_codes_come_back():
    codes = signs34(TILES)[0].to(torch.int8).view(4, 48)
    packed = encode34(codes)
    assert packed.shape == (4, 12) and packed.dtype == torch.uint8 and packed.max() < 32
    assert torch.equal(decode34(packed), codes)


def test_what_is_not_sparse_is_not_encoded():
    assert not is_encodable(torch.zeros(1, 4)) and not is_encodable(torch.ones(1, 6))
    with pytest.raises(AssertionError):
        encode34(torch.tensor([[0, 0, 1, 1]]))
    with pytest.raises(SchemeError, match="6 is not a multiple of 4"):
        require_fours(6)
