"""Views of weights as tiles."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kept_scales_are_those_of_the_stored_type(dtype):
    source = torch.Generator().manual_seed(1)
    values = torch.randn(20000, generator=source) * 10.0 ** torch.randint(-7, 5, (20000,), generator=source)
    ties = torch.arange(0, 4096).float() * (1 + 2.0**-11) * 2.0**-9
    for scale in (values.clamp(-6e4, 6e4), ties, torch.tensor([0.0, 2.0**-14, 2.0**-24, 2.0**-25, 65504.0])):
        rounded = kept(scale, dtype)
        assert rounded.dtype == torch.float32 and torch.equal(rounded, scale.to(dtype).float())
    assert not torch.equal(kept(values, dtype), values)
    assert kept(values, None) is values


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kept_scales_need_no_cast_that_a_compiler_could_drop(dtype):
    graph = make_fx(lambda scale: kept(scale, dtype))(torch.rand(4, 1)).graph
    types = {node.meta["val"].dtype for node in graph.nodes if "val" in node.meta}
    types |= {node.meta["tensor_meta"].dtype for node in graph.nodes if "tensor_meta" in node.meta}
    assert types and types <= {torch.float32, torch.int32, torch.bool}
