"""Which selector chooses for which layer and head.

Rules are read in order; the first that names a layer and a head decides for it. A rule without a selector keeps its
heads dense. Where the heads of a layer follow different rules, each selector sees its own heads alone and the lists
are joined into one plan, so the kernel still runs once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .plan import BlockPlan, Context, Selector


@dataclass(frozen=True)
class Rule:
    """`selector` chooses for these layers and query heads; None for `layers` or `heads` means all of them."""

    selector: Selector | None
    layers: frozenset[int] | None = None
    heads: frozenset[int] | None = None


def full(q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> BlockPlan:
    """The selector that keeps every block: dense attention as a plan."""
    return BlockPlan.full(
        block_q=ctx.block, block_k=ctx.block, q_offset=ctx.q_offset, kv_len=ctx.keys, device=q.device
    )


@dataclass(frozen=True)
class Heads:
    """Selectors of the heads of one layer, as (heads, selector)."""

    parts: tuple[tuple[tuple[int, ...], Selector], ...]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> BlockPlan:
        """Ask each selector about its heads and join the lists."""
        groups = q.shape[1] // k.shape[1]
        plans = []
        for heads, selector in self.parts:
            own = torch.tensor(heads, device=q.device)
            asked = replace(ctx, part=(heads, q.shape[1]))
            plans.append(selector(q[:, own], k[:, own // groups], v[:, own // groups], asked))
        longest = max(plan.idx.shape[-1] for plan in plans)
        num = plans[0].num.new_zeros(q.shape[0], q.shape[1], plans[0].rows)
        idx = num.new_zeros(*num.shape, longest)
        for (heads, _), plan in zip(self.parts, plans, strict=True):
            own = torch.tensor(heads, device=q.device)
            num[:, own] = plan.num
            idx[:, own, :, : plan.idx.shape[-1]] = plan.idx
        return BlockPlan(ctx.block, ctx.block, num, idx, ctx.q_offset, ctx.keys)


def selector_of(rules: Sequence[Rule], layer: int, heads: int) -> Selector | None:
    """The selector of a layer with this many query heads, or None if all of them stay dense."""
    chosen: list[Selector | None] = []
    for head in range(heads):
        fits = (
            rule
            for rule in rules
            if (rule.layers is None or layer in rule.layers) and (rule.heads is None or head in rule.heads)
        )
        rule = next(fits, None)
        chosen.append(rule.selector if rule else None)
    if all(selector is None for selector in chosen):
        return None
    if all(selector is chosen[0] for selector in chosen):
        return chosen[0]
    parts: list[tuple[Selector, list[int]]] = []
    for head, selector in enumerate(selector or full for selector in chosen):
        for known, own in parts:
            if known is selector:
                own.append(head)
                break
        else:
            parts.append((selector, [head]))
    return Heads(tuple((tuple(own), selector) for selector, own in parts))
