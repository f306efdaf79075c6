"""Plans: lists and masks are one thing, densities are counted token by token, the shared rules hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from angelslim.methods.sparse.plan import BlockPlan, Context, causal_area, causal_blocks, finish

SHAPES = [(16, 0, 64), (16, 0, 61), (16, 32, 80), (16, 37, 90), (16, 90, 91), (32, 5, 33)]


def context(block: int, q_offset: int, kv_len: int, **more: Tensor) -> Context:
    return Context(layer=0, layers=1, scaling=1.0, q_offset=q_offset, prompt_len=kv_len, block=block, **more)


def random_mask(block: int, q_offset: int, kv_len: int, density: float, heads: int = 3) -> Tensor:
    torch.manual_seed(0)
    return torch.rand(2, heads, -(-(kv_len - q_offset) // block), -(-kv_len // block)) < density


def allowed_pairs(q_offset: int, kv_len: int) -> Tensor:
    """bool [Lq, Lk], one pair at a time."""
    return torch.tensor([[j <= q_offset + t for j in range(kv_len)] for t in range(kv_len - q_offset)])


def by_token(plan: BlockPlan) -> Tensor:
    """The pairs that a plan reads, bool [B, H, Lq, Lk]."""
    wide = plan.to_mask().repeat_interleave(plan.block_q, 2).repeat_interleave(plan.block_k, 3)
    return wide[:, :, : plan.q_len, : plan.kv_len] & allowed_pairs(plan.q_offset, plan.kv_len)


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_lists_and_masks_are_one_thing(size: tuple[int, int, int], density: float) -> None:
    mask = random_mask(*size, density)
    plan = BlockPlan.from_mask(mask, block_q=size[0], block_k=size[0], q_offset=size[1], kv_len=size[2])
    assert torch.equal(plan.to_mask(), mask)
    for number, row in zip(plan.num.flatten().tolist(), plan.idx.flatten(0, -2).tolist(), strict=True):
        assert row[:number] == sorted(set(row[:number])) and not any(row[number:])
    assert plan.num.dtype == plan.idx.dtype == torch.int32 and plan.idx.is_contiguous()


@pytest.mark.parametrize("size", SHAPES)
def test_density_counts_tokens(size: tuple[int, int, int]) -> None:
    plan = finish(random_mask(*size, 0.3), context(*size))
    allowed = allowed_pairs(*size[1:]).double()
    expected = by_token(plan).double().mean(dim=(0, 1)).sum() / allowed.sum()
    assert plan.density() == pytest.approx(float(expected), abs=1e-6)
    full = BlockPlan.full(block_q=size[0], block_k=size[0], q_offset=size[1], kv_len=size[2])
    assert full.density() == 1.0


@pytest.mark.parametrize("blocks", [(16, 16), (16, 32), (32, 16)])
@pytest.mark.parametrize("size", SHAPES)
def test_areas_and_causal_blocks(size: tuple[int, int, int], blocks: tuple[int, int]) -> None:
    _, q_offset, kv_len = size
    pairs = allowed_pairs(q_offset, kv_len)
    area = causal_area(*blocks, q_offset, kv_len)
    for i in range(area.shape[0]):
        for j in range(area.shape[1]):
            tile = pairs[
                i * blocks[0] : (i + 1) * blocks[0],
                j * blocks[1] : (j + 1) * blocks[1],
            ]
            assert area[i, j] == tile.sum()
    assert torch.equal(area > 0, causal_blocks(*blocks, q_offset, kv_len))


@pytest.mark.parametrize("size", SHAPES)
def test_the_rules_that_all_methods_share(size: tuple[int, int, int]) -> None:
    block, q_offset, kv_len = size
    raw = random_mask(*size, 0.3)
    before = raw.clone()
    plan = finish(raw, context(*size))
    mask, causal = plan.to_mask(), causal_blocks(block, block, q_offset, kv_len)
    assert torch.equal(raw, before), "the selector's mask is not ours to change"
    assert not (mask & ~causal).any()
    assert mask[..., 0].all()
    positions = torch.arange(plan.q_len)
    assert mask[:, :, positions // block, (positions + q_offset) // block].all()
    free = causal.clone()
    free[:, 0] = False
    free[positions // block, (positions + q_offset) // block] = False
    assert torch.equal(mask & free, raw & free), "all else is the selector's choice"


def test_padding_moves_the_sink_and_empties_no_row() -> None:
    ctx = context(16, 0, 96, kv_start=torch.tensor([0, 37]), kv_stop=torch.tensor([60, 96]))
    mask = finish(torch.ones(2, 1, 6, 6, dtype=torch.bool), ctx).to_mask()[:, 0]
    assert (mask.sum(-1) > 0).all()
    assert mask[1, 2:, 2].all() and not mask[1, 2:, :2].any(), "the sink is the block of the first real key"
    assert not mask[0, 5, 4] and mask[0, 5, :4].all(), "blocks after the last real key are dropped"


@pytest.mark.parametrize("size", SHAPES)
def test_flex_masks_the_diagonal_alone(size: tuple[int, int, int]) -> None:
    plan = finish(random_mask(*size, 0.4), context(*size))
    block_mask = plan.to_block_mask()
    parts = [
        replace(plan, num=block_mask.kv_num_blocks, idx=block_mask.kv_indices).to_mask(),
        replace(plan, num=block_mask.full_kv_num_blocks, idx=block_mask.full_kv_indices).to_mask(),
    ]
    assert torch.equal(parts[0] ^ parts[1], plan.to_mask()), "each listed block once"
    first, last = plan.diagonal()
    expected = (last - first + 1).int().expand_as(block_mask.kv_num_blocks)
    assert torch.equal(block_mask.kv_num_blocks, expected)
