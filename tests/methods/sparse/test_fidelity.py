"""Mass and error of a plan, against attention written token by token in float64."""

from __future__ import annotations

import torch

from angelslim.methods.sparse.assign import full
from angelslim.methods.sparse.fidelity import compare
from angelslim.methods.sparse.plan import BlockPlan, Context

SIZES = [(1, 2, 2, 48, 48), (2, 4, 2, 50, 50), (1, 4, 1, 30, 75)]


def test_mass_and_error_by_token() -> None:
    for batch, heads, kv_heads, queries, keys in SIZES:
        torch.manual_seed(0)
        q = torch.randn(batch, heads, queries, 8)
        k, v = torch.randn(batch, kv_heads, keys, 8), torch.randn(batch, kv_heads, keys, 6)
        ctx = Context(0, 1, 0.5, keys - queries, keys, 16)
        everything = full(q, k, v, ctx).to_mask().expand(batch, heads, -1, -1)
        mask = everything & (torch.rand(everything.shape) < 0.5)
        mask |= everything & (torch.arange(mask.shape[-1]) == 0)
        plan = BlockPlan.from_mask(mask, block_q=16, block_k=16, q_offset=ctx.q_offset, kv_len=keys)
        found = compare(q, k, v, plan, ctx)
        for h in range(heads):
            kept, lost, norm = [], 0.0, 0.0
            for b in range(batch):
                one_k, one_v = (x[b, h * kv_heads // heads].double() for x in (k, v))
                for t in range(queries):
                    seen = ctx.q_offset + t + 1
                    weights = torch.softmax(one_k[:seen] @ q[b, h, t].double() * 0.5, 0)
                    read = torch.tensor([bool(mask[b, h, t // 16, j // 16]) for j in range(seen)])
                    kept.append(float(weights[read].sum()))
                    dense = weights @ one_v[:seen]
                    sparse = (weights * read) @ one_v[:seen] / weights[read].sum()
                    lost += float((sparse - dense).square().sum())
                    norm += float(dense.square().sum())
            assert abs(float(found.mass[h]) - sum(kept) / len(kept)) < 1e-6
            assert abs(float(found.error[h]) - (lost / norm) ** 0.5) < 1e-5


def test_a_full_plan_loses_nothing() -> None:
    q, k, v = torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    ctx = Context(0, 1, 0.3, 0, 40, 16)
    found = compare(q, k, v, full(q, k, v, ctx), ctx)
    assert found.density.tolist() == [1.0] * 4
    assert (found.mass - 1).abs().max() < 1e-6 and found.error.max() < 1e-6
