"""The oracle: the true mass of blocks, and no other choice of the same size has more."""

from __future__ import annotations

import pytest
import torch
from oracles import CASES, Case, allowed, attention, check, fewest, forced, heads_of, real_places, rows_of

from angelslim.methods.sparse.selectors.base import SELECTORS
from angelslim.methods.sparse.selectors.oracle import Oracle


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_fewest_blocks_with_the_mass(case: Case) -> None:
    q, k, v = case.tensors()
    plan = Oracle({"mass": 0.7}).select(q, k, v, case.context())
    wanted = {}
    for b, h, one_q, one_k, _ in heads_of(case, q, k, v):
        weights = attention(case, b, one_q, one_k)
        blocks = wanted[b, h] = set()
        for i in rows_of(case, b):
            rows = real_places(case, b, i * 16, 16, query=True)
            mass = [float(weights[rows, j * 16 : j * 16 + 16].sum()) for j in range(-(-case.keys // 16))]
            here = [j for j in range(len(mass)) if allowed(case, b, i, j)]
            first = [j for j in here if forced(case, b, i, j)]
            blocks |= {(i, j) for j in fewest(mass, first, 0.7, here)}
    check(plan, case, wanted)


def test_no_other_choice_of_the_same_rows_keeps_more() -> None:
    case = Case(queries=512, keys=512)
    q, k, v = case.tensors()
    q = q * 2
    causal = torch.ones(512, 512, dtype=torch.bool).tril()
    weights = torch.softmax((q @ k.transpose(-1, -2) * 0.5).masked_fill(~causal, -torch.inf), -1)
    mass = weights.unflatten(2, (-1, 16)).unflatten(4, (-1, 16)).sum((3, 5))
    found = {}
    for name in SELECTORS:
        plan = SELECTORS.get(name)({"density": 0.25}).select(q, k, v, case.context())
        found[name] = float(mass[plan.to_mask()].sum())
    for name in set(found) - {"oracle", "stem", "tri_shape", "union"}:  # which have other counts
        assert found[name] < found["oracle"], name
