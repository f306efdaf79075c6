"""Rules: the first that fits decides, and selectors of different heads make one plan."""

from __future__ import annotations

import torch
from torch import Tensor

from angelslim.methods.sparse.assign import Heads, Rule, full, selector_of
from angelslim.methods.sparse.plan import BlockPlan, Context, finish

CTX = Context(layer=0, layers=1, scaling=1.0, q_offset=0, prompt_len=64, block=16)


def by_value(q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> BlockPlan:
    """Keeps column round(q) in heads whose keys are odd, column round(v) in the others."""
    groups = q.shape[1] // k.shape[1]
    odd = (k[:, :, 0, 0].repeat_interleave(groups, 1) % 2).bool()
    column = torch.where(odd, q[:, :, 0, 0], v[:, :, 0, 0].repeat_interleave(groups, 1))
    mask = torch.arange(4) == column[..., None, None]
    return finish(mask.expand(-1, -1, 4, -1), ctx)


def test_the_first_rule_that_fits() -> None:
    rules = [
        Rule(None, layers=frozenset({0})),
        Rule(full, heads=frozenset({0, 1})),
        Rule(by_value, layers=frozenset({2})),
    ]
    assert selector_of(rules, 0, 2) is None
    assert selector_of(rules, 1, 2) is full
    mixed = selector_of(rules, 2, 4)
    assert isinstance(mixed, Heads) and mixed.parts == (((0, 1), full), ((2, 3), by_value))
    rest = selector_of(rules, 1, 3)
    assert rest is full or isinstance(rest, Heads), "heads without a rule are dense"
    assert selector_of([Rule(by_value, heads=frozenset({1}))], 0, 2) == Heads(
        (((0,), full), ((1,), by_value))
    )


def test_heads_see_their_own_tensors() -> None:
    q = torch.tensor([0.0, 1, 2, 3]).view(1, 4, 1, 1).expand(1, 4, 64, 8)
    k = torch.tensor([1.0, 2]).view(1, 2, 1, 1).expand(1, 2, 64, 8)
    v = torch.tensor([0.0, 1]).view(1, 2, 1, 1).expand(1, 2, 64, 8)
    whole = by_value(q, k, v, CTX).to_mask()
    mixed = Heads((((3, 0), by_value), ((1,), full), ((2,), by_value)))(q, k, v, CTX)
    mask = mixed.to_mask()
    assert torch.equal(mask[:, [0, 2, 3]], whole[:, [0, 2, 3]])
    assert torch.equal(mask[:, 1], torch.ones(1, 4, 4).tril().bool())
