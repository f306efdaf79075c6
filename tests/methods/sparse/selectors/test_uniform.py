"""Uniform top-k: each row's best blocks by the product of the means, as many as the density says."""

from __future__ import annotations

import pytest
from oracles import CASES, Case, allowed, check, forced, heads_of, mean_of, real_places, rows_of

from angelslim.methods.sparse.selectors.uniform import Uniform


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_best_blocks_are_kept(case: Case) -> None:
    q, k, v = case.tensors()
    plan = Uniform({"density": 0.5}).select(q, k, v, case.context())
    wanted = {}
    for b, h, one_q, one_k, _ in heads_of(case, q, k, v):
        blocks = wanted[b, h] = set()
        for i in rows_of(case, b):
            here = [j for j in range(-(-case.keys // 16)) if allowed(case, b, i, j)]
            mean_q = mean_of(one_q, real_places(case, b, i * 16, 16, query=True))
            score = {
                j: float(mean_q @ mean_of(one_k, real_places(case, b, j * 16, 16, query=False))) for j in here
            }
            order = sorted(here, key=lambda j: (not forced(case, b, i, j), -score[j]))
            blocks |= {(i, j) for j in order[: int(plan.num[b, h, i])]}  # the count has its own test
    check(plan, case, wanted)


def test_long_rows_have_the_same_count() -> None:
    case = Case(queries=1024, keys=1024)
    plan = Uniform({}).select(*case.tensors(), case.context())
    assert abs(plan.density() - 0.2) < 0.002
    assert plan.num[..., 10:].max() - plan.num[..., 10:].min() <= 1
