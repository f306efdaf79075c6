"""Views of weights as tiles."""

from __future__ import annotations

import pytest
import torch

from angelslim.base.errors import SchemeError
from angelslim.numerics.lowbit.tiles import by_row, kept, shape_of, tiled
from angelslim.numerics.quantize import spread, tile_of
from angelslim.numerics.scheme import PER_CHANNEL, PER_TENSOR, per_group

WEIGHT = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grain", [PER_TENSOR, PER_CHANNEL, per_group(8)])
def test_tiles_are_those_of_every_other_quantizer(grain):
    largest = tiled(WEIGHT, grain).abs().amax(-1)
    everywhere = spread(largest, tile_of(grain, (6, 32)), (6, 32))
    mine = largest[..., None].expand(shape_of((6, 32), grain)).reshape(6, 32)
    assert torch.equal(everywhere, mine)
    assert tiled(WEIGHT, grain).data_ptr() == WEIGHT.data_ptr(), "a view, not a copy"


def test_a_tensors_scale_is_repeated_for_its_rows():
    assert torch.equal(by_row(torch.tensor([[[2.0]]]), 3), torch.full((3, 1), 2.0))
    groups = torch.arange(6.0).view(3, 2, 1)
    assert torch.equal(by_row(groups, 3), groups[..., 0])


def test_a_group_that_does_not_fit_is_refused():
    with pytest.raises(SchemeError, match="32 is not a multiple of the group size 12"):
        tiled(WEIGHT, per_group(12))


def test_kept_scales_are_numbers_of_the_stored_type():
    scale = torch.rand(50, generator=torch.Generator().manual_seed(1)) * 0.1
    assert kept(scale, None) is scale
    for dtype in (torch.float16, torch.bfloat16):
        rounded = kept(scale, dtype)
        assert rounded.dtype == torch.float32 and torch.equal(rounded.to(dtype).float(), rounded)
        assert not torch.equal(rounded, scale)
